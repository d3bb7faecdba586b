"""A model and questions -> answers and their losses, rendered by the run's own prompt."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import GenerationConfig, PreTrainedTokenizerBase

from intern.config.build import check_names, plain
from intern.data.prompt import Prompt
from intern.errors import UserError


def build_generation(
    node: DictConfig | dict[str, Any], prompt: Prompt, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """conf/generation -> transformers.GenerationConfig that stops at the end of a turn.

    Raises:
        UserError: an unknown key or a value that transformers refuses.
    """
    values = plain(node) if isinstance(node, DictConfig) else node
    check_names(values, GenerationConfig().to_dict(), "generation")
    try:
        config = GenerationConfig(**values, eos_token_id=list(prompt.stop_ids), pad_token_id=tokenizer.pad_token_id)
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"generation: {' '.join(str(error).split())}") from error
    return config


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    generation: GenerationConfig,
    questions: Sequence[str],
    materials: Sequence[str | None] | None = None,
    batch_size: int = 16,
    streamer: Any = None,
    histories: Sequence[Sequence[tuple[str, str]]] | None = None,
    systems: Sequence[str | None] | None = None,
) -> Iterator[tuple[str, bool]]:
    """Each question's answer, in order, and whether the model ended it by itself (False: cut off at max_new_tokens)."""
    answers = generate_ids(
        model, tokenizer, prompt, generation, questions, materials, batch_size, streamer, histories, systems
    )
    for ids, ended in answers:
        yield answer_text(tokenizer, ids), ended


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What a user reads of an answer's tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@torch.inference_mode()
def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    generation: GenerationConfig,
    questions: Sequence[str],
    materials: Sequence[str | None] | None = None,
    batch_size: int = 16,
    streamer: Any = None,
    histories: Sequence[Sequence[tuple[str, str]]] | None = None,
    systems: Sequence[str | None] | None = None,
) -> Iterator[tuple[list[int], bool]]:
    """Each answer's token ids without its end of turn, in order, and whether it had one.

    Questions of a batch are padded on the left, so each is followed by its own answer. A long material loses its end where the prompt
    would not leave room for an answer in the model's positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # BLOOM and MPT have none
    most = positions - (generation.max_new_tokens or 0) if positions is not None else None
    encoded = prompt.encode(
        tokenizer, questions, materials=materials, max_length=most, histories=histories, systems=systems
    )
    model.eval()
    for first in range(0, len(questions), batch_size):
        rows = []
        for question, one in zip(
            questions[first : first + batch_size], encoded[first : first + batch_size], strict=True
        ):
            if one is None:
                raise UserError(f"question is too long for the model ({positions} positions): {question[:60]!r}...")
            rows.append(one.input_ids)
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=generation, streamer=streamer)
        for reply in output[:, width:].tolist():
            ended = next((index for index, token in enumerate(reply) if token in prompt.stop_ids), None)
            yield reply[:ended], ended is not None
