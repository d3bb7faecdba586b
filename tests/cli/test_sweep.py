"""Sweeps of the tiny base: failures, memory, resuming, launchers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
from helpers import ROOT, SHORT, command, composed, inspect, wandb_file
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from intern.cli import sweep as jobs
from intern.display.plot import plot_sweep
from intern.errors import UserError
from intern.paths import CONF_DIR
from intern.runs.directory import Run
from intern.runs.find import resolve

FAST = (
    *SHORT[1:],
    "trainer.max_steps=4",
    "trainer.min_steps=4",
    "trainer.save_steps=1",
    "trainer.logging_steps=1",
    "trainer.save_total_limit=null",
    "trainer.warmup_steps=0",
    "trainer.max_grad_norm=0",
    "logger.sample_answers=0",
    "logger.log_adapter=false",
)
RATES = "trainer.learning_rate=1e-3,1e30,2e-3,3e-3"  # the second one fails in the second step
REASON = "adapter weights are NaN or infinite at step 1: lower trainer.learning_rate"


def again(folder, *overrides, **options):
    """The shared sweep's command."""
    line = (
        "--multirun",
        "experiment=[tiny_cpu,rank_sweep]",
        *FAST,
        "lora.r=4",
        RATES,
        f"hydra.sweep.dir={folder}",
        *overrides,
    )
    return command("intern.train", *line, check=False, **options)


def is_grouped(job):
    """Whether the tracked run's group is the sweep: the file has the length before each text, so the run's name does not match."""
    group = job.parent.name.encode()
    return bytes([len(group)]) + group in wandb_file(job).read_bytes()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Four jobs in one process, the second of which fails while it trains."""
    folder = tmp_path_factory.mktemp("sweep")
    probe = folder / "memory.jsonl"
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    callback = ("+hydra.callbacks.probe._target_=memory_probe.MemoryProbe", f"+hydra.callbacks.probe.target={probe}")
    done = again(folder / "ranks", *callback, PYTHONPATH=path, HF_DATASETS_CACHE=str(folder / "cache"))
    return folder / "ranks", done


def test_a_failed_job_does_not_end_the_others(sweep):
    folder, done = sweep
    assert [Run(folder / job).finished for job in "0123"] == [True, False, True, True], done.stderr
    assert done.returncode == 1
    assert f"job 1 (trainer.learning_rate=1e+30) failed: {REASON}" in done.stderr.splitlines()[-1]
    assert resolve(folder).path.name in "023" and "3 finished runs" in done.stderr


def test_each_message_of_a_sweep_is_a_line_and_the_last_ones_are_commands(sweep):
    folder, done = sweep
    assert "\\n" not in done.stderr and "\\t" not in done.stderr
    assert "] job 0: " in done.stderr
    told = [line.partition("next: ")[2] for line in done.stderr.splitlines() if "next: " in line]
    assert told == [
        f"python -m intern.evaluate run_dir={folder}",
        f"python -m intern.compare runs={folder}",
        f"python -m intern.query run_dir={folder} question='...'",
    ]


def test_a_failed_job_has_its_reason_and_its_traceback_in_its_own_folder(sweep):
    folder, done = sweep
    failure = json.loads((folder / "1" / "failure.json").read_text())
    assert failure["exit_code"] == 1 and failure["error"].startswith(REASON)
    assert "Traceback" in (folder / "1" / "train.log").read_text()
    assert "Traceback" not in done.stderr and done.stderr.count(REASON) == 2  # when it happened, and at the end
    for job in "023":
        assert REASON not in (folder / job / "train.log").read_text() and not (folder / job / "failure.json").exists()


def test_the_jobs_are_a_group_of_tracked_runs_with_their_own_states(sweep):
    folder, _ = sweep
    shown = [inspect(folder / job) for job in "0123"]
    assert [(one["state"] == "finished", one["exit_code"]) for one in shown] == [(True, 0), (False, 1), (True, 0), (True, 0)]  # fmt: skip
    assert len({one["run_id"] for one in shown}) == 4
    assert all(is_grouped(folder / job) for job in "0123")


def test_no_job_leaves_memory_behind_not_even_a_failed_one(sweep):
    folder, _ = sweep
    seen = [json.loads(line) for line in (folder.parent / "memory.jsonl").read_text().splitlines()]
    assert [one["modules"] for one in seen] == [seen[0]["modules"]] * 4
    assert seen[0]["modules"] < 50  # a model has more; this is what the libraries keep
    assert max(one["rss_mib"] for one in seen) < seen[0]["rss_mib"] + 50


def test_the_jobs_share_their_tokenized_data(sweep):
    folder, _ = sweep
    first_end = (folder / "0" / "metrics.json").stat().st_mtime
    made = [path.stat().st_mtime for path in (folder.parent / "cache").rglob("*.arrow")]
    assert len(made) >= 4 and max(made) < first_end


def test_a_sweep_ends_with_a_picture(sweep, tmp_path):
    folder, _ = sweep
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    points = [(1e-3, 8, 2.0), (1e-3, 16, 1.5), (2e-3, 8, 1.8), (2e-3, 16, 1.7)]
    searched = [(1e-4 * 1.5**trial, 2 ** (2 + trial % 3), 3 - trial / 10) for trial in range(12)]
    for name, shown in (("all", points), ("fewer", points[:3]), ("searched", searched)):
        plot_sweep(shown, tmp_path / f"{name}.png")
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 3


def test_a_stopped_sweep_resumes_where_it_was(sweep, tmp_path):
    folder, _ = sweep
    copy = tmp_path / "ranks"
    shutil.copytree(folder, copy)
    (copy / "3" / "metrics.json").unlink()  # job 3 as a kill after step 2 leaves it
    for step in (3, 4):
        shutil.rmtree(copy / "3" / "checkpoints" / f"checkpoint-{step}")
    failed_id = json.loads((copy / "1" / "environment.json").read_text())["run_id"]
    before = {job: (copy / job / "metrics.json").read_bytes() for job in "02"}
    done = again(copy)
    assert done.returncode == 1
    for job in "02":
        score = Run(copy / job).score()
        assert done.stderr.count(f"{copy / job} is finished, score {score:.4f}: not run again") == 1
        assert (copy / job / "metrics.json").read_bytes() == before[job]
    assert done.stderr.count("resuming from") == 1
    assert f"resuming from {copy}/3/checkpoints/checkpoint-2" in done.stderr
    assert [entry["step"] for entry in Run(copy / "3").read_history()] == [1, 2, 3, 4]
    assert Run(copy / "3").score() == pytest.approx(Run(folder / "3").score(), rel=1e-4)
    assert (
        f"job 1 (trainer.learning_rate=1e+30) failed: {REASON}" in done.stderr
    )  # from the beginning: its checkpoint of step 1 is gone
    assert json.loads((copy / "1" / "environment.json").read_text())["run_id"] != failed_id


def test_a_finished_job_is_skipped_only_if_its_configuration_is_the_same(sweep):
    from intern.training.finetune import finetune  # heavy, and the other tests have processes for it

    run = Run(sweep[0] / "0")
    given = ["experiment=[tiny_cpu,rank_sweep]", *FAST, "trainer.learning_rate=1e-3"]
    same, other = (composed(*given, f"lora.r={rank}") for rank in (4, 8))
    assert finetune(same, run, "ranks") == run.score()
    with pytest.raises(UserError, match="lora.r differs from what .* was started with"):
        finetune(other, run, "ranks")
    with pytest.raises(UserError, match="holds a finished run"):
        finetune(same, run)


@pytest.mark.slow
def test_several_devices_have_a_job_each_at_the_same_time(sweep, tmp_path):
    folder, _ = sweep
    done = again(tmp_path, "trainer.learning_rate=1e-3,2e-3", "hydra/launcher=gpus", "hydra.launcher.devices=[3,5]")
    assert done.returncode == 0, done.stderr
    runs = [Run(tmp_path / job) for job in "01"]
    assert {run.read_json(run.environment)["cuda_visible_devices"] for run in runs} == {"3", "5"}
    begun, ended = [run.config.stat().st_mtime for run in runs], [run.metrics.stat().st_mtime for run in runs]
    assert max(begun) < min(ended)
    assert runs[0].config.read_bytes() == (folder / "0" / "config.yaml").read_bytes()
    assert runs[0].score() == pytest.approx(Run(folder / "0").score(), rel=1e-4)
    assert all(is_grouped(run.path) for run in runs)


def test_ctrl_c_reaches_a_job_in_its_own_process_and_ends_the_sweep(tmp_path):
    line = [*SHORT, "logger=none", "trainer.max_steps=200", "trainer.logging_steps=1", "lora.r=2,4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "intern.train", "--multirun", *line, f"hydra.sweep.dir={tmp_path}", "hydra/launcher=process"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(Run(tmp_path / "0").read_history()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)  # between looks at another process's file; the deadline above bounds the wait
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"sweep stopped; to resume: the same command with hydra.sweep.dir={tmp_path}" in stderr
    assert Run(tmp_path / "0").last_checkpoint() is not None and not (tmp_path / "1" / "config.yaml").exists()


@pytest.mark.slow
def test_submitit_runs_each_job_and_a_failed_one_alone_fails(tmp_path):
    slurm = ("hydra/launcher=slurm", "hydra.launcher.cluster=local")
    done = again(tmp_path, "trainer.learning_rate=1e30,1e-3", "lora.r=4", *slurm)
    assert done.returncode == 1, done.stderr
    assert f"job 0 (trainer.learning_rate=1e+30) failed: {REASON}" in done.stderr
    assert Run(tmp_path / "1").finished


@pytest.mark.parametrize("launcher", ["serial", "process"])
def test_all_mistakes_of_all_jobs_are_named_before_the_first_one_starts(tmp_path, launcher):
    done = again(tmp_path, "lora.r=0,4", "trainer.learning_rate=1e-3,-1", f"hydra/launcher={launcher}")
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()
    assert said[0].startswith(
        "job 0 (lora.r=0 trainer.learning_rate=0.001), job 1 (lora.r=0 trainer.learning_rate=-1): lora.r=0: must"
    )
    assert said[1].startswith("job 3 (lora.r=4 trainer.learning_rate=-1): trainer.learning_rate=-1: must be at least 0")
    assert said[2].endswith("3 of 4 jobs cannot run, so none was started: see above") and len(said) == 3
    assert not (tmp_path / "0" / "config.yaml").exists() and not (tmp_path / "1" / "config.yaml").exists()


def test_a_sweep_says_how_far_it_is_and_which_job_is_the_best_so_far(sweep):
    _, done = sweep
    assert "4 jobs, all checked; the same in all: lora.r=4 experiment=[tiny_cpu,rank_sweep]" in done.stderr
    ended = [line.partition("] ")[2] for line in done.stderr.splitlines() if " of 4" in line and "; " in line]
    assert re.match(
        r"job 0 done after \d+ \w+, 1 of 4; 3 left, about .* one after another; best so far: job 0 ", ended[0]
    )
    assert re.match(r"job 1 failed after \d+ \w+, 2 of 4; 2 left", ended[1])
    assert "left" not in ended[3] and re.search(
        r"best so far: job [023] \(trainer.learning_rate=\S+\), golden loss ", ended[3]
    )
    assert f"python -m intern.evaluate run_dir={sweep[0]}" in done.stderr


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        (["hydra/launcher=gpus"], "hydra.launcher.devices=all: no CUDA GPU found; hydra/launcher=process needs none"),
        (["hydra/launcher=slurm"], "hydra.launcher: Could not detect"),
    ],
)
def test_a_launcher_that_cannot_work_here_says_so_in_one_line(tmp_path, launcher, message):
    done = again(tmp_path, *launcher, CUDA_VISIBLE_DEVICES="", PATH="/nowhere")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_rank_sweep_combines_with_any_other_experiment():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for order in ("tiny_cpu,rank_sweep", "rank_sweep,tiny_cpu"):
            cfg = compose("train", overrides=[f"experiment=[{order}]"], return_hydra_config=True)
            assert cfg.hydra.mode.name == "MULTIRUN" and cfg.trainer.max_steps == 200
            assert set(cfg.hydra.sweeper.params) == {"lora.r", "trainer.learning_rate"}


SEARCHED = """
import math, os, hydra
from intern.paths import CONF_DIR

@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="train")
def task(cfg):
    print("tried", cfg.lora.r, cfg.trainer.learning_rate)
    rate = cfg.trainer.learning_rate
    return math.nan if rate < 1e-4 else float(os.environ["SIGN"]) * math.log10(rate)

task()
"""


def test_a_search_follows_scores_and_seed_and_survives_failures(tmp_path):
    (tmp_path / "task.py").write_text(SEARCHED)
    space = ["lora.r=4,8,16", "trainer.learning_rate=tag(log,interval(1e-5,1e-1))"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=16", "hydra.sweeper.n_jobs=2", "hydra.output_subdir=null"]
    tried = {}
    for sign in ("-1", "+1"):
        line = [sys.executable, "task.py", "--multirun", *search, *space, "hydra.sweep.dir=sweep"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SIGN": sign}
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
        tried[sign] = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("tried")]
    assert len(tried["+1"]) == len(tried["-1"]) == 16
    assert tried["+1"][:10] == tried["-1"][:10]  # drawn by the seed
    assert tried["+1"][10:] != tried["-1"][10:]  # chosen by the scores
    assert any(float(rate) < 1e-4 for _, rate in tried["+1"][:10])  # one that fails


def test_a_search_for_nothing_says_so_in_one_line(tmp_path):
    done = command("intern.train", "--multirun", "hydra/sweeper=optuna", f"hydra.sweep.dir={tmp_path}", check=False)
    assert done.returncode == 2 and done.stderr.startswith("hydra/sweeper=optuna: nothing to search; give lora.r=")
    assert done.stderr.count("\n") == 1


def test_a_failed_job_frees_what_its_frames_held(monkeypatch):
    class Model:
        pass

    held = []

    def train():
        model = Model()
        held.append(weakref.ref(model))
        try:
            raise ValueError("first")
        except ValueError as error:
            raise RuntimeError("second") from error

    monkeypatch.setattr(jobs, "record", jobs.SweepRecord())
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"job": {"num": 0}}}))
    try:
        train()
    except RuntimeError as error:
        kept = error  # the error keeps the model alive
    assert held[0]() is not None
    score = jobs.record_failure(kept)
    assert score != score and held[0]() is None
