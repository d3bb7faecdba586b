"""Measured training steps -> the memory plan of a run."""

import functools
import logging
from dataclasses import replace
from typing import Any

import torch

from intern import processes
from intern.errors import RunError
from intern.hardware import available_memory
from intern.kernels import cudnn_attention, cudnn_graphs
from intern.kernels.decoder_layers import are_one_kind
from intern.memory.apply import PlanApplier
from intern.memory.batches import Rows, RunBatches, count_tokens_and_rows
from intern.memory.plan import (
    LONG_ROW_TOKENS,
    MemoryPlan,
    fewest_checkpointed_layers,
    room_for_unpacked,
    smallest_change,
    usable,
)
from intern.memory.probe import Probe
from intern.units import GIB

log = logging.getLogger(__name__)

_CUDA_GRAPH_RESERVE = 0.03  # fraction of the budget left free when graphs' private pools are counted (fragmentation)
_LAUNCH_BOUND_S = (
    0.025  # seconds per layer and pass; above this the GPU is the bottleneck (launching a layer takes 6-12 ms)
)
_MOST_RECORDINGS = 8  # shapes that a run records
_LOSS_TOLERANCE = 0.01  # fraction of the loss by which rounding may change it
_ELEMENT_BYTES = 2  # in 16-bit precision


class PlanChooser:
    """Chooses a memory plan for a run; the plans that it measures are applied one after the other.

    Args:
        trainer: the trainer, ready for its first step.
        applier: of the trainer's model.
        batches: of the run.
        batches_left: batches that are still to come.
        can_offload: False for models whose layers must run in the library's form of checkpointing.
        cuda_graphs: whether decoder layers may be replayed as CUDA graphs.
    """

    def __init__(
        self,
        trainer: Any,
        applier: PlanApplier,
        batches: RunBatches,
        batches_left: int,
        can_offload: bool,
        cuda_graphs: bool,
    ) -> None:
        self.trainer = trainer
        self.applier = applier
        self.batches = batches
        self.batches_left = batches_left
        self.can_offload = can_offload
        self.cuda_graphs = cuda_graphs
        self._layers = len(applier.layers)

    def checkpoint_every_layer(self) -> MemoryPlan:
        """Return the plan that checkpoints every layer, with its input in host memory if possible; nothing is measured."""
        cudnn = self._cudnn_pays()
        attends_once = self.can_offload and cudnn and self._can_attend_once()
        form = {"offloaded": self.can_offload, "attends_once": attends_once, "cudnn": cudnn}
        return MemoryPlan(self._layers, self._layers, 0, 0, **form)

    def measure(self) -> tuple[MemoryPlan, float]:
        """Find the fastest plan in which the largest batch fits, and apply it.

        Returns:
            The plan, and the seconds that forward and backward of a typical batch take with it.

        Raises:
            RunError: the largest batch does not fit; names the smallest change that was tried and fits.
        """
        probe, batch = Probe(self.trainer), self.batches.largest
        form = {"cudnn": self._cudnn_pays()}
        with probe:
            found = self._fitting(probe, batch, **form)
            if found is None and self.can_offload:
                form |= {"offloaded": True, "attends_once": form["cudnn"] and self._can_attend_once()}
                found = self._fitting(probe, batch, **form) or self._fitting(probe, batch, **form, tiled=True)
            if found is None:
                raise RunError(self._no_plan(probe))
            found = self.applier.apply(found)
            if not found.checkpointed:
                found = self._unpack(probe, batch, found)
            return self._replay_if_faster(probe, batch, found)

    def _fitting(self, probe: Probe, batch: Rows, **form: bool) -> MemoryPlan | None:
        """Return the plan for a batch in this form, or None if the batch does not fit."""
        count, budget = self._layers, probe.budget

        @functools.cache
        def peak_of(kept: int) -> int | None:
            self.applier.apply(MemoryPlan(count, count - kept, 0, budget, **form))
            return probe.peak(batch)

        made = fewest_checkpointed_layers(count, budget, peak_of)
        tokens = self.trainer.data_collator(batch)["input_ids"].numel()
        return replace(made, **form, tokens=tokens) if made is not None else None

    def _cudnn_pays(self) -> bool:
        """Whether cuDNN's attention is worth its build in the batches that are left."""
        config = self.trainer.model.config.get_text_config()
        tokens, rows = count_tokens_and_rows(self.batches.typical)
        return cudnn_graphs.has_cudnn_frontend() and cudnn_attention.pays(
            self.batches_left * tokens, self.batches_left * rows, self._layers, _query_width(config)
        )

    def _can_attend_once(self) -> bool:
        """Whether storing attention's results pays, and half of the free host memory holds them and the inputs of all layers."""
        tokens, rows = count_tokens_and_rows(self.batches.largest)
        config = self.trainer.model.config.get_text_config()
        size = tokens * max(config.hidden_size, _query_width(config)) * _ELEMENT_BYTES
        pinned = 1 << (size - 1).bit_length()  # torch's allocator of pinned memory rounds up to powers of two
        needed = 2 * self._layers * pinned * processes.place().local_size
        return tokens >= LONG_ROW_TOKENS * rows and all(processes.gather(needed <= available_memory() / 2))

    def _no_plan(self, probe: Probe) -> str:
        """Return the message for a batch that does not fit, with the smallest change that was tried and fits."""
        budget = probe.budget
        # Every memory-saving option is in use by now; what is tried are fewer and shorter rows.
        remedy = smallest_change(
            self.batches.longest_rows, lambda rows: (probe.peak(rows) or budget) <= usable(budget), self.trainer.args
        )
        return (
            f"the largest batch does not fit into {budget / GIB:.1f} GiB although every layer is checkpointed, its input in "
            f"host memory and its MLP tiled: {remedy}"
        )

    def _unpack(self, probe: Probe, batch: Rows, packed: MemoryPlan) -> MemoryPlan:
        """Dequantize weights into the free memory, if the batch then still fits."""
        room = room_for_unpacked(packed.budget, packed.peak)
        if room <= 0:
            return packed
        unpacked = self.applier.apply(replace(packed, unpacked=room))
        peak = probe.peak(batch)
        if peak is None or peak > usable(packed.budget):
            return self.applier.apply(packed)
        return self.applier.apply(replace(unpacked, peak=peak))

    def _replay_if_faster(self, probe: Probe, batch: Rows, plan: MemoryPlan) -> tuple[MemoryPlan, float]:
        """Use CUDA graphs if they pay in the batches that are left.

        Returns:
            The plan that is in effect, and the seconds of a typical batch with it.
        """
        typical, left = self.batches.typical, self.batches_left
        seconds, expected = probe.timed(typical)
        can_record = not self.applier.draws and are_one_kind(self.trainer.model, self.applier.layers)
        is_possible = self.cuda_graphs and not plan.offloaded and can_record
        # Recording costs the work of a batch twice.
        if not is_possible or left <= 2 * _MOST_RECORDINGS or self.trainer.accelerator.num_processes > 1:
            return plan, seconds
        seconds, expected = probe.timed(typical)  # everything is warm by now
        if seconds > _LAUNCH_BOUND_S * self._layers:
            return plan, seconds
        try:
            self.applier.apply(replace(plan, replayed=True))
            recording, _ = probe.timed(batch)
            probe.timed(typical)
            replayed, loss = probe.timed(typical)
            reserved = probe.reserved(batch)
            log.debug("CUDA graphs: %.3f s per batch, %.3f without, %.1f s to record", replayed, seconds, recording)
            pays = (seconds - replayed) * left > recording * _MOST_RECORDINGS
            fits = reserved <= plan.budget * (1 - _CUDA_GRAPH_RESERVE)
            if pays and fits and abs(loss - expected) <= _LOSS_TOLERANCE * abs(expected):
                return self.applier.apply(replace(plan, replayed=True, peak=reserved)), replayed
        except torch.cuda.OutOfMemoryError:
            log.debug("CUDA graphs: not enough memory")
        except RuntimeError as error:  # something in these layers cannot be recorded
            log.info("no CUDA graphs for these layers: %s", " ".join(str(error).split())[:200])
        return self.applier.apply(plan), seconds


def _query_width(config: Any) -> int:
    """Return the elements of all queries of a token."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_size)
