"""Ctrl-C and SIGTERM during training."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step, saves a checkpoint and ends training; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the signal that arrived
        self._handlers: dict[int, Any] = {}  # those from before training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.close()
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: saving a checkpoint after this step (Ctrl-C again: stop at once)", signal.Signals(number).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
