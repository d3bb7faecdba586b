"""The run directory: found, written whole, read back."""

import json
import os

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from intern.errors import BusyError, RunError, UserError
from intern.runs.directory import Run
from intern.runs.failures import discard_failed_attempt, record_failure
from intern.runs.find import resolve


def finished(path, loss, age=0):
    path.mkdir(parents=True)
    run = Run(path)
    run.write_config(OmegaConf.create({"seed": 1}))
    run.write_json(run.metrics, {"eval_loss": loss, "train_loss": 9.0})
    os.utime(run.metrics, (1e9 - age, 1e9 - age))
    return path


def test_latest_best_sweeps_and_paths_are_found(tmp_path):
    old_best = finished(tmp_path / "outputs/2024-01-01/10-00-00", 0.5, age=100)
    newest = finished(tmp_path / "outputs/2024-01-02/10-00-00", 0.9)
    job0 = finished(tmp_path / "multirun/2024-01-01/11-00-00/0", 0.8, age=50)
    job1 = finished(tmp_path / "multirun/2024-01-01/11-00-00/1", 0.7, age=60)
    assert resolve("latest", tmp_path).path == newest
    assert resolve("best", tmp_path).path == old_best
    assert resolve("multirun/2024-01-01/11-00-00", tmp_path).path == job1
    assert resolve(job0, tmp_path).path == job0
    assert resolve("outputs/2024-01-02/10-00-00", tmp_path).path == newest


def test_an_unfinished_run_is_never_taken_for_a_finished_one(tmp_path):
    unfinished = tmp_path / "outputs/2024-01-03/10-00-00"
    unfinished.mkdir(parents=True)
    Run(unfinished).write_config(OmegaConf.create({"seed": 1}))
    with pytest.raises(UserError, match="this run is unfinished"):
        resolve(unfinished)
    with pytest.raises(UserError, match="no finished run below"):
        resolve("latest", tmp_path)


@pytest.mark.parametrize(
    ("given", "message"), [("nowhere", "no such folder"), (".", "neither a run"), ("best", "no finished run")]
)
def test_what_is_no_run_is_named(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        resolve(given, tmp_path)


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.write_json(run.metrics, {"eval_loss": 1.0})

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        run.write_json(run.metrics, {"eval_loss": 2.0})
    assert json.loads(run.metrics.read_text()) == {"eval_loss": 1.0}


def test_an_adapter_that_failed_to_save_leaves_the_old_one(tmp_path):
    run = Run(tmp_path)
    with run.new_adapter() as folder:
        (folder / "adapter_model.safetensors").write_text("first")
    with pytest.raises(RuntimeError), run.new_adapter() as folder:
        (folder / "adapter_model.safetensors").write_text("half")
        raise RuntimeError
    assert (run.adapter / "adapter_model.safetensors").read_text() == "first"
    with run.new_adapter() as folder:
        (folder / "adapter_model.safetensors").write_text("second")
    assert (run.adapter / "adapter_model.safetensors").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_history_leaves_out_a_line_that_a_crash_cut_short_and_forgets_what_comes_again(tmp_path):
    run = Run(tmp_path)
    for step in (2, 4, 6):
        run.append_history({"step": step, "loss": 1.0 / step})
    with run.history.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [entry["step"] for entry in run.read_history()] == [2, 4, 6]
    run.drop_history_after(4)
    assert [entry["step"] for entry in run.read_history()] == [2, 4]


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    run = Run(tmp_path)
    assert run.last_checkpoint() is None
    for step, state in ((50, "{}"), (100, "{}"), (150, '{"global'), (200, None)):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
        save_file({"weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-100"


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    finished(tmp_path / "outputs/a", 2.0)
    broken = finished(tmp_path / "outputs/0", 1.0)
    (broken / "metrics.json").write_text('{"eval_loss": null}')
    assert resolve("best", tmp_path).path == tmp_path / "outputs/a"


@pytest.mark.parametrize("content", [None, "", "{", "- 1\n- 2", "a: b: c"])
def test_a_broken_configuration_is_named(tmp_path, content):
    run = Run(tmp_path)
    if content is not None:
        run.config.write_text(content)
    if content == "":
        assert run.read_config() == {}
        return
    with pytest.raises(UserError, match="config.yaml"):
        run.read_config()


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_a_broken_json_file_is_named(tmp_path, content):
    run = Run(tmp_path)
    if content is not None:
        run.prompt.write_text(content)
    with pytest.raises(UserError, match=r"prompt\.json"):
        run.read_json(run.prompt)


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
