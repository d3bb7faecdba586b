"""Training that goes wrong: NaN or infinite loss, gradients and weights, no progress, exploding gradients.

The checks read what the log entry has on the CPU anyway. Weights are looked at only before a checkpoint is written and once after the
first steps, since reading them waits for the GPU.
"""

import logging
import math
import statistics
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from intern import processes
from intern.errors import RunError
from intern.runs.directory import Run
from intern.training.steps import OptimizerSteps

log = logging.getLogger(__name__)

STILL_AFTER = 10  # optimizer steps after which some weight must have changed
EXPLOSION = 100  # a gradient norm of this many medians of the earlier ones is reported
_FEWEST_NORMS = 5  # gradient norms that make a median


class Health(TrainerCallback):
    """Ends a run with a NaN or infinite loss, gradient norm or weight, before such weights become a checkpoint, and one that trains nothing.

    Of several processes, all must have the same weights.

    With fp16, a NaN or infinite loss or gradient is normal: loss scaling skips the step (intern/training/steps.py). Gradients that explode
    but are clipped (trainer.max_grad_norm) may do no harm: they are a warning, once.

    Args:
        run: for its checkpoints.
        steps: counts optimizer steps.
    """

    def __init__(self, run: Run, steps: OptimizerSteps) -> None:
        self.run = run
        self.steps = steps
        self._norms: list[float] = []
        self._first: torch.Tensor | None = None  # norms of the weights at the beginning, until they were compared
        self._compare_at = 0
        self._has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first = _weight_norms(kwargs["model"])
        self._compare_at = self.steps.taken + STILL_AFTER

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        compares = self.steps.taken == self._compare_at and self._first is not None
        if not control.should_save and not compares:
            return
        norms = _weight_norms(kwargs["model"])
        if not bool(torch.isfinite(norms).all()):
            raise RunError(
                f"adapter weights are NaN or infinite at step {state.global_step}: lower trainer.learning_rate; {self._last_checkpoint()}"
            )
        if compares and self._first is not None and args.learning_rate > 0 and torch.equal(norms, self._first):
            raise RunError(
                f"no adapter weight has changed in {STILL_AFTER} optimizer steps: raise trainer.learning_rate ({args.learning_rate:g}), "
                "or look at the rows with python -m intern.preview"
            )
        if compares:
            self._first = None
        if len({tuple(one) for one in processes.gather(norms.tolist())}) > 1:
            raise RunError(
                f"the processes of this run have different adapter weights at step {state.global_step}: their gradients were not summed; "
                f"train with one process; {self._last_checkpoint()}"
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, scales_loss = kwargs["logs"], getattr(kwargs.get("optimizer"), "scaler", None) is not None
        for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if name in logs and not math.isfinite(float(logs[name])) and not scales_loss:
                raise RunError(
                    f"the {words} is {float(logs[name])} at step {state.global_step}: lower trainer.learning_rate; "
                    f"{self._last_checkpoint()}"
                )
        if "grad_norm" in logs and math.isfinite(float(logs["grad_norm"])):
            self._watch(float(logs["grad_norm"]), state.global_step)

    def _watch(self, norm: float, step: int) -> None:
        median = statistics.median(self._norms) if self._norms else math.inf
        if len(self._norms) >= _FEWEST_NORMS and not self._has_warned and norm > EXPLOSION * median:
            self._has_warned = True
            log.warning(
                "the gradient norm is %.3g at step %d, over %d times its median so far (%.3g): if the loss rises too, lower "
                "trainer.learning_rate or raise trainer.warmup_steps",
                norm, step, EXPLOSION, median,
            )  # fmt: skip
        self._norms.append(norm)

    def _last_checkpoint(self) -> str:
        checkpoint = self.run.last_checkpoint()
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint before it"


def _weight_norms(model: Any) -> torch.Tensor:
    """Return the norm of each trainable tensor, on its device: it shows a change, and is NaN or infinite if an element is."""
    return torch.stack(torch._foreach_norm([p.detach() for p in model.parameters() if p.requires_grad]))
