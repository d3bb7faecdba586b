"""When training ends: after the optimizer steps that really happened, or early."""

import math
import time
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from intern.errors import RunError
from intern.training.checkpoint_state import CheckpointedCallback


def steps_of_run(units: int, args: TrainingArguments, min_steps: int) -> tuple[int, int]:
    """Return the optimizer steps that a run takes if none is skipped and it does not end early, and those of one epoch.

    Args:
        units: rows of the training data; with packing, packs.
        args: of the run.
        min_steps: trainer.min_steps.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = max(1, math.ceil(units / batch))
    by_epochs = math.ceil(args.num_train_epochs * per_epoch)
    return max(args.max_steps if args.max_steps > 0 else by_epochs, min_steps), per_epoch


class OptimizerSteps(CheckpointedCallback):
    """Counts optimizer steps taken, and those that fp16's loss scaling skipped; training is extended by each skipped step.

    Args:
        min_steps: steps before which early stopping must not end training.
        max_skipped_steps: skipped steps in a row that are allowed.
    """

    checkpoint_key = "optimizer_steps"
    checkpoint_attributes = ("taken", "skipped", "skipped_in_a_row", "seconds")

    def __init__(self, min_steps: int, max_skipped_steps: int) -> None:
        self.min_steps = min_steps
        self.max_skipped_steps = max_skipped_steps
        self.taken = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.seconds = (
            0.0  # of training, checkpoints and evaluations; the time between a stop and its resume does not count
        )
        self._clock = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.max_steps += self.skipped
        self._clock = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.taken += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            state.max_steps += 1
            control.should_training_stop = False  # DefaultFlowCallback set it at the old max_steps
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise RunError(
                f"fp16 skipped {self.skipped_in_a_row} optimizer steps in a row (step {state.global_step}): gradients overflow at every "
                "loss scale; lower trainer.learning_rate, or on a card with bfloat16 use trainer=ampere quant=nf4_bf16"
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop and self.taken < self.min_steps:
            control.should_training_stop = False


class ResumableEarlyStopping(EarlyStoppingCallback, CheckpointedCallback):
    """transformers' early stopping, which at a resume forgets how many evaluations brought no improvement.

    Args:
        patience: evaluations without improvement after which training stops.
        steps: counts optimizer steps.
    """

    checkpoint_key = "early_stopping"
    checkpoint_attributes = ("early_stopping_patience_counter", "stopped")

    def __init__(self, patience: int, steps: OptimizerSteps) -> None:
        super().__init__(patience)
        self.steps = steps
        self.stopped = False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, which is not what transformers' callback stores."""
        return CheckpointedCallback.state(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing: transformers' check of its arguments is made by intern/training/rules.py, before the model loads."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        is_exhausted = self.early_stopping_patience_counter >= self.early_stopping_patience
        self.stopped = is_exhausted and self.steps.taken >= self.steps.min_steps
