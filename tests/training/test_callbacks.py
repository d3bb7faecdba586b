"""The callbacks of a run are called in the one order in which they work."""

import pytest
from helpers import tiny_trainer
from transformers import PrinterCallback

from intern.memory.callback import FitMemory
from intern.runs.directory import Run
from intern.training.arguments import StepRules
from intern.training.callbacks import ORDER, build_callbacks, check_order


def test_all_callbacks_are_there_in_order_and_each_pair_in_another_order_is_found(tmp_path):
    trainer = tiny_trainer(tmp_path, disable_tqdm=True)
    rules = StepRules(min_steps=3, max_skipped_steps=5, early_stopping_patience=2)
    run = Run(tmp_path)
    built = build_callbacks(trainer, rules, run, print, lambda trainer: FitMemory(trainer, run))
    callbacks = trainer.callback_handler.callbacks
    assert [type(callback) for callback in callbacks] == list(ORDER)
    assert built.memory.trainer is trainer and built.early_stopping.early_stopping_patience == 2
    assert not any(isinstance(callback, PrinterCallback) for callback in callbacks)
    for first in range(len(ORDER) - 1):
        swapped = list(callbacks)
        swapped[first], swapped[first + 1] = swapped[first + 1], swapped[first]
        with pytest.raises(AssertionError, match="callbacks in the wrong order"):
            check_order(swapped)


def test_what_a_run_does_not_use_is_left_out(tmp_path):
    trainer = tiny_trainer(tmp_path, disable_tqdm=True)
    built = build_callbacks(trainer, StepRules(min_steps=3, max_skipped_steps=5), Run(tmp_path), print)
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert built.memory is None and built.early_stopping is None
    assert kinds == [
        "DefaultFlowCallback",
        "OptimizerSteps",
        "LoggingWindow",
        "Interruption",
        "Health",
        "History",
    ]
