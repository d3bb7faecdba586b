"""Log entries: the line in history.jsonl, the same to the trackers, and what a terminal shows."""

import json
import math
import shutil
import types

import pytest
from helpers import ROOT
from transformers import TrainerControl, TrainerState

from intern.errors import UserError
from intern.runs.directory import Run
from intern.training.history import History, history_at
from intern.training.steps import OptimizerSteps


def logged(tmp_path, logs, optimizer=None, step=4):
    """What is in history.jsonl and what is reported of one log entry."""
    reported = []
    steps = OptimizerSteps(0, 5)
    steps.taken, steps.skipped = 3, 1
    history = History(Run(tmp_path), steps, reported.append)
    state, control = TrainerState(max_steps=10, num_input_tokens_seen=0), TrainerControl()
    history.on_train_begin(None, state, control)
    state.global_step, state.num_input_tokens_seen = step, 500
    state.log_history.append(logs | {"step": step})  # as the library does
    history.on_log(None, state, control, logs=logs, optimizer=optimizer)
    history.close()
    entries = history.run.read_history()
    if entries:
        assert state.log_history == entries, "a checkpoint must store what the file has"
    return entries, reported


def test_an_entry_has_steps_taken_and_skipped_tokens_per_second_and_the_loss_scale(tmp_path):
    scaler = types.SimpleNamespace(get_scale=lambda: 1024.0)
    optimizer = types.SimpleNamespace(scaler=scaler)
    [entry], [reported] = logged(tmp_path, {"loss": 2.0, "total_flos": 0.0, "train_runtime": 1.0}, optimizer)
    assert entry == reported and entry["tokens_per_second"] > 0
    expected = {"step": 4, "optimizer_steps": 3, "skipped_steps": 1, "loss": 2.0, "loss_scale": 1024.0}
    assert {name: value for name, value in entry.items() if name != "tokens_per_second"} == expected


def test_nan_is_text_in_the_file_and_a_number_for_trackers(tmp_path):
    [entry], [reported] = logged(tmp_path, {"loss": float("nan"), "grad_norm": float("inf")})
    assert (entry["loss"], entry["grad_norm"]) == ("nan", "inf")
    assert math.isnan(reported["loss"]) and "loss_scale" not in reported


def test_the_libraries_summary_of_a_run_is_not_an_entry(tmp_path):
    assert logged(tmp_path, {"train_loss": 2.0, "train_runtime": 9.0}) == ([], [])


def test_without_a_terminal_progress_is_a_line_of_text(tmp_path, caplog):
    caplog.set_level("INFO")
    logged(tmp_path, {"loss": 2.0, "eval_f1": 0.25})
    assert "step 4/10  loss 2.000  eval_f1 0.250  tokens/s " in caplog.text and "left 00:00:00" in caplog.text


def old_run(tmp_path, skipped=0):
    """The run of an earlier version, whose checkpoint of step 4 stores the library's log entries without our counts."""
    run = Run(tmp_path / "run")
    shutil.copytree(ROOT / "tests" / "fixtures" / "run_before_packages" / "run", run.path)
    checkpoint = run.checkpoints / "checkpoint-4"
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text().replace('"skipped": 0', f'"skipped": {skipped}'))
    return run, checkpoint, run.history.read_text().splitlines(keepends=True)


def test_the_history_at_a_checkpoint_of_an_earlier_version_is_completed_by_the_file(tmp_path, caplog):
    run, checkpoint, lines = old_run(tmp_path, skipped=2)
    right = [json.loads(line) for line in lines[:3]]
    assert history_at(run, checkpoint) == right and not caplog.messages
    foreign = '{"step": 4, "optimizer_steps": 4, "loss": 9.0}\n'
    for changed in (lines[::-1], [lines[0], *lines], [foreign, *lines], lines[:3], ["no JSON\n", *lines]):
        run.history.write_text("".join(changed))
        assert history_at(run, checkpoint) == right
    assert history_at(run, None) == []


def test_a_line_that_an_earlier_version_had_only_in_the_file_is_missed_if_steps_were_skipped(tmp_path, caplog):
    run, checkpoint, lines = old_run(tmp_path)
    run.history.write_bytes("".join(lines[1:]).encode() + b"\xff\n")
    first, *rest = history_at(run, checkpoint)
    assert (first["step"], first["optimizer_steps"], first["loss"]) == (2, 2, json.loads(lines[0])["loss"])
    assert len(rest) == 2 and caplog.messages == [
        f"{run.history}: differs from what was logged up to step 4: these lines are restored from checkpoint-4"
    ]
    run, checkpoint, lines = old_run(tmp_path / "other", skipped=2)
    run.history.write_text("".join(lines[1:]))
    with pytest.raises(
        UserError, match="history.jsonl: lacks the line of step 2, which a checkpoint of an earlier version"
    ):
        history_at(run, checkpoint)


def test_something_else_in_place_of_the_history_is_refused(tmp_path):
    run, checkpoint, _ = old_run(tmp_path)
    run.history.unlink()
    run.history.mkdir()
    for at in (checkpoint, None):
        with pytest.raises(UserError, match="history.jsonl: is not a regular file"):
            history_at(run, at)
