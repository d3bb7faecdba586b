"""Is training healthy? Looked at where it costs no waiting for the GPU, and always before a checkpoint is written."""

import logging
import math
import statistics
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from intern.errors import RunError
from intern.runs.directory import Run
from intern.training.trainer import OptimizerSteps

log = logging.getLogger(__name__)

STILL_AFTER = 10  # optimizer steps after which some weight must have changed
EXPLOSION = 100  # times the median of the earlier gradient norms
_EARLIER = 5  # gradient norms that make a median


class Health(TrainerCallback):
    """Ends a run whose weights are no numbers before such a checkpoint is written, and one in which nothing is trained.

    Gradients that are clipped (trainer.max_grad_norm) may grow for a while without harm: that is a warning, once.
    """

    def __init__(self, run: Run, steps: OptimizerSteps) -> None:
        self.run = run
        self.steps = steps
        self._norms: list[float] = []
        self._first: torch.Tensor | None = None
        self._look_at = 0
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first = _sizes(kwargs["model"])
        self._look_at = self.steps.taken + STILL_AFTER

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        looks = self.steps.taken == self._look_at and self._first is not None
        if not control.should_save and not looks:
            return
        sizes = _sizes(kwargs["model"])
        if not bool(torch.isfinite(sizes).all()):
            raise RunError(
                f"weights of the adapter are no numbers any more at step {state.global_step}: lower trainer.learning_rate; {self._last()}"
            )
        if looks and self._first is not None and args.learning_rate > 0 and torch.equal(sizes, self._first):
            raise RunError(
                f"no weight of the adapter has changed in {STILL_AFTER} optimizer steps: raise trainer.learning_rate ({args.learning_rate:g}) "
                "or look at the rows with python -m intern.preview"
            )
        if looks:
            self._first = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        norm = kwargs["logs"].get("grad_norm")
        if norm is None:
            return
        norm = float(norm)
        if not math.isfinite(norm):
            if getattr(kwargs.get("optimizer"), "scaler", None) is None:  # fp16's loss scaling skips such a step
                raise RunError(
                    f"the gradient norm is {norm} at step {state.global_step}: lower trainer.learning_rate; {self._last()}"
                )
            return
        if len(self._norms) >= _EARLIER and not self._warned and norm > EXPLOSION * statistics.median(self._norms):
            self._warned = True
            log.warning(
                "the gradient norm is %.3g at step %d, over %d times its median so far (%.3g): if the loss rises too, lower "
                "trainer.learning_rate or raise trainer.warmup_steps",
                norm, state.global_step, EXPLOSION, statistics.median(self._norms),
            )  # fmt: skip
        self._norms.append(norm)

    def _last(self) -> str:
        checkpoint = self.run.last_checkpoint()
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint before it"


def _sizes(model: Any) -> torch.Tensor:
    """The norm of each trainable tensor, on its device: one number each tells a change and a value that is no number."""
    return torch.stack(torch._foreach_norm([p.detach() for p in model.parameters() if p.requires_grad]))
