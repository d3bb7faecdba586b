"""The batches of a run, before they come: the largest ones and a typical one."""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset

Rows = list[dict[str, Any]]


class RunBatches:
    """Batches that decide how much memory a run needs; finding them reads the lengths of all rows.

    Args:
        trainer: of its attributes, train_dataset, args, accelerator and padding_free are read.
        loader: the training batches.
        max_steps: optimizer steps of the run.
    """

    def __init__(self, trainer: Any, loader: Any, max_steps: int) -> None:
        self._trainer = trainer
        self._loader = loader
        self._max_steps = max_steps

    @functools.cached_property
    def largest(self) -> Rows:
        """The largest batch of the run; the one of the longest rows if the order of the rows is unknown."""
        args, processes = self._trainer.args, self._trainer.accelerator.num_processes
        coming = coming_batches(self._loader, self._max_steps * args.gradient_accumulation_steps * processes)
        padded = not self._trainer.padding_free
        return largest(self._trainer.train_dataset, args.per_device_train_batch_size, coming, padded)

    @functools.cached_property
    def longest_rows(self) -> Rows:
        """The largest batch that the rows could form, the longest row first."""
        return largest(self._trainer.train_dataset, self._trainer.args.per_device_train_batch_size)

    @functools.cached_property
    def typical(self) -> Rows:
        """A batch of rows of median length."""
        return typical(self._trainer.train_dataset, self._trainer.args.per_device_train_batch_size)


def count_tokens_and_rows(batch: Rows) -> tuple[int, int]:
    """Return the tokens of a batch and its rows; each row of a pack counts."""
    tokens = [len(row["input_ids"]) for row in batch]
    return sum(tokens), sum(len(row.get("seq_lengths") or [size]) for row, size in zip(batch, tokens, strict=True))


def largest(rows: Dataset, count: int, coming: Iterable[list[int]] = (), padded: bool = False) -> Rows:
    """Return the largest of the coming batches, its longest row first; if none is known, the `count` longest rows.

    Args:
        rows: tokenized rows, with input_ids.
        count: rows of a batch.
        coming: indices of the rows of each batch (`coming_batches`).
        padded: whether the rows of a batch are padded to its longest one.
    """
    lengths = _lengths(rows)

    def tokens(batch: list[int]) -> int:
        each = [lengths[index] for index in batch]
        return len(each) * max(each) if padded else sum(each)

    chosen = max(coming, key=tokens, default=None) or _by_length(lengths)[-count:]
    return [rows[index] for index in sorted(chosen, key=lengths.__getitem__, reverse=True)]


def typical(rows: Dataset, count: int) -> Rows:
    """Return `count` rows of median length."""
    first = max(0, (len(rows) - count) // 2)
    return [rows[index] for index in _by_length(_lengths(rows))[first : first + count]]


def coming_batches(loader: Any, count: int) -> Iterator[list[int]]:
    """Yield the indices of the rows of a run's first `count` batches, of all processes, up to the end of the epoch of the last one.

    Yields nothing if the order is drawn only when it is needed.
    """
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):  # one process's share
        sampler = sampler.batch_sampler
    order = sampler.sampler
    if not isinstance(order, SeedableRandomSampler):
        return
    now = order.epoch
    for epoch in range(math.ceil(count / len(sampler))):
        order.set_epoch(epoch)
        yield from sampler
    order.set_epoch(now)


def _lengths(rows: Dataset) -> list[int]:
    # As arrow arrays: ten times as fast as lists of tokens.
    tables: Any = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    return [length for table in tables for length in table["input_ids"].combine_chunks().value_lengths().to_pylist()]


def _by_length(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__)
