"""Ctrl-C and SIGTERM during training."""

import os
import signal

import pytest
from transformers import TrainerControl, TrainerState

from intern.training.interrupt import Interruption
from intern.training.steps import OptimizerSteps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_after_the_step_and_a_second_one_stops_immediately(number):
    interruption, control = Interruption(), TrainerControl()
    before = signal.getsignal(number)
    interruption.on_train_begin(None, TrainerState(), control)
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
    interruption.on_train_begin(None, TrainerState(), TrainerControl())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    interruption.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
