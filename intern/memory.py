"""A measured plan: how many decoder layers must recompute their activations so that the run fits into the GPU's memory.

Checkpointing every layer costs a third more arithmetic (the forward pass runs twice); a layer that keeps its activations saves its share.
So the largest real batch goes through forward and backward before the first step, with every layer checkpointed and with a few layers
kept, and as many layers are kept as the free memory allows; that plan is then tried too.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from intern.errors import RunError
from intern.run import Run

log = logging.getLogger(__name__)

_MARGIN = 0.06  # of the memory: fragmentation, and what evaluation and libraries take beside the measured step
_GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided: `checkpointed` of `layers` decoder layers recompute; the worst step then peaks at `peak` bytes of `budget`."""

    layers: int
    checkpointed: int
    peak: int
    budget: int

    def __str__(self) -> str:
        return (
            f"activation checkpointing on {self.checkpointed} of {self.layers} layers: "
            f"the largest batch peaks at {self.peak / _GIB:.1f} GiB of {self.budget / _GIB:.1f}"
        )


def plan(layers: int, budget: int, peak_of: Callable[[int], int | None]) -> MemoryPlan:
    """The fewest checkpointed layers that fit.

    Args:
        layers: how many decoder layers there are.
        budget: bytes that the run may take.
        peak_of: runs the worst step with so many layers kept (not checkpointed); its peak in bytes, None where memory ran out.

    Raises:
        RunError: it does not even fit with every layer checkpointed.
    """
    usable = int(budget * (1 - _MARGIN))
    least = peak_of(0)
    if least is None:
        raise RunError(
            f"the largest batch does not fit into {budget / _GIB:.1f} GiB even with every layer checkpointed: "
            "lower trainer.per_device_train_batch_size, then trainer.max_length"
        )
    kept, peak = 0, least
    # The first kept layer takes the place of a recomputed one at the peak: what a layer costs shows from the second on.
    few, more = min(2, layers), min(4, layers)
    first = peak_of(few)
    second = peak_of(more) if first is not None and first <= usable else None
    if first is not None and first <= usable:
        kept, peak = few, first
    if first is not None and second is not None and second <= usable:
        kept, peak = more, second
        cost = max((second - first) // max(more - few, 1), 1)
        wanted = min(layers, more + (usable - second) // cost)
        while wanted > more:
            measured = peak_of(wanted)
            if measured is not None and measured <= usable:
                kept, peak = wanted, measured
                break
            wanted -= max(1, layers // 16)
    return MemoryPlan(layers, layers - kept, peak, budget)


class FitMemory(TrainerCallback):
    """Makes the plan at the beginning of training, from the largest batches of the data, and puts it into effect.

    The run keeps it in memory.json: one that goes on from a checkpoint repeats it instead of measuring again.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trainer: Any = None  # set when it is built: it is built with its callbacks
        self.plan: MemoryPlan | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self.trainer.model_wrapped
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if (
            state.global_step and self.run.memory.is_file()
        ):  # what recomputes decides how sums round: a resume must not differ
            self.plan = MemoryPlan(**self.run.read_json(self.run.memory))
            _keep(layers, len(layers) - self.plan.checkpointed)
            log.info("%s, as before", self.plan)
            return
        batch = self._largest_batch(args.per_device_train_batch_size)
        # Optimizer states are not there yet: two 4-byte moments at most for each trainable parameter.
        states = 8 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        free, _ = torch.cuda.mem_get_info()
        cap = torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction()
        budget = int(min(cap, free + torch.cuda.memory_reserved())) - states

        def peak_of(kept: int) -> int | None:
            _keep(layers, kept)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                self.trainer.training_step(
                    model, dict(batch), num_items_in_batch=torch.tensor(1000, device=args.device)
                )
            except torch.cuda.OutOfMemoryError:
                return None
            finally:
                model.zero_grad()
            return torch.cuda.max_memory_allocated()

        with torch.random.fork_rng(devices=[0]):
            self.plan = plan(len(layers), budget, peak_of)
        _keep(layers, len(layers) - self.plan.checkpointed)
        self.trainer.forget_metrics()
        torch.cuda.empty_cache()
        self.run.write_json(self.run.memory, asdict(self.plan))
        log.info("%s", self.plan)

    def _largest_batch(self, size: int) -> dict[str, Any]:
        rows = self.trainer.train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        largest = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)[:size]
        return self.trainer.data_collator([rows[index] for index in largest])


def _keep(layers: list[GradientCheckpointingLayer], kept: int) -> None:
    """The last `kept` layers keep their activations: they are the first that the backward pass frees."""
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < len(layers) - kept
