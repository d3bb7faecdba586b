"""Ctrl-C and SIGTERM during training."""

import os
import signal

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from intern.training.interrupt import Interruption, late_checkpoint
from intern.training.steps import OptimizerSteps


def begun(interruption):
    state = TrainerState(max_steps=9, save_steps=3)
    interruption.on_train_begin(TrainingArguments(use_cpu=True), state, TrainerControl(), train_dataloader=[None])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_after_the_step_and_a_second_one_stops_immediately(number):
    interruption, control = Interruption(), TrainerControl()
    before = signal.getsignal(number)
    begun(interruption)
    interruption.on_step_end(None, TrainerState(), control)
    assert not control.should_training_stop
    os.kill(os.getpid(), number)
    interruption.on_step_end(None, TrainerState(), control)
    assert (control.should_save, control.should_training_stop, interruption.signal) == (True, True, number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_an_interrupt_stops_training_even_before_min_steps():
    steps, interruption = OptimizerSteps(min_steps=10, max_skipped_steps=5), Interruption()
    control = TrainerControl(should_training_stop=True)
    interruption.signal = signal.SIGTERM
    for callback in (steps, interruption):  # the order in which the trainer has them
        callback.on_evaluate(None, TrainerState(), control)
    assert control.should_training_stop


def test_signals_are_handled_as_before_after_training():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interruption = Interruption()
    begun(interruption)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    interruption.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"save_steps": 3}, None),
        (
            {"save_steps": 50},
            "trainer.save_steps=50: no checkpoint before the last step, 9: a kill loses the whole run; with "
            "trainer.save_strategy=steps trainer.save_steps=2 it loses a quarter",
        ),
        ({"save_steps": 0.5}, None),
        ({"save_steps": 0.99}, "trainer.save_steps=0.99: no checkpoint before the last step, 9"),
        ({"save_strategy": "epoch"}, "trainer.save_strategy=epoch (an epoch has 20 steps): no checkpoint before"),
        (
            {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3},
            "trainer.save_strategy=best: a kill loses",
        ),
        (
            {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 9},
            "trainer.save_strategy=best: no checkpoint",
        ),
        (
            {"save_strategy": "best", "eval_strategy": "epoch"},
            "trainer.save_strategy=best: no checkpoint before the last",
        ),
    ],
)
def test_a_run_that_a_kill_would_lose_as_a_whole_is_warned_about_by_name(values, message):
    args = TrainingArguments(use_cpu=True, metric_for_best_model="eval_loss", **values)
    state = TrainerState(max_steps=9)
    state.compute_steps(args, 9)
    late = late_checkpoint(args, state, 20)
    assert late is None if message is None else late.startswith(message)
    state.global_step = 3
    assert late_checkpoint(args, state, 20) is None or "since the best evaluation" in late
