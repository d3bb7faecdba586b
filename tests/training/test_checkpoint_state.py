"""State of callbacks in a checkpoint: found by its key, whatever the class is called."""

import types

import pytest
from transformers import TrainerState

from intern.errors import UserError
from intern.training.checkpoint_state import LoggingWindow, find_state, restore_callbacks
from intern.training.steps import OptimizerSteps, ResumableEarlyStopping

OLD = {
    "OptimizerSteps": {
        "args": {"min_steps": 8, "max_skipped_steps": 20},
        "attributes": {"taken": 4, "skipped": 2, "skipped_in_a_row": 1, "seconds": 0.5},
    },
    "Patience": {"args": {}, "attributes": {"early_stopping_patience_counter": 1, "stopped": True}},
    "TrainerControl": {"args": {}, "attributes": {}},
}


def restored(stored, *more):
    steps = OptimizerSteps(min_steps=10, max_skipped_steps=5)
    stopping = ResumableEarlyStopping(3, steps)
    state = TrainerState(stateful_callbacks=dict(stored))
    restore_callbacks([steps, stopping, *more], state, "run/checkpoints/checkpoint-6")
    return steps, stopping, state


def test_a_checkpoint_without_keys_is_read_by_the_names_that_classes_had():
    steps, stopping, state = restored(OLD)
    assert (steps.taken, steps.skipped, steps.skipped_in_a_row, steps.seconds) == (4, 2, 1, 0.5)
    assert (stopping.early_stopping_patience_counter, stopping.stopped) == (1, True)
    # transformers looks for the names that the classes have now when it saves the next checkpoint.
    assert set(state.stateful_callbacks) == {"OptimizerSteps", "ResumableEarlyStopping", "TrainerControl"}


def test_a_renamed_class_keeps_its_counts():
    class StepCounter(OptimizerSteps):
        pass

    first, second = StepCounter(10, 5), OptimizerSteps(10, 5)
    first.taken, first.skipped = 7, 3
    state = TrainerState(stateful_callbacks=[first])
    restore_callbacks([second], state, "checkpoint-10")
    assert (second.taken, second.skipped) == (7, 3) and set(state.stateful_callbacks) == {"OptimizerSteps"}
    assert find_state(state.stateful_callbacks, "optimizer_steps")["attributes"]["taken"] == 7


def test_another_class_of_an_old_name_is_not_taken_for_it():
    stored = {"OptimizerSteps": OLD["OptimizerSteps"] | {"checkpoint_key": "another"}}
    assert find_state(stored, "optimizer_steps") is None and find_state(stored, "another") is not None


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("OptimizerSteps", "the state optimizer_steps lacks taken, skipped, skipped_in_a_row, seconds"),
        ("Patience", "the state early_stopping lacks early_stopping_patience_counter, stopped"),
        ("skipped", "the state optimizer_steps lacks skipped, so"),
    ],
)
def test_a_checkpoint_that_lacks_counts_is_an_error_and_not_zero(lost, message):
    stored = {name: state | {"attributes": dict(state["attributes"])} for name, state in OLD.items() if name != lost}
    stored.get("OptimizerSteps", {"attributes": {}})["attributes"].pop(lost, None)
    with pytest.raises(UserError, match=f"^run/checkpoints/checkpoint-6/trainer_state.json: {message}"):
        restored(stored)


def test_the_next_log_line_averages_what_came_before_the_checkpoint():
    import torch

    def trainer(**more):
        return types.SimpleNamespace(_metrics={"train": {}}, **more)

    before = trainer(_tr_loss=torch.tensor(3.5), _globalstep_last_logged=4)
    before._metrics["train"]["entropy"] = [2.0, 1.0]
    state = TrainerState(stateful_callbacks=[LoggingWindow(before)])
    after = trainer()
    window = LoggingWindow(after)
    restore_callbacks([window], state, "checkpoint-5")
    after._tr_loss, after._globalstep_last_logged = torch.tensor(0.0), 5  # as the loop does before training begins
    window.on_train_begin(None, state, None)
    assert after._tr_loss.item() == 3.5 and after._globalstep_last_logged == 4
    assert after._metrics["train"] == {"entropy": [2.0, 1.0]}
