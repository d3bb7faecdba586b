"""Measured peaks -> a memory plan: how many layers keep their activations, and what to change if no plan fits."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from intern.units import GIB

_MARGIN = 0.06  # fraction of the budget: fragmentation, and what evaluation and libraries need in addition to the measured step
_FREE_BEFORE_UNPACKING = (
    0.1  # fraction of the budget that stays free before weights are dequantized; with less the allocator searches
)
LONG_ROW_TOKENS = 2048  # average length from which storing attention's results costs less than computing them again
_FIRST_TRIES = (0, 2, 4)  # kept layers that are tried before their cost is known
_SHORTEST_ROW_TOKENS = 256  # to which rows are cut in search of what fits


@dataclass(frozen=True)
class MemoryPlan:
    """What a run gives up to fit into GPU memory. Stored in memory.json (intern/memory/stored_plan.py).

    Args:
        layers: decoder layers of the model.
        checkpointed: how many of them recompute their activations in the largest batch.
        peak: bytes at the peak of a step on the largest batch; 0 if it was not measured.
        budget: bytes that the run may use; 0 if it was not measured.
        offloaded: inputs of checkpointed layers are in host memory.
        attends_once: and so are results of attention, which are not computed again.
        tiled: MLPs are computed in chunks of tokens.
        unpacked: bytes of weights that are stored dequantized as well.
        replayed: decoder layers are replayed as CUDA graphs.
        cudnn: packed rows use cuDNN's attention kernel, if there is one.
        tokens: of the largest batch; if known, smaller ones keep more layers.
    """

    layers: int
    checkpointed: int
    peak: int
    budget: int
    offloaded: bool = False
    attends_once: bool = False
    tiled: bool = False
    unpacked: int = 0
    replayed: bool = False
    cudnn: bool = False
    tokens: int = 0

    def kept(self, tokens: int) -> int:
        """Return how many layers keep their activations in a batch of `tokens` tokens.

        As many as need the memory that the largest batch's kept layers need.
        """
        kept = self.layers - self.checkpointed
        # A CUDA graph is recorded for one number of kept layers.
        return min(self.layers, kept * self.tokens // tokens) if self.tokens and not self.replayed else kept

    def __str__(self) -> str:
        varies = self.tokens and not self.replayed and 0 < self.checkpointed < self.layers
        offloaded = f", their inputs{' and attention' if self.attends_once else ''} in host memory"
        parts = (
            f"activation checkpointing on {'up to ' if varies else ''}{self.checkpointed} of {self.layers} layers",
            offloaded if self.offloaded else "",
            ", tiled MLPs" if self.tiled else "",
            f", {self.unpacked / GIB:.1f} GiB for dequantized weights" if self.unpacked else "",
            ", replayed as CUDA graphs" if self.replayed else "",
            ", cuDNN's attention" if self.cudnn else "",
            f": the largest batch peaks at {self.peak / GIB:.1f} GiB of {self.budget / GIB:.1f}" if self.peak else "",
        )
        return "".join(parts)


def fewest_checkpointed_layers(layers: int, budget: int, peak_of: Callable[[int], int | None]) -> MemoryPlan | None:
    """Find the plan with the fewest checkpointed layers that fits.

    Args:
        layers: decoder layers of the model.
        budget: bytes that the run may use.
        peak_of: runs the largest step with that many layers kept (not checkpointed) and returns its peak in bytes, or None if
            memory ran out.

    Returns:
        The plan, or None if the step does not even fit with every layer checkpointed.
    """
    most = usable(budget)

    def fits(kept: int) -> int | None:
        peak = peak_of(kept)
        return peak if peak is not None and peak <= most else None

    if (whole := fits(layers)) is not None:
        return MemoryPlan(layers, 0, whole, budget)
    fitting: list[tuple[int, int]] = []  # kept layers, and the peak with them
    for kept in sorted({min(few, layers) for few in _FIRST_TRIES}):
        if (peak := fits(kept)) is None:
            break
        fitting.append((kept, peak))
    if not fitting:
        return None
    if len(fitting) == len(_FIRST_TRIES):
        # The first kept layer replaces a recomputed one at the peak, so the cost of a layer shows from the second one on.
        (few, first), (more, second) = fitting[1:]
        cost = max((second - first) // (more - few), 1)
        wanted = min(layers - 1, more + (most - second) // cost)
        while wanted > more and (peak := fits(wanted)) is None:
            wanted -= max(1, layers // 16)
        if wanted > more and peak is not None:
            fitting.append((wanted, peak))
    kept, last = fitting[-1]
    return MemoryPlan(layers, layers - kept, last, budget)


def usable(budget: int) -> int:
    """Return the bytes of `budget` that a measured step may use."""
    return int(budget * (1 - _MARGIN))


def room_for_unpacked(budget: int, peak: float) -> int:
    """Return the bytes that dequantized weights may take next to a step's peak; negative if there is none."""
    return usable(budget) - int(_FREE_BEFORE_UNPACKING * budget) - int(peak)


def smallest_change(
    batch: list[dict[str, Any]], fits: Callable[[list[dict[str, Any]]], bool], args: TrainingArguments
) -> str:
    """Find what makes a batch fit by trying: fewer rows first, then shorter ones.

    Args:
        batch: rows that do not fit, the longest first.
        fits: whether rows fit.
        args: the run's, for its gradient_accumulation_steps.

    Returns:
        The remedy as text.
    """
    size = len(batch)
    while size > 1:
        size //= 2
        if fits(batch[:size]):
            steps = args.gradient_accumulation_steps * len(batch) // size
            return (
                f"trainer.per_device_train_batch_size={size} was tried and fits "
                f"(with trainer.gradient_accumulation_steps={steps} an optimizer step sees as many rows)"
            )
    length = len(batch[0]["input_ids"])
    while length > _SHORTEST_ROW_TOKENS:
        length = length * 3 // 4
        if fits([_cut(batch[0], length)]):
            return f"trainer.max_length={length} with trainer.per_device_train_batch_size=1 was tried and fits"
    return "take a smaller model, or a GPU with more memory"


def _cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    """Return the first `length` tokens of a row, or of a pack of rows."""
    short = {name: values[:length] for name, values in row.items() if len(values) == len(row["input_ids"])}
    if "seq_lengths" in row:
        ends = [min(end, length) for end in itertools.accumulate(row["seq_lengths"])]
        short["seq_lengths"] = [end - start for start, end in itertools.pairwise([0, *ends]) if end > start]
    return short
