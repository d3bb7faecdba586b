"""Trackers, read back with their own tools: the offline W&B file of a run with W&B's inspector, event files with TensorBoard's reader."""

import contextlib
import json
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import wandb
from helpers import composed, inspect, train, wandb_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from intern.errors import UserError
from intern.runs.directory import Run
from intern.training import trackers
from intern.training.trackers import TrackedRun, check_logger, track


@contextlib.contextmanager
def written(run, sweep=None):
    """A tracked run that is completely on disk afterwards: W&B's helper process writes the end of its file in its own time."""
    settings = check_logger(composed("logger.log_adapter=false", "logger.sample_answers=0").logger)
    try:
        with track(settings, TrackedRun(Run(run), {}, "abc123", sweep)) as tracker:
            yield tracker
    finally:
        wandb.teardown()  # waits until that process has ended


@pytest.fixture(scope="module")
def shown(trained_run):
    return inspect(trained_run)


# --- W&B ---


def test_a_run_without_a_key_is_offline_and_finished(shown, trained_run):
    run = Run(trained_run)
    assert (shown["project"], shown["state"], shown["exit_code"]) == ("intern", "finished", 0)
    assert shown["run_id"] == run.read_json(run.environment)["run_id"]


def test_it_has_configuration_and_metrics(shown, trained_run):
    run = Run(trained_run)
    assert shown["config"]["lora"]["r"] == 16
    own = {"seed", "name", "notes", "num_processes"}
    assert set(shown["config"]) == {*own, "model", "quant", "lora", "trainer", "data", "logger"}
    metrics = run.read_json(run.metrics)
    for name in ("optimizer_steps", "eval_loss", "tokens_per_second", "trainable_parameters"):
        assert shown["summary"][name] == pytest.approx(metrics[name]), name
    assert shown["summary"]["loss"] == pytest.approx(run.read_history()[-1]["loss"])


def test_it_has_the_runs_name_and_notes(trained_run):
    stored = wandb_file(trained_run).read_bytes()  # before each text its length
    for text in (b"first try", b"To share it."):
        assert bytes([len(text)]) + text in stored


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


def test_plots_have_training_steps_on_their_axis(tmp_path):
    from wandb.proto.wandb_internal_pb2 import MetricRecord

    with written(tmp_path) as tracker:
        tracker.log({"step": 40, "loss": 2.0})
    defined = MetricRecord(glob_name="*", step_metric="step").SerializeToString()
    assert defined in wandb_file(tmp_path).read_bytes()


def test_a_crash_is_marked_as_one(tmp_path):
    with pytest.raises(ZeroDivisionError), written(tmp_path) as tracker:
        tracker.log({"step": 1, "loss": 2.0})
        raise ZeroDivisionError
    shown = inspect(tmp_path)
    assert shown["exit_code"] == 1 and shown["state"] != "finished"
    assert shown["summary"]["loss"] == 2.0


def test_a_server_that_cannot_be_reached_does_not_stop_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("intern.training.trackers.wandb._START_TIMEOUT", 2)
    settings = check_logger(composed("logger.mode=online").logger)
    with track(settings, TrackedRun(Run(tmp_path), {}, "abc123")) as tracker:
        tracker.log({"step": 1, "loss": 2.0})
    assert "W&B cannot be reached" in caplog.text and "`wandb sync` uploads it later" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


# --- TensorBoard, several at once, and none ---


def scalars(run):
    """{name: {step: value}} as TensorBoard shows it."""
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_a_resumed_run_with_several_trackers_has_one_value_for_each_step_in_all_of_them(tmp_path):
    overrides = ("logger=[wandb,tensorboard]", "logger.mode=offline", "logger.log_adapter=false")
    counts = ("logger.sample_answers=1", "logger.tensorboard.sample_answers=3")
    run = train(tmp_path / "run", *overrides, *counts)
    wandb.teardown()
    first = scalars(run)
    history = {entry["step"]: entry for entry in run.read_history() if "loss" in entry}
    assert first["loss"] == pytest.approx({step: entry["loss"] for step, entry in history.items()})
    assert first["learning_rate"][4] == pytest.approx(history[4]["learning_rate"])
    metrics = run.read_json(run.metrics)
    assert first["final/eval_loss"] == {12: pytest.approx(metrics["eval_loss"])}
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    [answers] = events.Tensors("answers/text_summary")
    assert answers.tensor_proto.string_val[0].decode().count("\n") == 4  # a heading, a rule, and three answers
    [configuration] = events.Tensors("configuration/text_summary")
    assert "learning_rate: 0.002" in configuration.tensor_proto.string_val[0].decode()
    shown = inspect(run.path)
    assert shown["summary"]["loss"] == pytest.approx(history[12]["loss"])
    assert shown["summary"]["answers"]["nrows"] == 1

    run.metrics.unlink()  # as a kill after step 10 leaves it, whose log entries of steps 8 and 10 are in the trackers
    shutil.rmtree(run.checkpoints / "checkpoint-12")
    again = train(run.path, *overrides, *counts)
    wandb.teardown()
    assert again.read_json(again.metrics)["optimizer_steps"] == 12
    assert scalars(again)["loss"] == first["loss"]


def test_tensorboard_marks_where_a_run_resumes(tmp_path):
    settings = check_logger(composed("logger=tensorboard").logger)
    for step, last in ((0, 9), (6, 7)):
        with track(settings, TrackedRun(Run(tmp_path), {"seed": 1}, "abc123", step=step)) as tracker:
            for logged in range(step + 1, last + 1):
                tracker.log({"step": logged, "loss": 10.0 * step + logged, "state": "text"})
    assert list(scalars(Run(tmp_path))) == ["loss"]
    assert scalars(Run(tmp_path))["loss"] == {**{step: step for step in range(1, 7)}, 7: 67}


def test_without_a_logger_nothing_is_tracked(tmp_path):
    with track(check_logger(composed("logger=none").logger), TrackedRun(Run(tmp_path), {}, "abc123")) as tracker:
        assert tracker.sample_answers == 0
        tracker.log({"step": 1})
        tracker.report({}, [])
    assert list(tmp_path.iterdir()) == []


def test_every_tracker_is_finished_even_if_another_one_fails_to(tmp_path, monkeypatch):
    settings = check_logger(composed("logger=[wandb,tensorboard]").logger)
    assert set(settings) == {"wandb", "tensorboard"}
    ended = []

    class Opened:
        def __init__(self, name):
            self.name = name

        def finish(self, succeeded):
            ended.append((self.name, succeeded))
            raise OSError(self.name)

    for name in settings:
        monkeypatch.setattr(
            f"intern.training.trackers.{name}.open_tracker", lambda *_, name=name: Opened(name), raising=True
        )
    with pytest.raises(OSError, match="wandb"), track(settings, TrackedRun(Run(tmp_path), {}, "abc123")):
        pass
    assert [name for name, _ in ended] == ["tensorboard", "wandb"] and ended[0][1] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+logger.tensorbord.flush_secs=3"], "logger.tensorbord: unknown key; did you mean logger.tensorboard?"),
        (["logger=tensorboard", "+logger.tensorboard.flush=3"], "did you mean logger.tensorboard.flush_secs?"),
        (
            ["logger=tensorboard", "logger.tensorboard.flush_secs=soon"],
            "logger.tensorboard.flush_secs='soon': must be a",
        ),
        (["logger=tensorboard", "logger.tensorboard.flush_secs=0"], "flush_secs=0: must be at least 1 second"),
        (["logger=tensorboard", "logger.tensorboard.sample_answers=-1"], "sample_answers=-1: must be at least 0"),
        (["logger=tensorboard", "logger.tensorboard=5"], "logger.tensorboard=5: must be a group of keys"),
    ],
)
def test_a_mistake_in_a_trackers_keys_is_named(overrides, message):
    with pytest.raises(UserError) as caught:
        check_logger(composed(*overrides).logger)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tracker_that_is_not_installed_is_one_line_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger=tensorboard needs TensorBoard: pip install 'intern\[tensorboard\]'"):
        check_logger(composed("logger=tensorboard").logger)


TABLE = '''
    """A tracker as someone would add it: numbers as lines of text."""

    from dataclasses import dataclass

    from intern.config.build import build


    @dataclass(frozen=True)
    class Settings:
        file: str
        sample_answers: int = 0


    class Table:
        def __init__(self, path):
            self.path = path

        def log(self, entry):
            with self.path.open("a") as file:
                file.write(f"{entry['step']} {entry.get('loss')}\\n")

        def report(self, metrics, samples):
            self.log({"step": metrics["optimizer_steps"], "loss": len(samples)})

        def finish(self, succeeded):
            self.log({"step": "finished", "loss": succeeded})


    def check(values, group):
        return build(Settings, values, group)


    def open_tracker(settings, tracked):
        return Table(tracked.run.path / settings.file)
'''


def test_a_tracker_is_added_with_a_module_and_a_yaml_file(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "table.py").write_text(textwrap.dedent(TABLE))
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    (tmp_path / "conf" / "logger" / "table.yaml").write_text("table:\n  file: losses.txt\n  sample_answers: 2\n")
    monkeypatch.setattr(trackers, "__path__", [*trackers.__path__, str(tmp_path / "package")])
    cfg = composed("logger=table", f"hydra.searchpath=[file://{tmp_path / 'conf'}]")
    with track(check_logger(cfg.logger), TrackedRun(Run(tmp_path), {}, "abc123")) as tracker:
        assert tracker.sample_answers == 2
        tracker.log({"step": 1, "loss": 2.5})
        tracker.report({"optimizer_steps": 3}, [{}, {}, {}])
    assert (tmp_path / "losses.txt").read_text() == "1 2.5\n3 2\nfinished True\n"
