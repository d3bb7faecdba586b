"""A measured plan: how many decoder layers must recompute their activations so that the run fits into the GPU's memory.

Checkpointing every layer costs a third more arithmetic (the forward pass runs twice); a layer that keeps its activations saves its share.
So the largest real batch goes through forward and backward before the first step, with every layer checkpointed and with a few layers
kept, and as many layers are kept as the free memory allows; that plan is then tried too. Where not even all layers are enough, their
inputs wait in host memory, and then MLPs take rows in pieces. Memory that runs out later makes the plan safer and repeats the step.
"""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from intern.errors import RunError
from intern.offload import offload_inputs, tile_mlps
from intern.run import Run

log = logging.getLogger(__name__)

_MARGIN = 0.06  # of the memory: fragmentation, and what evaluation and libraries take beside the measured step
_PIECE = 8192  # tokens that an MLP takes at a time where rows go in pieces
_GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided: `checkpointed` of `layers` decoder layers recompute; the worst step then peaks at `peak` bytes of `budget`."""

    layers: int
    checkpointed: int
    peak: int
    budget: int
    offloaded: bool = False  # inputs of checkpointed layers wait in host memory
    tiled: bool = False  # MLPs take rows in pieces

    def __str__(self) -> str:
        return (
            f"activation checkpointing on {self.checkpointed} of {self.layers} layers"
            + (", their inputs in host memory" if self.offloaded else "")
            + (", MLPs in pieces" if self.tiled else "")
            + f": the largest batch peaks at {self.peak / _GIB:.1f} GiB of {self.budget / _GIB:.1f}"
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
    usable = _usable(budget)
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


def _usable(budget: int) -> int:
    return int(budget * (1 - _MARGIN))


class FitMemory(TrainerCallback):
    """Makes the plan at the beginning of training, from the largest batches of the data, and puts it into effect.

    The run keeps it in memory.json: one that goes on from a checkpoint repeats it instead of measuring again.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trainer: Any = None  # set when it is built: it is built with its callbacks
        self.plan: MemoryPlan | None = None
        self._layers: list[GradientCheckpointingLayer] = []
        self._seconds = 0.0  # of the last batch that was tried

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self.trainer.model_wrapped
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        # What recomputes decides how sums round: a run that goes on must not differ.
        if state.global_step and self.run.memory.is_file():
            self.plan = MemoryPlan(**self.run.read_json(self.run.memory))
            if self.plan.offloaded:
                offload_inputs(self._layers)
            if self.plan.tiled:
                tile_mlps(self._layers, _PIECE)
            self._keep(self.plan.layers - self.plan.checkpointed)
            self.trainer.step_back = self.step_back
            log.info("%s, as before", self.plan)
            return
        batch = self._largest_batch(args.per_device_train_batch_size)
        # Optimizer states are not there yet: two 4-byte moments at most for each trainable parameter.
        states = 8 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        free, _ = torch.cuda.mem_get_info()
        cap = torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction()
        budget = int(min(cap, free + torch.cuda.memory_reserved())) - states

        @functools.cache
        def peak_of(kept: int) -> int | None:
            self._keep(kept)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = time.monotonic()
            try:
                self.trainer.training_step(
                    model, dict(batch), num_items_in_batch=torch.tensor(1000, device=args.device)
                )
                torch.cuda.synchronize()
            except torch.cuda.OutOfMemoryError:
                return None
            finally:
                model.zero_grad()
            self._seconds = time.monotonic() - start
            return torch.cuda.max_memory_allocated()

        offloaded = tiled = False
        with torch.random.fork_rng(devices=[0]):
            while ((least := peak_of(0)) is None or least > _usable(budget)) and not tiled:
                if offloaded:
                    tile_mlps(self._layers, _PIECE)
                    tiled = True
                else:
                    offload_inputs(self._layers)
                    offloaded = True
                peak_of.cache_clear()
            self.plan = replace(plan(len(self._layers), budget, peak_of), offloaded=offloaded, tiled=tiled)
        self._keep(self.plan.layers - self.plan.checkpointed)
        self.trainer.forget_metrics()
        self.trainer.step_back = self.step_back
        torch.cuda.empty_cache()
        self.run.write_json(self.run.memory, asdict(self.plan))
        tokens = sum(len(row) for row in batch["input_ids"])
        left = (state.max_steps - state.global_step) * args.gradient_accumulation_steps * self._seconds
        log.info(
            "%s; about %s tokens/s, %s for all steps",
            self.plan,
            f"{tokens / self._seconds:,.0f}",
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )

    def step_back(self) -> None:
        """Makes the plan safer after memory ran out in spite of it: half as many layers keep their activations, then none, and so on.

        Raises:
            RunError: nothing is left that could be given up.
        """
        assert self.plan is not None
        kept = self.plan.layers - self.plan.checkpointed
        if kept:
            self._keep(kept // 2)
            self.plan = replace(self.plan, checkpointed=self.plan.layers - kept // 2)
        elif not self.plan.offloaded:
            offload_inputs(self._layers)
            self.plan = replace(self.plan, offloaded=True)
        elif not self.plan.tiled:
            tile_mlps(self._layers, _PIECE)
            self.plan = replace(self.plan, tiled=True)
        else:
            raise RunError(
                "GPU memory ran out although everything is given up for it: lower trainer.per_device_train_batch_size, "
                "then trainer.max_length, or end what else uses the card"
            )
        self.run.write_json(self.run.memory, asdict(self.plan))
        log.warning("GPU memory ran out: this step again, from now on with %s", self.plan)

    def _keep(self, kept: int) -> None:
        """The last `kept` layers keep their activations: they are the first that the backward pass frees."""
        for index, layer in enumerate(self._layers):
            layer.gradient_checkpointing = index < len(self._layers) - kept

    def _largest_batch(self, size: int) -> dict[str, Any]:
        rows = self.trainer.train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        largest = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)[:size]
        return self.trainer.data_collator([rows[index] for index in largest])
