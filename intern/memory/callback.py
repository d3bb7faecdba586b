"""When a run's memory plan is made, repeated, made safer and undone.

Checkpointing every layer costs a third more arithmetic, since its forward pass runs twice; a layer that keeps its activations saves its
share. So before the first step, the largest batch goes through forward, backward, optimizer step and evaluation with every layer kept,
and if that does not fit, with none and with a few; then as many are kept as the free memory allows, and that plan is tried too. Smaller
batches keep more layers in the same memory. Memory that is still free holds dequantized weights. If even checkpointing every layer is
not enough, the layers' inputs move to host memory, and then MLPs are tiled. If memory runs out during training, the plan gives up one
more thing and the step is repeated.

How: measure.py chooses a plan, apply.py puts it into effect, recover.py makes it safer, stored_plan.py keeps it in memory.json.
"""

import logging
import shlex
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from intern import processes
from intern.errors import RunError
from intern.memory.apply import PlanApplier
from intern.memory.batches import RunBatches, count_tokens_and_rows
from intern.memory.measure import PlanChooser
from intern.memory.plan import MemoryPlan
from intern.memory.recover import safer_plan
from intern.memory.stored_plan import read_plan, write_plan
from intern.runs.directory import Run

log = logging.getLogger(__name__)


class FitMemory(TrainerCallback):
    """Makes a memory plan at the beginning of training, or repeats that of a run that resumes.

    Args:
        trainer: the InternTrainer that it is a callback of.
        run: where memory.json is stored.
        every_layer: checkpoint every layer, with its input in host memory, and measure nothing.
        cuda_graphs: whether decoder layers may be replayed as CUDA graphs; they are if measuring shows that it pays.
    """

    def __init__(self, trainer: Any, run: Run, every_layer: bool = False, cuda_graphs: bool = True) -> None:
        self.run = run
        self.every_layer = every_layer
        self.cuda_graphs = cuda_graphs
        self.trainer = trainer
        self.can_step_back = False  # while measuring, running out of memory is a finding
        self._batches: RunBatches | None = None
        self._applier: PlanApplier | None = None
        self._can_offload = True

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan that is in effect, or was when training ended; None before training."""
        return self._applier.plan if self._applier is not None else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = self._batches = RunBatches(self.trainer, kwargs["train_dataloader"], state.max_steps)
        applier = self._applier = PlanApplier(
            self.trainer.model,
            lambda: (count_tokens_and_rows(batches.largest)[0], len(batches.longest_rows[0]["input_ids"])),
        )
        self.trainer.kernels.on_uninstall(applier.undo)  # a run that fails never reaches on_train_end
        # A loss of the routers needs gradients in a layer's first forward, so its layers run in the library's form.
        self._can_offload = not getattr(self.trainer, "aux_loss_enabled", False)
        form: Any = args.activation_checkpointing_kwargs or {}
        if not any(form.values()) and self._can_offload:  # the user requested no other form
            applier.use_own_checkpointing()
        stored = read_plan(self.run, len(applier.layers)) if state.global_step else None
        if stored is not None and processes.place().size > 1:
            stored = replace(stored, replayed=False)  # gradients of replayed graphs are not summed over the processes
        if stored is not None:
            log.info("%s, as before", applier.apply(stored))
        else:
            left = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
            chooser = PlanChooser(self.trainer, applier, batches, left, self._can_offload, self.cuda_graphs)
            plan = applier.apply(chooser.checkpoint_every_layer() if self.every_layer else self._measured(chooser))
            if processes.is_main():
                write_plan(self.run, plan)
            if self.every_layer:
                log.info("%s", plan)
        self.can_step_back = True

    def _measured(self, chooser: PlanChooser) -> MemoryPlan:
        plan, seconds = chooser.measure()
        tokens, _ = count_tokens_and_rows(chooser.batches.typical)
        log.info(
            "%s; about %s tokens/s, %s for all steps",
            plan,
            f"{tokens / seconds:,.0f}",
            time.strftime("%H:%M:%S", time.gmtime(chooser.batches_left * seconds)),
        )
        return plan

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._applier is not None
        self._applier.undo()
        torch.cuda.empty_cache()  # scoring and sample answers need other blocks of memory

    def before_batch(self, tokens: int) -> None:
        """Select the layers that are checkpointed in a batch of `tokens` tokens, padding included."""
        assert self._applier is not None
        self._applier.select_checkpointed_layers(tokens)

    def step_back(self) -> None:
        """Make the plan safer after GPU memory ran out; the trainer then repeats the step.

        Raises:
            RunError: nothing is left to give up, or there are several processes: the others have gone on and wait for this one's gradients.
        """
        assert self._applier is not None and self._applier.plan is not None
        plan = safer_plan(self._applier.plan, self._can_offload)
        if processes.place().size > 1:
            write_plan(self.run, plan)
            raise RunError(
                f"GPU memory ran out: python -m intern.train {shlex.quote(f'resume={self.run.path}')} goes on from the last checkpoint with "
                f"{plan}"
            )
        plan = self._applier.apply(plan)
        write_plan(self.run, plan)
        log.warning("GPU memory ran out: this step is repeated, from now on with %s", plan)
