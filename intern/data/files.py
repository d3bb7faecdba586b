"""conf/data -> datasets of token ids and labels, read row by row so that a fault is named by file and row."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from intern.data.prompt import Prompt
from intern.errors import UserError
from intern.paths import find

log = logging.getLogger(__name__)

_REQUIRED = ("question", "answer")
_OPTIONAL = ("chunk_text", "chunk_id", "topic")
_ROW = Features(
    {"row": Value("int64"), "seen_chunk": Value("bool")} | {name: Value("string") for name in (*_REQUIRED, *_OPTIONAL)}
)
_TOKENS = Features(
    {"row": Value("int64"), "input_ids": List(Value("int32")), "labels": List(Value("int32")), "cut": Value("int32")}
)
_FORM = 1  # of cached rows and tokens: raised with every change of how they are checked or rendered
_ROWS_PER_PROCESS = 20_000  # below this a process costs more than it saves
_LONGEST_ROW = 2**24  # bytes of a line: far more than any model's positions
_LONG_FILE = 2**25  # bytes from which reading is worth a progress bar
_NAMED = 5  # rows that a warning names


@dataclass(frozen=True)
class DataFile:
    """A JSONL file and the SHA-256 of its content, which names it in caches and in the run's environment.json."""

    path: Path
    sha256: str

    @classmethod
    def find(cls, path: str, key: str) -> "DataFile":
        """Raises UserError, naming the config key, where there is no such file."""
        found = find(path)
        if found is None or not found.is_file():
            raise UserError(f"{key}={path}: no such file, neither in the working directory nor in the project")
        with found.open("rb") as file:
            return cls(found, hashlib.file_digest(file, "sha256").hexdigest())


def read_rows(file: DataFile, needs_material: bool) -> Dataset:
    """The rows of a JSONL file, checked, memory-mapped, and cached by content.

    Args:
        needs_material: whether every row must have a chunk_text (data.context is always or mixed).

    Returns:
        A dataset of row (1 for the file's first line), question, answer, chunk_text, chunk_id, topic and seen_chunk (None where absent).

    Raises:
        UserError: a line that is not a JSON object, a field that is missing, empty or not text, or no row at all.
    """
    quiet, bars = datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity_error()
    if file.path.stat().st_size < _LONG_FILE:
        datasets.disable_progress_bars()
    try:
        arguments = {"path": str(file.path), "sha256": file.sha256, "needs_material": needs_material, "form": _FORM}
        rows = Dataset.from_generator(_checked_rows, features=_ROW, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    finally:
        datasets.utils.logging.set_verbosity(quiet)
        if not bars:
            datasets.enable_progress_bars()
    return rows


def _checked_rows(path: str, sha256: str, needs_material: bool, form: int) -> Iterator[dict[str, Any]]:
    """All rows of a file; sha256 and form only make the key of the cache."""
    empty = True
    with Path(path).open("rb") as file:
        lines = iter(lambda: file.readline(_LONGEST_ROW + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > _LONGEST_ROW:
                raise UserError(f"{path}:{number}: longer than {_LONGEST_ROW >> 20} MiB: each line holds one row")
            if line.strip():
                empty = False
                yield {"row": number} | checked_row(line, f"{path}:{number}", needs_material)
    if empty:
        raise UserError(f"{path}: has no rows: one JSON object with question and answer on each line")


def checked_row(line: bytes, place: str, needs_material: bool) -> dict[str, Any]:
    """The fields of one line; UserError, beginning with `place`, where one is not as it must be."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}): each line holds one JSON object") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: a JSON {type(row).__name__}, not an object with question and answer")
    required = (*_REQUIRED, "chunk_text") if needs_material else _REQUIRED
    for name in required:
        if name not in row or row[name] is None:
            reason = " (data.context shows it; data.context=never does without)" if name == "chunk_text" else ""
            raise UserError(f"{place}: field {name!r} is missing{reason}")
        if isinstance(row[name], str) and not row[name].strip():
            raise UserError(f"{place}: field {name!r} is empty")
    for name in (*_REQUIRED, *_OPTIONAL):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise UserError(f"{place}: field {name!r} is {type(row[name]).__name__}, not text")
        if "\x00" in (row.get(name) or "") or any("\ud800" <= c <= "\udfff" for c in row.get(name) or ""):
            raise UserError(f"{place}: field {name!r} has a character that is no text (NUL or half a surrogate pair)")
    if not isinstance(row.get("seen_chunk") or False, bool):
        raise UserError(f"{place}: field 'seen_chunk' is {type(row['seen_chunk']).__name__}, not true or false")
    return {name: row.get(name) for name in (*_REQUIRED, *_OPTIONAL, "seen_chunk")}


@dataclass(frozen=True)
class Tokenized:
    """Rows as the model sees them (input_ids, labels), and what had to go so that they fit."""

    rows: Dataset
    origins: Dataset  # of each of them: row, its line in the file, and cut, the tokens of material that it lost
    dropped: list[int]  # rows too long even without their material
    shortened: int  # rows that lost the end of their material


def tokenize(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_length: int,
    num_proc: int | None,
    name: str = "rows",
    scoring: bool = False,
) -> Tokenized:
    """Renders and tokenizes rows, in parallel where there are many; cached by content.

    Raises:
        UserError: not one row fits into max_length tokens.
    """
    workers = num_proc or max(1, min(os.cpu_count() or 1, len(rows) // _ROWS_PER_PROCESS))

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        shown = zip(batch["question"], batch["chunk_text"], strict=True)
        materials = [
            material if (prompt.scores_with_material if scoring else prompt.trains_with_material(question)) else None
            for question, material in shown
        ]
        encoded = prompt.encode(tokenizer, batch["question"], batch["answer"], materials, max_length)
        kept = [(row, one) for row, one in zip(batch["row"], encoded, strict=True) if one is not None]
        return {
            "row": [row for row, _ in kept],
            "input_ids": [one.input_ids for _, one in kept],
            "labels": [one.labels for _, one in kept],
            "cut": [one.context_tokens_cut for _, one in kept],
        }

    key = json.dumps([rows._fingerprint, prompt.to_json(), _identity(tokenizer), max_length, scoring, _FORM])
    tokens = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        features=_TOKENS,
        num_proc=workers if workers > 1 else None,
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        desc=f"tokenizing {name}",
    )
    dropped: list[int] = []
    if len(tokens) < len(rows):
        kept = set(tokens["row"])
        dropped = [row for row in rows["row"] if row not in kept]
    if not len(tokens):
        raise UserError(f"trainer.max_length={max_length}: no row of {name} fits into so few tokens: raise it")
    if dropped:
        named = ", ".join(map(str, dropped[:_NAMED])) + (", ..." if len(dropped) > _NAMED else "")
        log.warning(
            "%s: %d rows dropped, longer than trainer.max_length=%d even without material: rows %s",
            name,
            len(dropped),
            max_length,
            named,
        )
    shortened = sum(1 for cut in tokens["cut"] if cut)
    if shortened:
        log.warning(
            "%s: %d rows lost the end of their material to fit into trainer.max_length=%d", name, shortened, max_length
        )
    origins = tokens.select_columns(["row", "cut"])
    return Tokenized(tokens.select_columns(["input_ids", "labels"]), origins, dropped, shortened)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes two tokenizers give the same ids: their vocabulary, merges and rules."""
    backend = (
        tokenizer.backend_tokenizer.to_str()
        if hasattr(tokenizer, "backend_tokenizer")
        else repr(sorted(tokenizer.get_vocab().items()))
    )
    return hashlib.sha256(backend.encode()).hexdigest()
