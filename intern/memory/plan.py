"""What fits into a GPU's memory, decided on measured peaks: how many layers keep their activations, and what to change where nothing does."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from intern.units import GIB

_MARGIN = 0.06  # of the memory: fragmentation, and what evaluation and libraries take beside the measured step
_FEW = (0, 2, 4)  # kept layers that are tried before their cost is known
_SHORTEST = 256  # tokens to which rows are cut in search of what fits


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided: `checkpointed` of `layers` decoder layers recompute; the worst step then peaks at `peak` bytes of `budget`."""

    layers: int
    checkpointed: int
    peak: int
    budget: int
    offloaded: bool = False  # inputs of checkpointed layers wait in host memory
    attends_once: bool = False  # and so do results of attention, which is not computed again
    tiled: bool = False  # MLPs take rows in pieces
    unpacked: int = 0  # bytes of weights that are held unpacked as well
    replayed: bool = False  # decoder layers are replayed as CUDA graphs
    cudnn: bool = False  # packed rows are attended with cuDNN's kernel, where there is one
    tokens: int = 0  # of the largest batch; smaller ones keep more layers where this is known

    def kept(self, tokens: int) -> int:
        """How many layers keep their activations in a batch of so many tokens: as many as take what the largest batch's take."""
        kept = self.layers - self.checkpointed
        # A graph is recorded for one number of them.
        return min(self.layers, kept * self.tokens // tokens) if self.tokens and not self.replayed else kept

    def __str__(self) -> str:
        varies = self.tokens and not self.replayed and 0 < self.checkpointed < self.layers
        return (
            f"activation checkpointing on {'up to ' if varies else ''}{self.checkpointed} of {self.layers} layers"
            + (
                f", their inputs{' and attention' if self.attends_once else ''} in host memory"
                if self.offloaded
                else ""
            )
            + (", MLPs in pieces" if self.tiled else "")
            + (f", {self.unpacked / GIB:.1f} GiB for unpacked weights" if self.unpacked else "")
            + (", replayed as CUDA graphs" if self.replayed else "")
            + (", cuDNN's attention" if self.cudnn else "")
            + (
                f": the largest batch peaks at {self.peak / GIB:.1f} GiB of {self.budget / GIB:.1f}"
                if self.peak
                else ""
            )
        )


def plan(layers: int, budget: int, peak_of: Callable[[int], int | None]) -> MemoryPlan | None:
    """The fewest checkpointed layers that fit; None where it does not even fit with every layer checkpointed.

    Args:
        layers: how many decoder layers there are.
        budget: bytes that the run may take.
        peak_of: runs the worst step with so many layers kept (not checkpointed); its peak in bytes, None where memory ran out.
    """
    most = usable(budget)

    def fits(kept: int) -> int | None:
        peak = peak_of(kept)
        return peak if peak is not None and peak <= most else None

    if (whole := fits(layers)) is not None:
        return MemoryPlan(layers, 0, whole, budget)
    fitting: list[tuple[int, int]] = []  # kept layers, and the peak with them
    for kept in sorted({min(few, layers) for few in _FEW}):
        if (peak := fits(kept)) is None:
            break
        fitting.append((kept, peak))
    if not fitting:
        return None
    if len(fitting) == len(_FEW):
        # The first kept layer takes the place of a recomputed one at the peak: what a layer costs shows from the second on.
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
    """What of `budget` a measured step may take."""
    return int(budget * (1 - _MARGIN))


def smallest_change(
    batch: list[dict[str, Any]], fits: Callable[[list[dict[str, Any]]], bool], args: TrainingArguments
) -> str:
    """What makes a batch fit that does not, tried: fewer rows, then shorter ones."""
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
    while length > _SHORTEST:
        length = length * 3 // 4
        if fits([_cut(batch[0], length)]):
            return f"trainer.max_length={length} with trainer.per_device_train_batch_size=1 was tried and fits"
    return "take a smaller model, or a card with more memory"


def _cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    """The first tokens of a row, or of a pack of rows."""
    short = {name: values[:length] for name, values in row.items() if len(values) == len(row["input_ids"])}
    if "seq_lengths" in row:
        ends = [min(end, length) for end in itertools.accumulate(row["seq_lengths"])]
        short["seq_lengths"] = [end - start for start, end in itertools.pairwise([0, *ends]) if end > start]
    return short
