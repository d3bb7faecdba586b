"""When training ends: steps that really happened, and early stopping."""

import types

import pytest
from transformers import TrainerControl, TrainerState

from intern.errors import RunError
from intern.training.checkpoint_state import restore_callbacks
from intern.training.steps import OptimizerSteps, ResumableEarlyStopping


class Loop:
    """The library's loop as far as callbacks see it; fp16 skips the steps for which `skips` returns True."""

    def __init__(self, steps: OptimizerSteps, max_steps: int, skips) -> None:
        self.steps, self.skips = steps, skips
        self.state = TrainerState(max_steps=max_steps, stateful_callbacks=[])
        self.control = TrainerControl()

    def run(self) -> None:
        self.steps.on_train_begin(None, self.state, self.control)
        while not self.control.should_training_stop:
            self.state.global_step += 1
            self.control.should_training_stop = self.state.global_step >= self.state.max_steps  # DefaultFlowCallback
            optimizer = types.SimpleNamespace(step_was_skipped=self.skips(self.state.global_step))
            self.steps.on_step_end(None, self.state, self.control, optimizer=optimizer)


def test_skipped_steps_do_not_count_and_are_made_up():
    steps = OptimizerSteps(min_steps=10, max_skipped_steps=5)
    loop = Loop(steps, 10, skips=lambda step: step in (1, 2, 10, 12))
    loop.run()
    assert (steps.taken, steps.skipped, loop.state.global_step) == (10, 4, 14)


def test_skipped_steps_in_a_row_end_the_run_with_advice():
    steps = OptimizerSteps(min_steps=10, max_skipped_steps=4)
    with pytest.raises(RunError, match=r"skipped 5 optimizer steps in a row \(step 8\).*trainer=ampere"):
        Loop(steps, 10, skips=lambda step: step > 3).run()
    assert steps.taken == 3


def test_counts_continue_after_a_resume():
    first = OptimizerSteps(min_steps=10, max_skipped_steps=5)
    Loop(first, 6, skips=lambda step: step in (1, 2)).run()
    second = OptimizerSteps(min_steps=10, max_skipped_steps=5)
    loop = Loop(second, 10, skips=lambda step: False)
    loop.state.stateful_callbacks = {"OptimizerSteps": first.state()}
    restore_callbacks([second], loop.state, "checkpoint-8")
    loop.state.global_step = 8
    loop.run()
    assert (second.taken, second.skipped, loop.state.global_step) == (10, 2, 12)


def test_early_stopping_waits_for_min_steps():
    steps = OptimizerSteps(min_steps=10, max_skipped_steps=5)
    for taken, stops in ((9, False), (10, True)):
        steps.taken = taken
        control = TrainerControl(should_training_stop=True)
        steps.on_evaluate(None, TrainerState(), control)
        assert control.should_training_stop is stops


def test_early_stopping_counts_evaluations_without_improvement_and_a_checkpoint_has_the_count():
    steps = OptimizerSteps(min_steps=0, max_skipped_steps=5)
    first, second = ResumableEarlyStopping(2, steps), ResumableEarlyStopping(2, steps)
    args = types.SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    control, state = TrainerControl(), TrainerState(stateful_callbacks=[], best_metric=1.0)
    first.on_evaluate(args, state, control, {"eval_loss": 1.5})
    assert not control.should_training_stop and not first.stopped
    state.stateful_callbacks = {"ResumableEarlyStopping": first.state()}
    restore_callbacks([second], state, "checkpoint-8")
    second.on_evaluate(args, state, control, {"eval_loss": 1.2})
    assert control.should_training_stop and second.stopped
