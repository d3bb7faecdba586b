"""Training steps before training begins: what a batch takes in memory and time, without a trace in the run."""

import copy
import functools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset


class Probe:
    """Steps that leave no trace: forward, backward, optimizer and evaluation on a batch, before training begins."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.model = trainer.model_wrapped
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Without what accelerate puts around it: loss scaling would count these steps.
        self.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)

    @functools.cached_property
    def budget(self) -> int:
        """Bytes that this process may take: its cap, and what others leave of the card."""
        free, total = torch.cuda.mem_get_info()
        cap = total * torch.cuda.get_per_process_memory_fraction()
        return int(min(cap, free + torch.cuda.memory_reserved()))

    @functools.cached_property
    def _largest_golden(self) -> list[dict[str, Any]]:
        return largest(self.trainer.eval_dataset, self.trainer.args.per_device_eval_batch_size)

    def __enter__(self) -> None:
        self._rng = torch.random.fork_rng(devices=list(range(torch.cuda.device_count())))
        self._rng.__enter__()
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self.trained]
        self._states = copy.deepcopy(self.optimizer.state_dict())  # none yet, unless the run goes on

    def __exit__(self, *failure: Any) -> None:
        for parameter, weight in zip(self.trained, self._weights, strict=True):
            parameter.data.copy_(weight)
        self.model.zero_grad()
        self.optimizer.state.clear()
        if self._states["state"]:
            self.optimizer.load_state_dict(self._states)
        self._rng.__exit__(*failure)
        self.trainer.forget_metrics()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the run's peak is not that of what was tried

    def peak(self, rows: list[dict[str, Any]]) -> int | None:
        """Bytes at the peak of a step on these rows; None where memory ran out."""
        try:
            self._whole_step(rows)
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            self.model.zero_grad()
        return torch.cuda.max_memory_allocated()

    def held(self, rows: list[dict[str, Any]]) -> int:
        """Bytes that a step holds: what CUDA graphs keep for their next replay counts here, and not as allocated."""
        self._whole_step(rows)
        return torch.cuda.max_memory_reserved()

    def timed(self, rows: list[dict[str, Any]]) -> tuple[float, float]:
        """The seconds that forward and backward of these rows take, and the loss (its scale is not a run's)."""
        torch.cuda.synchronize()
        start = time.monotonic()
        loss = self._pass(rows)
        torch.cuda.synchronize()
        return time.monotonic() - start, loss

    def _whole_step(self, rows: list[dict[str, Any]]) -> None:
        """With an evaluation after it; peaks count from its beginning."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._step(rows)
        self._evaluate()

    def _step(self, rows: list[dict[str, Any]]) -> None:
        if (
            not self.optimizer.state
        ):  # it is there from a run's second step on, and so are gradients from its second batch on
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        self._pass(rows)
        self.optimizer.step()

    def _pass(self, rows: list[dict[str, Any]]) -> float:
        tokens = torch.tensor(1000, device=self.trainer.args.device)
        return float(
            self.trainer.training_step(self.model, self.trainer.data_collator(rows), num_items_in_batch=tokens)
        )

    def _evaluate(self) -> None:
        if self.trainer.eval_dataset is None:
            return
        batch = self.trainer.data_collator(self._largest_golden)
        self.model.eval()
        try:
            self.trainer.prediction_step(self.model, batch, prediction_loss_only=True)
        finally:
            self.model.train()


def largest(rows: Dataset, count: int, coming: Iterable[list[int]] = (), padded: bool = False) -> list[dict[str, Any]]:
    """The largest of the batches that come, its longest row first; where none is known, the longest rows, as many as a batch has.

    Args:
        rows: of which batches are made.
        count: rows of a batch.
        coming: the rows of each batch, see `coming_batches`.
        padded: whether a batch's rows are filled up to its longest one.
    """
    lengths = _lengths(rows)

    def tokens(batch: list[int]) -> int:
        each = [lengths[index] for index in batch]
        return len(each) * max(each) if padded else sum(each)

    chosen = max(coming, key=tokens, default=None) or _by_length(lengths)[-count:]
    return [rows[index] for index in sorted(chosen, key=lengths.__getitem__, reverse=True)]


def usual(rows: Dataset, count: int) -> list[dict[str, Any]]:
    """Rows of middle length, as many as a batch has."""
    first = max(0, (len(rows) - count) // 2)
    return [rows[index] for index in _by_length(_lengths(rows))[first : first + count]]


def coming_batches(loader: Any, count: int) -> Iterator[list[int]]:
    """The rows of a run's first `count` batches, all processes' together, and of those after them to the end of their epoch.

    None where the order is drawn only when it is asked for.
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
    # As arrays: ten times as fast as lists of tokens.
    tables: Any = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    return [length for table in tables for length in table["input_ids"].combine_chunks().value_lengths().to_pylist()]


def _by_length(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__)
