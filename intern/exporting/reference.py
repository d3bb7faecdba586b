"""A loaded run and golden questions -> prompts, greedy answers and predictions that every export of the run is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from intern.config.build import plain
from intern.data.prepare import golden_rows
from intern.data.prompt import Prompt
from intern.data.row_tokens import user_turn
from intern.errors import UserError
from intern.inference.answer import Intern
from intern.inference.generate import positions_of


class Answer(NamedTuple):
    """A greedy answer."""

    text: str
    ended: bool  # by itself


@dataclass(frozen=True)
class GoldenPrompt:
    """A golden question as messages, its tokens as the model was trained to see them, and the tokens of the model's answer to it."""

    messages: list[dict[str, str]]
    ids: list[int]
    answer_ids: list[int]  # with its end of turn, if it has one


@dataclass(frozen=True)
class Reference:
    """What the evaluated model makes of the golden prompts.

    Attributes:
        prompts, answers: one of each per golden question.
        log_probs: (tokens of the answer, vocabulary) for each prompt, of the answer's own tokens.
        most: tokens of an answer.
    """

    prompts: list[GoldenPrompt]
    answers: list[Answer]
    log_probs: list[torch.Tensor]
    most: int


def build_reference(intern: Intern, eval_file: str | None, count: int, most: int) -> Reference:
    """Ask the evaluated model: base, as it was quantized for training, with the adapter.

    Args:
        intern: the loaded run.
        eval_file: another golden file than the run's own.
        count: how many golden questions, spread over the file.
        most: tokens of an answer.

    Raises:
        UserError: there are no golden rows, or none that leaves room for an answer.
    """
    prompt, tokenizer = intern.prompt, intern.tokenizer
    found = golden_rows(plain(intern.cfg.data), eval_file, False)
    if found is None:
        raise UserError("eval_file: the run has no golden file to compare the export with: name one with eval_file=...")
    positions = positions_of(intern.model.config)
    asked = _spread(list(found.rows), count)
    conversations, ids = [], []
    for row in asked:
        material = row["chunk_text"] if prompt.trains_with_material(row["question"]) else None
        history = [(turn["question"], turn["answer"]) for turn in row["history"] or []]
        if history and prompt.next_turn is None:
            history = []
        room = positions - most if positions is not None else None
        more: dict[str, Any] = {"materials": [material], "histories": [history], "systems": [row["system"]]}
        [one] = prompt.encode(tokenizer, [row["question"]], max_length=room, **more)
        if one is None or one.context_tokens_cut or one.turns_cut:
            continue  # what was cut to fit has no messages that become the same tokens
        conversations.append(messages_of(prompt, row["question"], material, history, row["system"]))
        ids.append(list(one.input_ids))
    if not ids:
        raise UserError(f"max_new_tokens={most}: no golden question leaves room for such an answer: lower it")
    replies = greedy(intern.model, tokenizer, ids, most, prompt.stop_ids)
    prompts = [GoldenPrompt(*one) for one in zip(conversations, ids, replies, strict=True)]
    return Reference(
        prompts,
        [to_answer(tokenizer, reply, prompt.stop_ids) for reply in replies],
        [predictions(intern.model, one.ids, one.answer_ids) for one in prompts],
        most,
    )


def messages_of(
    prompt: Prompt,
    question: str,
    material: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> list[dict[str, str]]:
    """Return a question as the messages that another program renders with the chat template."""
    turns = [*history, (user_turn(question, material)[0], "")]
    head = prompt.system_prompt if system is None else system.strip()
    messages = []
    if prompt.system_in_user and head:
        turns[0] = f"{head}\n\n{turns[0][0]}", turns[0][1]
    elif not prompt.system_in_user and (head or prompt.opening_alone is None):
        messages = [{"role": "system", "content": head}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages[:-1]


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    most: int,
    stop_ids: Sequence[int] | None,
    batch_size: int = 8,
) -> list[list[int]]:
    """Return the tokens of greedy answers, each with its end of turn if it came to one.

    Args:
        model: with the tokens of `prompts`.
        tokenizer: for its padding token.
        prompts: token ids.
        most: tokens of an answer.
        stop_ids: what ends an answer; None: what the model's own generation_config says.
        batch_size: prompts that are answered at once.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    own = model.generation_config.eos_token_id
    ends = list(stop_ids) if stop_ids is not None else [own] if isinstance(own, int) else list(own or [])
    config = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    replies = []
    for first in range(0, len(prompts), batch_size):
        rows = prompts[first : first + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for reply in output[:, width:].tolist():
            end = next((index for index, token in enumerate(reply) if token in ends), len(reply) - 1)
            replies.append(reply[: end + 1])
    return replies


def to_answer(tokenizer: PreTrainedTokenizerBase, reply: Sequence[int], stop_ids: Sequence[int]) -> Answer:
    """Return an answer's text without its end of turn, and whether it has one."""
    ended = bool(reply) and reply[-1] in stop_ids
    text = tokenizer.decode(list(reply[:-1] if ended else reply), skip_special_tokens=True)
    return Answer(str(text).strip(), ended)


@torch.inference_mode()
def predictions(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return a model's log-probabilities of each token of an answer: (tokens of the answer, vocabulary), float32, in host memory."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def _spread(rows: list[Any], count: int) -> list[Any]:
    """Return `count` rows at equal distances."""
    step = max(len(rows) / count, 1)
    return [rows[int(index * step)] for index in range(min(count, len(rows)))]
