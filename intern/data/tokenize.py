"""Checked rows -> token ids and labels, in parallel if there are many, cached by content."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from intern.data.files import quiet, writing_the_cache
from intern.data.prompt import LossOn, Prompt
from intern.data.truncation import RULE
from intern.display.progress import LONG_DATA
from intern.errors import UserError

log = logging.getLogger(__name__)

_TOKENS = Features(
    {
        "row": Value("int64"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "cut": Value("int32"),
        "turns": Value("int32"),
        "turns_cut": Value("int32"),
    }
)
_FORM = 2  # of cached tokens: raised with every change of how rows are rendered that no other part of the key shows
_ROWS_PER_PROCESS = 20_000  # below this a process costs more than it saves
_BATCH = 1_000  # rows tokenized at a time
_NAMED = 5  # rows that a warning names


@dataclass(frozen=True)
class Tokenized:
    """Rows as the model sees them (input_ids, labels), and what had to go so that they fit."""

    rows: Dataset
    origins: Dataset  # of each row: its number, the tokens of context and the turns that it lost, the answers with loss
    dropped: list[int]  # rows too long even without their context and earlier turns
    shortened: int  # rows that lost the end of their context
    lost_turns: int = 0  # rows that lost the start of their conversation


def tokenize(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_length: int,
    num_proc: int | None,
    name: str = "rows",
    scoring: bool = False,
    loss_on: LossOn = "all",
) -> Tokenized:
    """Render and tokenize rows.

    Args:
        rows: as `read_rows` returns them.
        tokenizer: the model's.
        prompt: how a row is shown.
        max_length: the most tokens of a row; intern/data/truncation.py says what goes from a longer one.
        num_proc: processes; None: by the number of rows.
        name: what messages call the rows.
        scoring: whether the rows are golden rows, which are shown with their context wherever the model may be asked so.
        loss_on: "all" answers of a conversation carry loss, or the "last" one only.

    Raises:
        UserError: not one row fits into max_length tokens.
        RunError: the cache cannot be written.
    """
    workers = num_proc or max(1, min(os.cpu_count() or 1, len(rows) // _ROWS_PER_PROCESS))

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        shown = zip(batch["question"], batch["chunk_text"], strict=True)
        contexts = [
            context if (prompt.scores_with_material if scoring else prompt.trains_with_material(question)) else None
            for question, context in shown
        ]
        encoded = prompt.encode(
            tokenizer,
            batch["question"],
            batch["answer"],
            contexts,
            max_length,
            histories=[turns(history) for history in batch["history"]],
            systems=batch["system"],
            loss_on=loss_on,
        )
        kept = [(row, one) for row, one in zip(batch["row"], encoded, strict=True) if one is not None]
        return {
            "row": [row for row, _ in kept],
            "input_ids": [one.input_ids for _, one in kept],
            "labels": [one.labels for _, one in kept],
            "cut": [one.context_tokens_cut for _, one in kept],
            "turns": [one.turns for _, one in kept],
            "turns_cut": [one.turns_cut for _, one in kept],
        }

    key = [rows._fingerprint, prompt.to_json(), identity(tokenizer), max_length, scoring, loss_on, RULE, _FORM]
    with quiet(len(rows) < LONG_DATA), writing_the_cache():
        tokens = rows.map(
            encode,
            batched=True,
            batch_size=_BATCH,
            remove_columns=rows.column_names,
            features=_TOKENS,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32],
            desc=f"tokenizing {name}",
        )
    dropped: list[int] = []
    if len(tokens) < len(rows):
        kept = set(tokens["row"])
        dropped = [row for row in rows["row"] if row not in kept]
    if not len(tokens):
        raise UserError(f"trainer.max_length={max_length}: no row of {name} fits into so few tokens: raise it")
    shortened = sum(1 for cut in tokens["cut"] if cut)
    lost_turns = sum(1 for cut in tokens["turns_cut"] if cut)
    _report(name, max_length, dropped, shortened, lost_turns)
    origins = tokens.select_columns(["row", "cut", "turns", "turns_cut"])
    return Tokenized(tokens.select_columns(["input_ids", "labels"]), origins, dropped, shortened, lost_turns)


def turns(history: list[dict[str, str]] | None) -> list[tuple[str, str]]:
    """A row's `history` as `Prompt.encode` takes it."""
    return [(turn["question"], turn["answer"]) for turn in history or ()]


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what makes two tokenizers give the same ids: their vocabulary, merges and rules."""
    backend = (
        tokenizer.backend_tokenizer.to_str()
        if hasattr(tokenizer, "backend_tokenizer")
        else repr(sorted(tokenizer.get_vocab().items()))
    )
    return hashlib.sha256(backend.encode()).hexdigest()


def _report(name: str, max_length: int, dropped: list[int], shortened: int, lost_turns: int) -> None:
    if dropped:
        named = ", ".join(map(str, dropped[:_NAMED])) + (", ..." if len(dropped) > _NAMED else "")
        log.warning(
            "%s: %d rows dropped, longer than trainer.max_length=%d even without context: rows %s",
            name,
            len(dropped),
            max_length,
            named,
        )
    if shortened:
        log.warning(
            "%s: %d rows lost the end of their context to fit into trainer.max_length=%d", name, shortened, max_length
        )
    if lost_turns:
        log.warning(
            "%s: %d rows lost the oldest turns of their conversation to fit into trainer.max_length=%d",
            name,
            lost_turns,
            max_length,
        )
