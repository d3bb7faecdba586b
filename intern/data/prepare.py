"""conf/data -> the rows that a run trains on and is scored on: found, checked, and tokenized."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from intern.config.build import build
from intern.data.chat_template import TEMPLATE_FILE
from intern.data.files import DataFile
from intern.data.formats import AUTO
from intern.data.prompt import Prompt
from intern.data.settings import DataConfig, resolved
from intern.data.sources import RowSet, Source, absolute, locate, read_sources
from intern.data.split import hold_out
from intern.data.tokenize import Tokenized, tokenize
from intern.paths import find


@dataclass(frozen=True)
class Located:
    """What conf/data names: everything is there, nothing is read yet."""

    data: DataConfig  # without any `auto`
    train: list[Source]
    golden: list[Source]

    def read(self) -> tuple[RowSet, RowSet | None]:
        """Read and check the training rows and the golden rows.

        Raises:
            UserError: naming file and row, if one is not as it must be.
            RunError: the cache cannot be written.
        """
        data = self.data
        train = read_sources(self.train, data, training=True)
        if data.eval_share:
            rows, held = hold_out(train.rows, data.eval_share, data.seed)
            part = f"{data.eval_share} seed {data.seed}"
            golden = replace(train, rows=held, name=f"held-out rows of {train.name}", part=f"held out: {part}")
            return replace(train, rows=rows, part=f"without held out: {part}"), golden
        return train, read_sources(self.golden, data, training=False) if self.golden else None


@dataclass(frozen=True)
class Prepared:
    """Training and golden rows as texts and as tokens."""

    data: DataConfig
    train: RowSet
    train_tokens: Tokenized
    golden: RowSet | None
    golden_tokens: Tokenized | None

    @property
    def files(self) -> list[DataFile]:
        """The data files that the run depends on."""
        golden = self.golden if not self.data.eval_share else None
        return [*self.train.files, *(golden.files if golden is not None else ())]

    @property
    def found(self) -> str:
        """What was detected: "train.jsonl: 1,166 rows, qa (question, answer)", one line for a person."""
        parts = [f"{self.train.name}: {len(self.train.rows):,} rows, {'; '.join(self.train.formats)}"]
        if self.golden is not None:
            parts.append(f"{self.golden.name}: {len(self.golden.rows):,} golden rows")
        return "; ".join(parts)

    @property
    def values(self) -> dict[str, Any]:
        """The values of conf/data as the run directory stores them: no `auto`, and paths that mean the same everywhere."""
        values: dict[str, Any] = {
            "train_file": _names(self.train.files),
            "eval_file": None if self.data.eval_share or self.golden is None else _names(self.golden.files),
            "context": self.data.context,
            "system_prompt": self.data.system_prompt,
        }
        if self.data.weights is not None:  # one weight per entry, whatever a glob has become
            values["train_file"] = [absolute(name) for name in self.data.train_files]
        if self.data.chat_template is not None and self.data.chat_template.endswith(TEMPLATE_FILE):
            values["chat_template"] = str(find(self.data.chat_template))
        return values


def located(data: DataConfig) -> Located:
    """Find what conf/data names, without reading it.

    Raises:
        UserError: a file that is not there, or values that contradict each other.
    """
    data = resolved(data)
    return Located(data, locate(data.train_files, "data.train_file"), locate(data.eval_files, "data.eval_file"))


def golden_rows(values: Mapping[str, Any], eval_file: str | None, needs_context: bool) -> RowSet | None:
    """Read the golden rows of a finished run: its file's, or those that it held out of its training rows.

    Args:
        values: conf/data as the run stores it.
        eval_file: another golden file, whose format is detected unless the run's columns fit.
        needs_context: whether every row must have a context.

    Raises:
        UserError: a file that is gone, or a row that is not as it must be.
    """
    data = _stored(values, needs_context)
    if eval_file is not None:
        data = replace(data, eval_file=eval_file, eval_share=0.0, format=AUTO, columns=None)
        return read_sources(locate([eval_file], "eval_file"), data, training=False)
    return located(data).read()[1] if data.evaluates else None


def training_rows(values: Mapping[str, Any]) -> RowSet:
    """Read the rows that a finished run was trained on, without those that it held out.

    Args:
        values: conf/data as the run stores it.

    Raises:
        UserError: a file that is gone, or a row that is not as it must be.
    """
    found = located(replace(_stored(values, needs_context=False), eval_file=None))
    return found.read()[0]


def _stored(values: Mapping[str, Any], needs_context: bool) -> DataConfig:
    return replace(build(DataConfig, dict(values), "data"), context="always" if needs_context else "never")


def prepare(found: Located, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int) -> Prepared:
    """Read, check and tokenize the training rows and the golden rows.

    Args:
        found: as `located` returns it.
        tokenizer: the model's.
        prompt: how a row is shown.
        max_length: the most tokens of a row.

    Raises:
        UserError: naming file and row, if a row is not as it must be, or no row fits.
        RunError: the cache cannot be written.
    """
    return tokenize_rows(found.data, *found.read(), tokenizer, prompt, max_length)


def tokenize_rows(
    data: DataConfig,
    train: RowSet,
    golden: RowSet | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_length: int,
) -> Prepared:
    """Tokenize rows that `Located.read` has read; the second half of `prepare`, for callers that need the rows without a tokenizer.

    Raises:
        UserError: no row fits.
        RunError: the cache cannot be written.
    """

    def tokens(rows: RowSet, scoring: bool) -> Tokenized:
        return tokenize(rows.rows, tokenizer, prompt, max_length, data.num_proc, rows.name, scoring, data.loss_on)

    train_tokens = tokens(train, scoring=False)
    golden_tokens = tokens(golden, scoring=True) if golden is not None else None
    return Prepared(data, train, train_tokens, golden, golden_tokens)


def _names(files: tuple[DataFile, ...]) -> str | list[str]:
    names = [str(file.path) for file in files]
    return names[0] if len(names) == 1 else names
