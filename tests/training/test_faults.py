"""What goes wrong around a run: kills, full and read-only disks, two processes, no server, training that is not healthy."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SHORT, command, train
from omegaconf import OmegaConf
from transformers import TrainerControl, TrainerState
from trl import SFTTrainer

from intern.errors import RunError, UserError
from intern.runs.directory import Run
from intern.training.health import EXPLOSION, Health
from intern.training.trackers import tracking
from intern.training.trainer import OptimizerSteps

BRIEF = ("data.eval_file=null", "trainer.max_steps=6", "trainer.min_steps=0", "trainer.save_steps=2")


def test_processes_that_are_killed_lose_nothing():
    line = [sys.executable, "scripts/torture.py", "--kills", "2", "--kinds", "file", "half", "--seed", "5"]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 2 |" in done.stdout
    assert "equals the uninterrupted run's bit for bit" in done.stdout


@pytest.mark.parametrize("where", ["optimizer.pt", "history.jsonl"])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(where, tmp_path):
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], check=False).returncode
    ):
        pytest.skip("needs the right to mount a small disk")
    try:
        run = Run(tmp_path / "run")
        left = {"optimizer.pt": 2**20, "history.jsonl": 0}  # bytes of room: enough for the weights, or for nothing
        filler = tmp_path / "filler"

        append = Run.append_history

        def fill(self, entry):
            if entry["step"] == 4:
                free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
                filler.write_bytes(b"x" * max(0, free - left[where]))
            append(self, entry)

        Run.append_history = fill
        try:
            with pytest.raises(RunError, match=f"{run.path}: No space left on device .*resume={run.path} goes on"):
                train(run.path, *BRIEF)
        finally:
            Run.append_history = append
        assert run.last_checkpoint() == run.checkpoints / "checkpoint-2" and not run.finished
        filler.unlink()
        assert train(run.path, *BRIEF).read_json(run.metrics)["optimizer_steps"] == 6
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_could_not_be_written_is_found_behind_the_libraries_own_errors(tmp_path):
    run = Run(tmp_path)
    for error in (
        OSError(errno.EROFS, "x"),
        RuntimeError(
            "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3: file write failed"
        ),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(RunError, match="Read-only file system|No space left"), run.told_when_full():
            try:
                raise error
            except Exception as inner:
                raise ValueError("of a library") from inner
    with pytest.raises(KeyError), run.told_when_full():
        raise KeyError("something else")


def test_a_folder_that_cannot_be_made_is_one_line():
    done = command("intern.train", *SHORT, "hydra.run.dir=/proc/run", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("/proc/run: cannot be written (") and "take another hydra.run.dir" in done.stderr


def test_a_second_process_in_a_run_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    code = f"import time; from intern.runs.directory import Run; from pathlib import Path\nwith Run(Path({str(tmp_path)!r})).lock(): print('locked', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"{tmp_path}: another process trains in it"):
        train(tmp_path, *BRIEF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock"]
    other.kill()
    other.wait()
    with Run(tmp_path).lock():
        pass


def test_a_server_that_cannot_be_reached_does_not_stop_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("intern.training.trackers._START", 2)
    run = Run(tmp_path)
    with tracking({"project": "x", "mode": "online"}, OmegaConf.create({}), run, "abc123", None) as tracker:
        tracker.log({"step": 1, "loss": 2.0})
    assert "W&B cannot be reached" in caplog.text and "`wandb sync` uploads it later" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


# --- health ---


def test_nothing_that_trains_ends_the_run(tmp_path):
    with pytest.raises(
        RunError, match="no weight of the adapter has changed in 10 optimizer steps: raise trainer.learning_rate"
    ):
        train(tmp_path / "run", *BRIEF, "trainer.learning_rate=1e-60", "trainer.max_steps=12")


def test_rows_without_a_token_to_learn_end_the_run(tmp_path, monkeypatch):
    collate = SFTTrainer.get_batch_samples

    def masked(self, *arguments):
        samples, tokens = collate(self, *arguments)
        for sample in samples:
            sample["labels"].fill_(-100)
        return samples, tokens

    monkeypatch.setattr(SFTTrainer, "get_batch_samples", masked)
    with pytest.raises(RunError, match="no token of the first batch carries loss"):
        train(tmp_path / "run", *BRIEF)


def health(run, **steps):
    model = torch.nn.Linear(2, 2)
    counted = OptimizerSteps(0, 5)
    for name, value in steps.items():
        setattr(counted, name, value)
    watch = Health(run, counted)
    watch.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    return watch, model


def test_weights_that_are_no_numbers_never_become_a_checkpoint(tmp_path):
    watch, model = health(Run(tmp_path))
    with torch.no_grad():
        model.bias[0] = float("nan")
    watch.on_step_end(None, TrainerState(), TrainerControl(), model=model)  # nothing is saved at this step
    with pytest.raises(
        RunError, match="no numbers any more at step 7: lower trainer.learning_rate; there is no checkpoint before it"
    ):
        watch.on_step_end(None, TrainerState(global_step=7), TrainerControl(should_save=True), model=model)


def test_gradients_that_are_no_numbers_end_a_run_without_loss_scaling(tmp_path):
    watch, _ = health(Run(tmp_path))
    logs = {"grad_norm": float("inf")}
    scaled = type("Optimizer", (), {"scaler": object()})()
    watch.on_log(None, TrainerState(), TrainerControl(), logs=logs, optimizer=scaled)  # fp16 skips the step
    with pytest.raises(RunError, match="the gradient norm is inf at step 3"):
        watch.on_log(None, TrainerState(global_step=3), TrainerControl(), logs=logs, optimizer=None)


def test_gradients_that_explode_are_a_warning_once(tmp_path, caplog):
    watch, _ = health(Run(tmp_path))
    for step, norm in enumerate([1.0, 2.0, 1.0, 1.0, 1.0, EXPLOSION * 0.9, EXPLOSION * 1.1, EXPLOSION * 2.0]):
        watch.on_log(None, TrainerState(global_step=step), TrainerControl(), logs={"grad_norm": norm})
    assert (
        caplog.text.count("the gradient norm is") == 1
        and "at step 6, over 100 times its median so far (1)" in caplog.text
    )


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RunError, match="(loss|norm|weights)"):
        train(
            tmp_path / "run",
            "trainer.learning_rate=1e30",
            "trainer.max_grad_norm=0",
            "trainer.warmup_steps=3",
            "trainer.save_steps=1",
        )
    run = Run(tmp_path / "run")
    state = json.loads((run.last_checkpoint() / "trainer_state.json").read_text())
    from safetensors.torch import load_file

    weights = load_file(run.last_checkpoint() / "adapter_model.safetensors")
    assert state["global_step"] >= 1 and all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not run.finished and not Path(run.adapter).exists()
