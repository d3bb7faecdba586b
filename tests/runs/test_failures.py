"""A failed training is recorded, and starts again only if it failed by itself."""

import pytest

from intern.errors import BusyError, RunError, UserError
from intern.runs.directory import Run
from intern.runs.failures import discard_failed_attempt, record_failure


@pytest.mark.parametrize(
    ("error", "noted", "kept"),
    [
        (RunError("the loss is nan"), True, False),
        (UserError("lora.r=0"), True, True),
        (OSError(28, "No space left on device"), True, True),
        (BusyError("another process trains in it"), False, True),
    ],
)
def test_only_a_training_that_failed_by_itself_begins_anew(error, noted, kept, tmp_path):
    run = Run(tmp_path)
    (run.checkpoints / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(type(error)), record_failure(run):
        raise error
    assert run.failure.is_file() is noted
    discard_failed_attempt(run)
    assert run.checkpoints.exists() is kept
    with record_failure(run):
        pass
    assert not run.failure.exists()


def test_a_finished_run_is_not_noted_as_failed(tmp_path):
    run = Run(tmp_path)
    run.write_json(run.metrics, {"eval_loss": 1.0})
    with pytest.raises(UserError), record_failure(run):
        raise UserError("holds a finished run")
    assert not run.failure.exists()
