"""A model and questions -> answers, rendered by the run's own prompt."""

import bisect
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from intern.data.prompt import Prompt
from intern.errors import UserError


class Reply(NamedTuple):
    """One answer."""

    text: str
    tokens: int  # of the answer, without its end of turn
    ended: bool  # by itself or at a stop string; False: cut off at max_new_tokens
    context_tokens_cut: int = 0  # taken off the end of the question's material so that it fits


def positions_of(config: Any) -> int | None:
    """How many positions a model has, from its configuration; None for any number (BLOOM and MPT)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@torch.inference_mode()
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
) -> Iterator[Reply]:
    """Answer each question, in order.

    Questions of a batch are padded on the left, so each is followed by its own answer. A long material loses its end if the prompt
    would not leave room for an answer in the model's positions.

    Raises:
        UserError: a question does not fit into the model's positions together with its answer.
    """
    positions = positions_of(model.config)
    most = positions - (generation.max_new_tokens or 0) if positions is not None else None
    more: dict[str, Any] = {"materials": materials, "histories": histories, "systems": systems}
    encoded = prompt.encode(tokenizer, questions, max_length=most, **more)
    stops = generation.stop_strings or []
    library = copy.copy(generation)
    library.stop_strings = None
    model.eval()
    for first in range(0, len(questions), batch_size):
        batch = slice(first, first + batch_size)
        rows = []
        for index, one in enumerate(encoded[batch], first):
            if one is None:
                alone = {name: [values[index]] if values else None for name, values in more.items()}
                raise UserError(_too_long(tokenizer, prompt, generation, positions or 0, questions[index], alone))
            rows.append(one)
        width = max(len(row.input_ids) for row in rows)
        padding = [width - len(row.input_ids) for row in rows]
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * pad + row.input_ids for pad, row in zip(padding, rows, strict=True)],
            device=model.device,
        )
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=library,
            stopping_criteria=StoppingCriteriaList([_AtText(tokenizer, stops, width)] if stops else []),
            **({"streamer": streamer} if streamer is not None else {}),
        )
        for row, reply in zip(rows, output[:, width:].tolist(), strict=True):
            ended = next((index for index, token in enumerate(reply) if token in prompt.stop_ids), None)
            text, tokens, stopped = _until_stop(tokenizer, reply[:ended], stops)
            yield Reply(text.strip(), tokens, ended is not None or stopped, row.context_tokens_cut)


class _AtText(StoppingCriteria):
    """Ends a row once its answer has one of some texts.

    transformers' own criterion composes texts from the vocabulary: it also ends at what only looks like a special token's text, and counts
    the question's last characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], width: int) -> None:
        self._tokenizer, self._stops, self._width = tokenizer, stops, width
        # A token has at least one byte; some more at the start, because decoders strip white space there.
        self._window = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> Any:
        start = max(self._width, input_ids.shape[1] - self._window)
        texts = self._tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=False)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _until_stop(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> tuple[str, int, bool]:
    """The text before the first stop string, how many tokens it took to get there, and whether there is one."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not stops:
        return text, len(ids), False

    def stopped(count: int) -> bool:
        # Special tokens count: one of them may be the stop string.
        return any(stop in tokenizer.decode(ids[:count], skip_special_tokens=False) for stop in stops)

    if not stopped(len(ids)):
        return text, len(ids), False
    count = bisect.bisect_left(range(len(ids)), True, key=stopped)
    text = str(tokenizer.decode(ids[:count], skip_special_tokens=True))
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))], count, True


def hold_back(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to its first stop string; what could be the start of one waits for the next piece."""
    text = ""
    for piece in pieces:
        text += piece
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            yield text[: min(places)]
            for _ in pieces:  # the model has ended too
                pass
            return
        waiting = max(
            (
                count
                for stop in stops
                for count in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:count])
            ),
            default=0,
        )
        yield text[: len(text) - waiting]
        text = text[len(text) - waiting :]
    yield text


def _too_long(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    generation: GenerationConfig,
    positions: int,
    question: str,
    more: dict[str, Any],
) -> str:
    """Why a question does not fit: because of its own length, or because of the room that its answer is given."""
    most = generation.max_new_tokens or 0
    shown = repr(question if len(question) <= 60 else f"{question[:60]}...")
    [whole] = prompt.encode(tokenizer, [question], max_length=positions - 1, **more)
    if whole is None:
        return f"question is too long for the model ({positions:,} positions): {shown}"
    # The material counts as cut: only what must stay is in the way.
    more = more | {"materials": None, "histories": None}
    [least] = prompt.encode(tokenizer, [question], **more)
    assert least is not None
    taken = len(least.input_ids)
    return (
        f"generation.max_new_tokens={most} leaves {positions - most:,} of the model's {positions:,} positions for the question, which "
        f"takes {taken:,} tokens with its prompt: lower it to at most {positions - taken:,}: {shown}"
    )
