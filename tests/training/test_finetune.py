"""Training runs of the tiny base with the real libraries on the CPU."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import GOLDEN, ROOT, SHORT, command, train
from safetensors.torch import load_file

from intern.display.plot import plot_loss
from intern.errors import RunError, UserError
from intern.model.quant import build_quant
from intern.runs.directory import Run

LAYERS = json.loads((ROOT / "data" / "tiny_llama3" / "config.json").read_text())["num_hidden_layers"]


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finetune") / "run")


def test_a_run_directory_has_everything_it_promises(run):
    names = {path.name for path in run.path.iterdir()}
    assert names >= {
        "config.yaml",
        "adapter",
        "checkpoints",
        "metrics.json",
        "history.jsonl",
        "environment.json",
        "prompt.json",
        "loss.png",
    }
    adapter = {path.name for path in run.adapter.iterdir()}
    assert adapter >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"}
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]
    metrics = json.loads(run.metrics.read_text())
    assert metrics["schema_version"] == 1
    assert (metrics["optimizer_steps"], metrics["skipped_steps"], metrics["train_rows"]) == (12, 0, 1166)
    assert metrics["eval_rows"] == 64 and 1 < metrics["eval_loss"] < 20
    assert metrics["peak_host_rss_gib"] > 0.1 and metrics["tokens_per_second"] > 10
    environment = json.loads(run.environment.read_text())
    assert environment["packages"]["trl"] and set(environment["data"]) == {
        str(path) for path in (ROOT / "data" / "train.jsonl", GOLDEN)
    }
    assert run.loss_plot.read_bytes().startswith(b"\x89PNG")


def test_the_log_has_a_line_for_every_logged_step(run):
    history = run.read_history()
    assert [entry["step"] for entry in history] == [2, 4, 6, 8, 10, 12]
    assert [entry["optimizer_steps"] for entry in history] == [2, 4, 6, 8, 10, 12]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(entry["tokens_per_second"] > 0 and entry["grad_norm"] > 0 for entry in history)


def test_every_adapter_weight_moves(run, tmp_path):
    trained, untouched = weights(run), weights(train(tmp_path / "still", "trainer.learning_rate=0"))
    assert len(trained) == LAYERS * 7 * 2  # layers x linear layers x (A, B)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert [name for name in trained if torch.equal(trained[name], untouched[name])] == []
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(ROOT / "data" / "tiny_llama3")


def test_the_configuration_of_a_run_is_resolved_and_means_the_same_from_everywhere(run):
    cfg = run.read_config()
    assert cfg.model.pretrained_model_name_or_path == str(ROOT / "data" / "tiny_llama3")
    assert cfg.data.train_file == str(ROOT / "data" / "train.jsonl")
    assert "${" not in run.config.read_text()


def test_the_same_seed_gives_the_same_losses_and_the_same_adapter_and_another_seed_does_not(run, tmp_path):
    same, other = train(tmp_path / "same"), train(tmp_path / "other", "seed=43")
    losses = [[entry["loss"] for entry in one.read_history()] for one in (run, same, other)]
    assert losses[0] == losses[1] != losses[2]
    ours, theirs = weights(run), weights(same)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_min_steps_outlasts_a_short_epoch_plan(tmp_path, rows_file):
    rows = [{"question": f"How much {number}?", "answer": "It rose 18%."} for number in range(8)]
    run = train(
        tmp_path / "run",
        f"data.train_file={rows_file(*rows)}",
        "trainer.max_steps=-1",
        "trainer.num_train_epochs=1",
        "data.eval_file=null",
    )
    metrics = run.read_json(run.metrics)
    assert metrics["optimizer_steps"] == 12  # one epoch of 8 rows is one step
    assert "eval_loss" not in metrics and run.score() == metrics["train_loss"]


SCORED = (
    "trainer.eval_strategy=steps",
    "trainer.eval_steps=2",
    "trainer.save_steps=2",
    "trainer.load_best_model_at_end=true",
)


@pytest.mark.slow
def test_the_best_checkpoint_becomes_the_adapter_if_requested(tmp_path):
    # Turned around, so that the first evaluation is the best one: the golden loss falls from there.
    run = train(tmp_path / "run", *SCORED, "+trainer.greater_is_better=true", "trainer.save_total_limit=1")
    metrics = run.read_json(run.metrics)
    losses = {entry["step"]: entry["eval_loss"] for entry in run.read_history() if "eval_loss" in entry}
    assert losses[2] == max(losses.values()) and losses[12] < losses[2] - 0.1
    assert metrics["best_step"] == 2
    assert math.isclose(metrics["eval_loss"], losses[2], rel_tol=0.02)


def test_training_stops_early_but_not_before_min_steps(tmp_path):
    # A rate of zero: no evaluation is ever better than the first.
    run = train(
        tmp_path / "run", *SCORED, "trainer.learning_rate=0", "trainer.early_stopping_patience=1", "trainer.min_steps=6"
    )
    metrics = run.read_json(run.metrics)
    assert (metrics["optimizer_steps"], metrics["best_step"]) == (6, 2)


@pytest.fixture
def few_golden_rows(rows_file):
    """Evaluations that take no time."""
    lines = (ROOT / "data" / "golden_test_set.jsonl").read_text(encoding="utf-8").splitlines()
    return f"data.eval_file={rows_file(*lines[:6], name='golden.jsonl')}"


def test_early_stopping_keeps_its_count_over_a_resume(tmp_path, few_golden_rows):
    overrides = [
        *SCORED,
        few_golden_rows,
        "trainer.save_total_limit=null",
        "trainer.learning_rate=0",
        "trainer.early_stopping_patience=3",
        "trainer.min_steps=2",
    ]
    run = train(tmp_path / "run", *overrides)
    whole = run.read_json(run.metrics)
    assert (whole["optimizer_steps"], whole["best_step"]) == (8, 2)  # the first is the best, three more are no better
    last = run.read_history()[-1]
    assert (last["stopped_early"], last["step"], last["best_step"]) == (True, 8, 2)
    for killed in ("before the last evaluation", "after it"):
        run.metrics.unlink()
        if killed == "before the last evaluation":
            shutil.rmtree(run.checkpoints / "checkpoint-8")
        again = train(run.path, *overrides)
        assert again.read_json(again.metrics)["optimizer_steps"] == 8, killed
        steps = [entry["step"] for entry in again.read_history()]
        assert (steps.count(8), max(steps)) == (3, 8), killed  # loss, evaluation, early stop


@pytest.mark.parametrize("metric", ["eval_f1", pytest.param("eval_rouge_l", marks=pytest.mark.slow)])
def test_the_best_checkpoint_can_be_chosen_by_the_answers(tmp_path, few_golden_rows, metric):
    plain = [*SCORED, few_golden_rows, "trainer.learning_rate=1e-2", "trainer.eval_steps=4", "trainer.save_steps=4"]
    run = train(tmp_path / "run", *plain, f"trainer.metric_for_best_model={metric}", "trainer.eval_answers=3")
    metrics = run.read_json(run.metrics)
    scores = {entry["step"]: entry[metric] for entry in run.read_history() if metric in entry}
    assert sorted(scores) == [4, 8, 12] and all(0 <= score <= 1 for score in scores.values())
    assert len(set(scores.values())) > 1
    assert metrics["best_step"] == max(scores, key=lambda step: scores[step])  # the first of equals
    assert metrics["best_metric"] == max(scores.values())
    unasked = train(tmp_path / "unasked", *plain)
    assert not any(metric in entry for entry in unasked.read_history())
    losses = [[entry["loss"] for entry in one.read_history() if "loss" in entry] for one in (run, unasked)]
    assert losses[0] == losses[1]  # generating answers leaves training as it was


def test_the_picture_shows_which_step_was_kept(run, tmp_path):
    history = [{"step": 3, "optimizer_steps": 2, "eval_loss": 2.0, "eval_f1": 0.1}, *run.read_history()]
    for name, kept, shown in (("plain", None, history[1:]), ("kept", 4, history[1:]), ("answers", None, history)):
        plot_loss(shown, tmp_path / f"{name}.png", kept)
    plot_loss(history, tmp_path / "base.png", None, 3.5)
    plot_loss(history, tmp_path / "titled.png", None, 3.5, "costs $5, $6 and a name of a run")
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 5


@pytest.mark.parametrize(
    ("overrides", "shows"),
    [
        (["trainer.packing=false"], lambda run: run.read_json(run.metrics)["train_tokens"] < 12 * 400),  # a row a step
        (["data.context=mixed"], lambda run: run.read_json(run.prompt)["context"] == "mixed"),
        (["quant=none"], lambda run: build_quant(run.read_config().quant) is None),
        (["lora=dora"], lambda run: any("magnitude" in name for name in weights(run))),
        (
            ["trainer.activation_checkpointing=true"],
            lambda run: run.read_config().trainer.activation_checkpointing is True,
        ),
    ],
    ids=["unpacked", "mixed", "unquantized", "dora", "checkpointed"],
)
def test_the_other_ways_to_train_work(tmp_path, overrides, shows):
    run = train(tmp_path / "run", *overrides)
    history = run.read_history()
    assert run.read_json(run.metrics)["optimizer_steps"] == 12
    assert min(entry["loss"] for entry in history[1:]) < history[0]["loss"]
    assert shows(run)


def test_a_finished_run_is_not_overwritten(run):
    before = run.metrics.read_bytes()
    with pytest.raises(UserError, match="holds a finished run"):
        train(run.path)
    assert run.metrics.read_bytes() == before


@pytest.mark.parametrize("write", ["write_history", "write_config", "write_json"])
def test_a_finished_run_whose_extension_cannot_be_written_stays_finished(run, tmp_path, monkeypatch, write):
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    before = copy.metrics.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(copy.history))

    monkeypatch.setattr(Run, write, full)
    with pytest.raises(RunError, match="No space left"):
        train(copy.path, "trainer.max_steps=18")
    assert copy.finished and copy.metrics.read_bytes() == before
    assert not list(copy.path.glob(".metrics*"))


def test_bad_data_ends_a_run_before_the_model_is_touched(tmp_path, rows_file):
    bad = rows_file({"question": "q", "answer": "a"}, '{"question"')
    done = command("intern.train", *SHORT, f"data.train_file={bad}", f"hydra.run.dir={tmp_path}/run", check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        rf"\[[0-9:]+\] {re.escape(str(bad))}:2: not JSON \(.*\): each line holds one JSON object\n", done.stderr
    )
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_no_gpu_is_one_line_with_the_remedy(tmp_path):
    done = command("intern.train", f"hydra.run.dir={tmp_path}/run", check=False, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "no CUDA GPU found, and trainer.use_cpu is false: experiment=tiny_cpu runs everything on a CPU\n"
    )
    assert done.stderr.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = command("intern.train", *SHORT, "model=llama3_8b", f"hydra.run.dir={tmp_path}/run", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "model.pretrained_model_name_or_path=meta-llama/Meta-Llama-3-8B-Instruct: not in the local cache" in done.stderr
    )


def test_a_large_model_on_a_cpu_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 4096, "vocab_size": 128256})
    )
    done = command(
        "intern.train",
        *SHORT,
        f"model.pretrained_model_name_or_path={tmp_path}",
        f"hydra.run.dir={tmp_path}/run",
        check=False,
    )
    assert done.returncode == 2 and "needs a CUDA GPU; experiment=tiny_cpu runs here" in done.stderr


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path):
    target = tmp_path / "run"
    overrides = [*SHORT, "logger=none", "trainer.max_steps=40", "trainer.logging_steps=1", f"hydra.run.dir={target}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "intern.train", *overrides], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(Run(target).read_history()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)  # between looks at another process's file; the deadline above bounds the wait
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    stopped = int(
        re.search(r"interrupted after step (\d+); to resume: python -m intern.train resume=", stderr).group(1)
    )
    assert 3 <= stopped < 40 and not (target / "metrics.json").exists()
    done = command("intern.train", *overrides)
    assert f"resuming from {target}/checkpoints/checkpoint-{stopped}" in done.stderr
    run = Run(target)
    assert run.read_json(run.metrics)["optimizer_steps"] == 40
    assert [entry["step"] for entry in run.read_history()] == list(range(1, 41))


def test_a_run_resumes_only_with_the_same_configuration_and_data(tmp_path, rows_file):
    data = rows_file(*({"question": f"How much {number}?", "answer": "18%."} for number in range(8)))
    same = [f"data.train_file={data}", "data.eval_file=null"]
    run = train(tmp_path / "run", *same)
    run.metrics.unlink()
    before = run.config.read_bytes()
    with pytest.raises(UserError, match="lora.r differs from what .* was started with"):
        train(run.path, *same, "lora.r=4")
    data.write_text(data.read_text() + '{"question": "One more?", "answer": "Yes."}\n')
    with pytest.raises(UserError, match="rows.jsonl has changed since"):
        train(run.path, *same)
    assert run.config.read_bytes() == before


def test_a_nan_or_infinite_loss_ends_the_run(tmp_path):
    from intern.errors import RunError

    with pytest.raises(RunError, match="the loss is (nan|inf) at step"):
        train(tmp_path / "run", "trainer.learning_rate=1e30", "trainer.max_grad_norm=0", "trainer.warmup_steps=0")
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_run_that_was_killed_after_its_last_step_is_finished_without_another_step(tmp_path):
    first = train(tmp_path / "run")
    before = weights(first)
    first.metrics.unlink()
    again = train(tmp_path / "run")
    metrics = again.read_json(again.metrics)
    assert metrics["optimizer_steps"] == 12
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(again).items())
    assert [entry["step"] for entry in again.read_history()] == [2, 4, 6, 8, 10, 12]
