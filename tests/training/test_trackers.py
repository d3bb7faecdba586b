"""The offline W&B file of a run, read with W&B's own inspector."""

import contextlib
import json
from pathlib import Path

import pytest
import wandb
from helpers import inspect, wandb_file
from omegaconf import OmegaConf

from intern.runs.directory import Run
from intern.training.trackers import Tracker, tracking


@contextlib.contextmanager
def written(run, sweep=None):
    """A tracked run that is wholly on disk afterwards: W&B's helper process writes the end of its file on its own time."""
    values = {"project": "intern", "log_adapter": False, "sample_answers": 0}
    try:
        with tracking(values, OmegaConf.create({}), Run(run), "abc123", sweep) as tracker:
            yield tracker
    finally:
        wandb.teardown()  # waits until that process has ended


@pytest.fixture(scope="module")
def shown(trained_run):
    return inspect(trained_run)


def test_a_run_without_a_key_is_offline_and_finished(shown, trained_run):
    run = Run(trained_run)
    assert (shown["project"], shown["state"], shown["exit_code"]) == ("intern", "finished", 0)
    assert shown["run_id"] == run.read_json(run.environment)["run_id"]


def test_it_has_configuration_and_figures(shown, trained_run):
    run = Run(trained_run)
    assert shown["config"]["lora"]["r"] == 16
    assert set(shown["config"]) == {"seed", "model", "quant", "lora", "trainer", "data", "logger"}
    metrics = run.read_json(run.metrics)
    for name in ("optimizer_steps", "eval_loss", "tokens_per_second", "trainable_parameters"):
        assert shown["summary"][name] == pytest.approx(metrics[name]), name
    assert shown["summary"]["loss"] == pytest.approx(run.read_history()[-1]["loss"])


def test_it_has_sample_answers_as_a_table(shown, trained_run):
    assert (shown["summary"]["answers"]["ncols"], shown["summary"]["answers"]["nrows"]) == (3, 2)
    [table] = Path(trained_run).glob("wandb/offline-run-*/files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["question", "reference", "answer"]
    assert all(text for row in content["data"] for text in row[:2])


def test_it_has_the_adapter_as_an_artifact(shown, trained_run):
    content = wandb_file(trained_run).read_bytes()
    assert f"adapter-{shown['run_id']}".encode() in content and b"adapter_model.safetensors" in content


@pytest.mark.parametrize("sweep", ["ranks-42", None])
def test_the_runs_of_a_sweep_have_its_name_as_their_group(tmp_path, sweep):
    with written(tmp_path, sweep):
        pass
    assert (b"ranks-42" in wandb_file(tmp_path).read_bytes()) is (sweep is not None)


def test_a_crash_is_marked_as_one(tmp_path):
    with pytest.raises(ZeroDivisionError), written(tmp_path) as tracker:
        tracker.log({"step": 1, "loss": 2.0})
        raise ZeroDivisionError
    shown = inspect(tmp_path)
    assert shown["exit_code"] == 1 and shown["state"] != "finished"
    assert shown["summary"]["loss"] == 2.0


def test_without_a_logger_nothing_is_tracked(tmp_path):
    with tracking({}, OmegaConf.create({}), Run(tmp_path), "abc123", None) as tracker:
        assert isinstance(tracker, Tracker) and tracker.sample_answers == 0
        tracker.log({"step": 1})
        tracker.report(Run(tmp_path), {}, [])
    assert list(tmp_path.iterdir()) == []
