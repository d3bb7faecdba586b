"""A measured plan: how many decoder layers must recompute their activations so that the run fits into the GPU's memory.

Checkpointing every layer costs a third more arithmetic (the forward pass runs twice); a layer that keeps its activations saves its share.
So the largest real batch goes through forward, backward, optimizer step and evaluation before the first step, with every layer kept, and
where that does not fit, with none and a few, and as many are kept as the free memory allows; that plan is then tried too. Smaller batches
keep more layers in the same memory. What still is free holds weights unpacked. Where not even checkpointing all layers is enough, their
inputs wait in host memory, and then MLPs take rows in pieces. Memory that runs out later makes the plan safer and repeats the step.
"""

import functools
import logging
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from intern.errors import RunError
from intern.hardware import available_memory
from intern.kernels import cudnn_attention, isolated_attention
from intern.kernels.cuda_graphs import LayerGraphs
from intern.kernels.decoder_layers import are_one_kind, decoder_layers, draws_at_random
from intern.kernels.lora_linear import pack_weights, unpack_weights
from intern.kernels.recompute import offload_inputs, recompute, tile_mlps
from intern.memory.plan import MemoryPlan, plan, smallest_change, usable
from intern.memory.probe import Probe, coming_batches, largest, usual
from intern.runs.directory import Run
from intern.units import GIB

log = logging.getLogger(__name__)

_RESERVE = 0.1  # of the memory: stays free before weights are unpacked; with less the allocator starts to search
_PIECE = 4096  # tokens that an MLP takes at a time where rows go in pieces
_LONG = 2048  # tokens of an average row from which attention's results are worth a place in host memory
_HELD = 0.03  # of the memory: stays free of what is held with CUDA graphs, fragments included
_LAUNCHING = 0.025  # seconds a layer: Python launches its kernels in 6 to 12 ms, so beyond this the GPU is waited for
_RECORDINGS = 8  # shapes that are recorded in a run, or fewer
_SAME_LOSS = 0.01  # of the loss: what rounding may change
_BYTES = 2  # of a number in 16-bit precision


class FitMemory(TrainerCallback):
    """Makes the plan at the beginning of training, from the largest batches of the data, and puts it into effect.

    The run keeps it in memory.json: one that goes on from a checkpoint repeats it instead of measuring again.

    Args:
        run: where the plan is kept.
        every_layer: every layer is checkpointed, its input in host memory, and nothing is measured.
        cuda_graphs: whether decoder layers may be replayed as CUDA graphs; they are where that is measured to pay.
    """

    def __init__(self, run: Run, every_layer: bool = False, cuda_graphs: bool = True) -> None:
        self.run = run
        self.every_layer = every_layer
        self.cuda_graphs = cuda_graphs
        self.trainer: Any = None  # set when it is built: it is built with its callbacks
        self.plan: MemoryPlan | None = None
        self._layers: list[GradientCheckpointingLayer] = []
        self._draws = False  # whether something in them is drawn at random
        self._has_aux_loss = (
            False  # the routers': their first run must have gradients, so layers run again in the library's form
        )
        self._graphs: LayerGraphs | None = None
        self._detached: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._layers = decoder_layers(self.trainer.model)
        self._draws = draws_at_random(self.trainer.model)
        self._has_aux_loss = bool(getattr(self.trainer, "aux_loss_enabled", False))
        self._loader, self._state = kwargs["train_dataloader"], state
        self.trainer.before_batch = self.fit
        form: Any = args.activation_checkpointing_kwargs or {}
        if not any(form.values()) and not self._has_aux_loss:  # another form was not asked for
            recompute(self._layers, self._draws)
            self._detach_embeddings()
        before = None
        # What recomputes decides how sums round: a run that goes on must not differ.
        if state.global_step and self.run.memory.is_file():
            before = MemoryPlan(**self.run.read_json(self.run.memory))
        if before is not None:
            self._take(before)
            log.info("%s, as before", before)
        elif self.every_layer:
            count, offloaded = len(self._layers), not self._has_aux_loss
            cudnn = self._cudnn_pays(_left(args, state))
            once = offloaded and cudnn and self._can_attend_once()
            form = {"offloaded": offloaded, "attends_once": once, "cudnn": cudnn}
            log.info("%s", self._take(MemoryPlan(count, count, 0, 0, **form)))
        else:
            self._measure(args, state)
        self.trainer.step_back = self.step_back

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._graphs is not None:
            self._graphs.remove()
        if self._detached is not None:
            self._detached.remove()
        isolated_attention.take_cudnn(False)
        pack_weights(self.trainer.model)  # scoring and sample answers take other memory
        torch.cuda.empty_cache()

    def _detach_embeddings(self) -> None:
        """Takes back that the libraries ask for gradients of frozen embeddings: nobody reads them, and they take memory and time."""
        embeddings = self.trainer.model.get_input_embeddings()
        if not any(parameter.requires_grad for parameter in embeddings.parameters()):
            self._detached = embeddings.register_forward_hook(lambda module, given, out: out.detach())

    @functools.cached_property
    def _largest(self) -> list[dict[str, Any]]:
        """The largest batch of the run; to find it takes a look at all rows."""
        args, processes = self.trainer.args, self.trainer.accelerator.num_processes
        coming = coming_batches(self._loader, self._state.max_steps * args.gradient_accumulation_steps * processes)
        padded = not self.trainer.padding_free
        return largest(self.trainer.train_dataset, args.per_device_train_batch_size, coming, padded)

    @functools.cached_property
    def _longest(self) -> list[dict[str, Any]]:
        """The largest batch that these rows could make."""
        return largest(self.trainer.train_dataset, self.trainer.args.per_device_train_batch_size)

    @functools.cached_property
    def _usual(self) -> list[dict[str, Any]]:
        """An ordinary batch."""
        return usual(self.trainer.train_dataset, self.trainer.args.per_device_train_batch_size)

    def _cudnn_pays(self, batches: int) -> bool:
        """Whether cuDNN's attention is worth its build in so many batches."""
        config = self.trainer.model.config.get_text_config()
        tokens, rows = _counted(self._usual)
        return cudnn_attention.has_kernels() and cudnn_attention.pays(
            batches * tokens, batches * rows, len(self._layers), _width(config)
        )

    def _measure(self, args: TrainingArguments, state: TrainerState) -> None:
        probe, batch = Probe(self.trainer), self._largest
        ordinary, left = self._usual, _left(args, state)
        form = {"cudnn": self._cudnn_pays(left)}
        with probe:
            found = self._planned(probe, batch, **form)
            if found is None and not self._has_aux_loss:
                form |= {"offloaded": True, "attends_once": form["cudnn"] and self._can_attend_once()}
                found = self._planned(probe, batch, **form) or self._planned(probe, batch, **form, tiled=True)
            if found is None:
                raise RunError(self._no_plan(probe, args))
            self._take(found)
            if not found.checkpointed:
                self._unpack(probe, batch)
            seconds = self._replay_if_faster(probe, batch, ordinary, left)
        assert self.plan is not None
        self.run.write_json(self.run.memory, asdict(self.plan))
        log.info(
            "%s; about %s tokens/s, %s for all steps",
            self.plan,
            f"{sum(len(row['input_ids']) for row in ordinary) / seconds:,.0f}",
            time.strftime("%H:%M:%S", time.gmtime(left * seconds)),
        )

    def _planned(self, probe: Probe, batch: list[dict[str, Any]], **form: bool) -> MemoryPlan | None:
        """The plan for a batch in this form; None where it does not fit."""
        count, budget = len(self._layers), probe.budget

        @functools.cache
        def peak_of(kept: int) -> int | None:
            self._take(MemoryPlan(count, count - kept, 0, budget, **form))
            return probe.peak(batch)

        made = plan(count, budget, peak_of)
        tokens = self.trainer.data_collator(batch)["input_ids"].numel()
        return replace(made, **form, tokens=tokens) if made is not None else None

    def _can_attend_once(self) -> bool:
        """Whether attention's results are worth keeping, and half of the host's free memory holds them and the inputs of all layers."""
        tokens, rows = _counted(self._largest)
        config = self.trainer.model.config.get_text_config()
        size = tokens * max(config.hidden_size, _width(config)) * _BYTES
        pinned = 1 << (size - 1).bit_length()  # in powers of two: torch's allocator rounds up to them
        return tokens >= _LONG * rows and 2 * len(self._layers) * pinned <= available_memory() / 2

    def _no_plan(self, probe: Probe, args: TrainingArguments) -> str:
        """What to say, with the smallest change that was tried and fits."""
        budget = probe.budget
        # Everything is given up by now; what is tried are fewer and shorter rows.
        remedy = smallest_change(self._longest, lambda rows: (probe.peak(rows) or budget) <= usable(budget), args)
        return (
            f"the largest batch does not fit into {budget / GIB:.1f} GiB although every layer is checkpointed, its input in "
            f"host memory and its MLP in pieces: {remedy}"
        )

    def _unpack(self, probe: Probe, batch: list[dict[str, Any]]) -> None:
        """Unpacks weights into what memory is left, if the batch then still fits."""
        packed = self.plan
        assert packed is not None
        room = usable(packed.budget) - int(_RESERVE * packed.budget) - packed.peak
        if room <= 0:
            return
        unpacked = self._take(replace(packed, unpacked=room))
        peak = probe.peak(batch)
        self._take(replace(unpacked, peak=peak) if peak is not None and peak <= usable(packed.budget) else packed)

    def _replay_if_faster(
        self, probe: Probe, batch: list[dict[str, Any]], ordinary: list[dict[str, Any]], left: int
    ) -> float:
        """Takes CUDA graphs where they pay in the batches that are left; the seconds that an ordinary batch takes in the end."""
        alone = self.plan
        assert alone is not None
        seconds, expected = probe.timed(ordinary)
        can_stand_in = not self._draws and are_one_kind(self.trainer.model, self._layers)
        possible = self.cuda_graphs and not alone.offloaded and can_stand_in
        # Recording is a batch's work twice.
        if not possible or left <= 2 * _RECORDINGS or self.trainer.accelerator.num_processes > 1:
            return seconds
        seconds, expected = probe.timed(ordinary)  # by now everything is warm
        if seconds > _LAUNCHING * len(self._layers):
            return seconds
        try:
            self._take(replace(alone, replayed=True))
            recording, _ = probe.timed(batch)
            probe.timed(ordinary)
            replayed, loss = probe.timed(ordinary)
            held = probe.held(batch)
            log.debug("CUDA graphs: %.3f s a batch, %.3f without, %.1f s to record", replayed, seconds, recording)
            pays = (seconds - replayed) * left > recording * _RECORDINGS
            if pays and held <= alone.budget * (1 - _HELD) and abs(loss - expected) <= _SAME_LOSS * abs(expected):
                self._take(replace(alone, replayed=True, peak=held))
                return replayed
        except torch.cuda.OutOfMemoryError:
            log.debug("CUDA graphs: no memory for them")
        except RuntimeError as error:  # something in these layers cannot be recorded
            log.info("no CUDA graphs of these layers: %s", " ".join(str(error).split())[:200])
        self._take(alone)
        return seconds

    def fit(self, tokens: int) -> None:
        """Prepares the layers for a batch of so many tokens, padding included."""
        assert self.plan is not None
        # The last layers keep their activations: they are the first that the backward pass frees.
        for index, layer in enumerate(self._layers):
            layer.gradient_checkpointing = index < len(self._layers) - self.plan.kept(tokens)

    def step_back(self) -> None:
        """Makes the plan safer after memory ran out: no CUDA graphs, no unpacked weights, half as many kept activations, none, and so on.

        Raises:
            RunError: nothing is left that could be given up.
        """
        assert self.plan is not None
        kept = self.plan.layers - self.plan.checkpointed
        if self.plan.replayed:
            self._take(replace(self.plan, replayed=False))
        elif self.plan.unpacked:
            self._take(replace(self.plan, unpacked=0))
        elif kept:
            self._take(replace(self.plan, checkpointed=self.plan.layers - kept // 2))
        elif not self.plan.offloaded and not self._has_aux_loss:
            self._take(replace(self.plan, offloaded=True))
        elif self.plan.offloaded and not self.plan.tiled:
            self._take(replace(self.plan, tiled=True))
        else:
            raise RunError(
                "GPU memory ran out although everything is given up for it: lower trainer.per_device_train_batch_size, "
                "then trainer.max_length, or end what else uses the card"
            )
        self.run.write_json(self.run.memory, asdict(self.plan))
        log.warning("GPU memory ran out: this step again, from now on with %s", self.plan)

    def _take(self, wanted: MemoryPlan) -> MemoryPlan:
        """Puts a plan into effect; with the bytes of weights that are really unpacked.

        What is offloaded or in pieces stays so: no plan goes back there.
        """
        now = self.plan
        if wanted.offloaded and not (now and now.offloaded):
            offload_inputs(self._layers, self._draws, wanted.attends_once)
        if wanted.tiled and not (now and now.tiled):
            tile_mlps(self._layers, _PIECE)
        if wanted.unpacked != (now.unpacked if now else 0):
            pack_weights(self.trainer.model)
            wanted = replace(wanted, unpacked=unpack_weights(self.trainer.model, wanted.unpacked))
        isolated_attention.take_cudnn(wanted.cudnn)
        if self._graphs is not None and now is not None and replace(wanted, peak=now.peak) != now:
            self._graphs.remove()
            self._graphs = None
        if wanted.replayed and self._graphs is None:
            tokens, _ = _counted(self._largest)
            self._graphs = LayerGraphs(self._layers, tokens, len(self._longest[0]["input_ids"]))
        self.plan = wanted
        self.fit(wanted.tokens)
        return wanted


def _left(args: TrainingArguments, state: TrainerState) -> int:
    """Batches that are still to come."""
    return (state.max_steps - state.global_step) * args.gradient_accumulation_steps


def _counted(batch: list[dict[str, Any]]) -> tuple[int, int]:
    """Tokens of a batch, and its rows: a pack counts as those that are in it."""
    tokens = [len(row["input_ids"]) for row in batch]
    return sum(tokens), sum(len(row.get("seq_lengths") or [size]) for row, size in zip(batch, tokens, strict=True))


def _width(config: Any) -> int:
    """Numbers of all queries of a token."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_size)
