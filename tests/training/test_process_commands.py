"""The commands that train with several processes, as a user starts, stops and resumes them (docs/scale.md)."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, command, composed, run_directory
from hydra import compose, initialize_config_dir

import intern.train
from intern import processes
from intern.errors import RunError, UserError
from intern.paths import CONF_DIR
from intern.runs.directory import Run
from intern.training.launch import check_processes, processes_to_start, start_processes

TRAIN = [
    *("experiment=tiny_cpu", "logger=none", "data.context=never", "data.eval_file=null", "trainer.warmup_steps=0"),
    *("trainer.packing=false", "trainer.logging_steps=1", "trainer.max_steps=4", "trainer.min_steps=4"),
]
LONG = ["trainer.max_steps=400", "trainer.min_steps=400", "trainer.save_steps=200"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "mine.jsonl"
    lines = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:11]), encoding="utf-8")
    return f"data.train_file={file}"


def begun(run, *arguments):
    """A command that has trained a few steps, and the processes that it has started, by rank."""
    line = [sys.executable, "-m", *arguments, f"hydra.run.dir={run.path}"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (run.history.exists() and len(run.read_history()) > 2):
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(one[5:]): int(child) for one in variables if one.startswith(b"RANK=")}
    return process, ranks


@pytest.mark.parametrize(
    ("does", "outcome"),
    [
        ("exit 0", None),
        ("test $RANK = 0 && exit 2; sleep 30", 2),
        ("test $RANK = 1 && exit 143; sleep 30", 143),
        ("test $RANK = 1 && kill -9 $$; sleep 30", "process 1 of 2 was killed by SIGKILL (host memory?)"),
    ],
)
def test_the_first_process_that_fails_ends_all_and_decides_the_exit_code(does, outcome, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$WORLD_SIZE $*" >> {tmp_path}/calls\n{does}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    try:
        start_processes(2, ["lora.r=4"])
        ended = None
    except (SystemExit, RunError) as error:
        ended = error.code if isinstance(error, SystemExit) else str(error)
    assert ended == outcome and time.monotonic() - start < 20
    assert (tmp_path / "calls").read_text().splitlines() == ["2 -m intern.train lora.r=4"] * 2


def test_another_process_than_0_works_in_its_folder_with_a_log_file_of_its_own(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "announced", lambda name: {"hydra.run.dir": "/the run", "resume": "/the run"})
    overrides = intern.train._in_place(["lora.r=4", "resume=latest", "hydra.run.dir=elsewhere"])
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", overrides=overrides, return_hydra_config=True)
    assert (cfg.lora.r, cfg.resume, cfg.hydra.run.dir) == (4, "/the run", "/the run")
    handlers = cfg.hydra.job_logging.handlers
    assert handlers.file.filename == "/the run/train.rank1.log" and handlers.console.level == "ERROR"
    with pytest.raises(UserError, match="torchrun starts one run"):
        intern.train._in_place(["--multirun", "lora.r=4,8"])


@pytest.mark.parametrize(
    ("wanted", "stored", "torchrun", "count"),
    [(None, None, False, 1), (2, None, False, 2), (None, 2, False, 2), (1, 2, False, 1), (2, None, True, 1)],
)
def test_processes_are_started_as_configured_or_as_a_resumed_run_had_unless_torchrun_has(
    wanted, stored, torchrun, count, tmp_path, monkeypatch
):
    run = run_directory(tmp_path / "run", **({"num_processes": stored} if stored else {}))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if torchrun else ():
        monkeypatch.setenv(name, "1")
    assert processes_to_start(wanted, run, is_resumed=stored is not None) == count


def test_gpus_that_are_left_idle_are_said_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with caplog.at_level(logging.WARNING, "intern"):
        check_processes(composed("trainer=ampere"))
        check_processes(composed("experiment=tiny_cpu"))
    assert caplog.messages == ["GPUs are left idle: this machine has 4, and this run uses 1; num_processes=4 uses all"]


@pytest.mark.parametrize(
    "override",
    [
        "+trainer.train_sampling_strategy=group_by_length",
        "+trainer.accelerator_config={even_batches: false}",
        "+trainer.average_tokens_across_devices=false",
    ],
)
def test_keys_with_which_processes_cannot_share_a_step_are_refused_by_name(override, monkeypatch):
    check_processes(composed("experiment=tiny_cpu", override))
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    check_processes(composed("experiment=tiny_cpu"))
    key = override.lstrip("+").partition("=")[0]
    with pytest.raises(UserError, match=rf"{key}.*: leave it out, or train with one process"):
        check_processes(composed("experiment=tiny_cpu", override))


@pytest.mark.slow
def test_a_mistake_is_one_line_of_process_0_and_leaves_no_folder(rows, tmp_path):
    target = tmp_path / "run"
    done = command(
        "intern.train", "num_processes=2", *TRAIN, rows, "lora.r=400", f"hydra.run.dir={target}", check=False
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.endswith("lora.r=400: must be at most 256, the model's hidden size (set on the command line)")
    assert not target.exists()


@pytest.mark.slow
def test_sigterm_saves_once_and_the_run_resumes_with_as_many_processes(rows, tmp_path):
    run = Run(tmp_path / "run")
    process, ranks = begun(run, "intern.train", "num_processes=2", *TRAIN, *LONG, rows)
    assert sorted(ranks) == [0, 1]
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 143, said
    assert said.count("to resume: python -m intern.train") == 1 and "Traceback" not in said
    [checkpoint] = run.checkpoints.iterdir()
    more = int(checkpoint.name.rpartition("-")[2]) + 2
    assert "interrupted after step" in (run.path / "train.rank1.log").read_text()
    # Its config.yaml has 400 steps: a shorter run would be another one, so the end is brought near in the file.
    config = (
        run.config.read_text()
        .replace("max_steps: 400", f"max_steps: {more}")
        .replace("min_steps: 400", f"min_steps: {more}")
    )
    run.config.write_text(config)
    command("intern.train", f"resume={run.path}")
    assert run.read_json(run.metrics)["optimizer_steps"] == more
    assert run.read_json(run.environment)["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_run_in_seconds_and_is_named(killed, rows, tmp_path):
    run = Run(tmp_path / "run")
    process, ranks = begun(run, "intern.train", "num_processes=2", *TRAIN, *LONG, rows)
    os.kill(ranks[killed], signal.SIGKILL)
    said, _ = process.communicate(timeout=40)
    message = f"process {killed} of 2 was killed by SIGKILL (host memory?)"
    assert process.returncode == 1 and said.rstrip().endswith(message) and "Traceback" not in said
    assert json.loads(run.failure.read_text())["error"] == message


@pytest.mark.slow
def test_the_error_of_another_process_than_0_is_shown_with_its_number(rows, tmp_path):
    target = tmp_path / "run"
    (target / "train.rank1.log").mkdir(parents=True)  # where its messages would go
    done = command("intern.train", "num_processes=2", *TRAIN, rows, f"hydra.run.dir={target}", check=False)
    assert done.returncode == 1
    assert "process 1: " in done.stderr and "IsADirectoryError" in done.stderr
    assert "IsADirectoryError" in json.loads((target / "failure.json").read_text())["error"]


@pytest.mark.slow
def test_torchrun_trains_one_run_and_must_start_as_many_as_the_configuration_says(rows, tmp_path):
    target = tmp_path / "run"
    done = command(*TORCHRUN, "intern.train", *TRAIN, rows, f"hydra.run.dir={target}")
    run = Run(target)
    assert run.finished and run.read_config().num_processes == 2
    assert done.stderr.count("saved ") == 1 and done.stderr.count("step 4/4") == 1
    refused = command(
        *TORCHRUN, "intern.train", "num_processes=3", *TRAIN, rows, f"hydra.run.dir={tmp_path}/no", check=False
    )
    assert "num_processes=3, but torchrun has started 2: start 3, or give num_processes=2" in refused.stderr
    sweep = command(*TORCHRUN, "intern.train", "--multirun", *TRAIN, rows, "lora.r=4,8", check=False)
    assert "torchrun starts one run: for a sweep, leave out torchrun" in sweep.stderr


@pytest.mark.slow
def test_the_jobs_of_a_sweep_train_with_two_processes_each_if_they_are_commands(rows, tmp_path):
    swept = ["--multirun", "num_processes=2", *TRAIN, rows, "lora.r=4,8"]
    command("intern.train", *swept, "hydra/launcher=process", f"hydra.sweep.dir={tmp_path}/sweep")
    for job in ("0", "1"):
        run = Run(tmp_path / "sweep" / job)
        assert run.finished and run.read_json(run.environment)["processes"] == 2
    refused = command("intern.train", *swept, f"hydra.sweep.dir={tmp_path}/serial", check=False)
    assert refused.returncode == 2
    assert (
        "num_processes=2: the jobs of a sweep start them only with hydra/launcher=process, gpus or slurm"
        in refused.stderr
    )


@pytest.mark.slow
def test_verify_proves_that_two_processes_resume_exactly_with_dropout(rows, tmp_path):
    done = command(
        "intern.verify", "num_processes=2", *TRAIN[:5], rows, "lora.lora_dropout=0.1", "trainer.packing=false",
        f"hydra.run.dir={tmp_path}/verify",
    )  # fmt: skip
    assert done.stdout.count("| random states | ") == 2
    assert "ends bit for bit like one that never stopped" in done.stdout
