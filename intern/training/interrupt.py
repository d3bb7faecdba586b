"""Ctrl-C and SIGTERM during training."""

import logging
import math
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from intern import processes

log = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step, saves a checkpoint and ends training; a second Ctrl-C ends it at once.

    Of several processes, each may get the signal: all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the signal that ends training, in all processes
        self._arrived: int | None = None  # the one that this process got
        self._is_alone = processes.place().size == 1
        self._handlers: dict[int, Any] = {}  # those from before training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = len(kwargs["train_dataloader"])
        if (late := late_checkpoint(args, state, math.ceil(batches / args.gradient_accumulation_steps))) is not None:
            log.warning("%s", late)
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        # torchrun repeats a SIGTERM that its processes may have got already.
        if self._arrived is not None and (self._is_alone or number == signal.SIGINT):
            self.close()
            raise KeyboardInterrupt
        self._arrived = number
        if self._is_alone:
            self.signal = number
        log.warning("%s: saving a checkpoint after this step (Ctrl-C again: stop at once)", signal.Signals(number).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_alone:
            self.signal = processes.largest(self._arrived or 0) or None
        if self.signal is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signal is not None:  # OptimizerSteps may have reverted the stop, before min_steps
            control.should_training_stop = True

    def close(self) -> None:
        """Restore the signal handlers from before training."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def late_checkpoint(args: TrainingArguments, state: TrainerState, steps_per_epoch: int) -> str | None:
    """Return a warning if a kill, which unlike Ctrl-C and SIGTERM leaves no time for a checkpoint, would lose more than usual.

    Args:
        args: the trainer's arguments.
        state: at the beginning of training, with the step at which it ends.
        steps_per_epoch: optimizer steps of an epoch.
    """
    if args.save_strategy == SaveStrategy.STEPS:
        key, first = f"save_steps={args.save_steps:g}", state.save_steps
    elif args.save_strategy == SaveStrategy.EPOCH:
        key, first = f"save_strategy=epoch (an epoch has {steps_per_epoch} steps)", steps_per_epoch
    else:
        key, first = "save_strategy=best", state.eval_steps if args.eval_strategy == "steps" else steps_per_epoch
        if first < state.max_steps:
            return f"trainer.{key}: a kill loses the steps since the best evaluation; trainer.save_strategy=steps would keep them"
    if first < state.max_steps or state.global_step:
        return None
    return (
        f"trainer.{key}: no checkpoint before the last step, {state.max_steps}: a kill loses the whole run; "
        f"with trainer.save_strategy=steps trainer.save_steps={max(1, state.max_steps // 4)} it loses a quarter"
    )
