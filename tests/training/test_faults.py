"""What goes wrong around a run: kills, full and read-only disks, two processes."""

import errno
import os
import subprocess
import sys

import pytest
from helpers import ROOT, SHORT, command, train

from intern.errors import RunError, UserError
from intern.runs.directory import Run
from intern.runs.failures import explain_disk_errors
from intern.runs.lock import lock

BRIEF = ("data.eval_file=null", "trainer.max_steps=6", "trainer.min_steps=0", "trainer.save_steps=2")


@pytest.mark.slow
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
            with pytest.raises(RunError, match=f"{run.path}: No space left on device .*resume={run.path} resumes"):
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
        with pytest.raises(RunError, match="Read-only file system|No space left"), explain_disk_errors(run):
            try:
                raise error
            except Exception as inner:
                raise ValueError("of a library") from inner
    with pytest.raises(KeyError), explain_disk_errors(run):
        raise KeyError("something else")


def test_a_folder_that_cannot_be_made_is_one_line():
    done = command("intern.train", *SHORT, "hydra.run.dir=/proc/run", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("/proc/run: cannot be written (") and "choose another hydra.run.dir" in done.stderr


def test_a_second_process_in_a_run_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    code = f"import time; from intern.runs.directory import Run; from intern.runs.lock import lock; from pathlib import Path\nwith lock(Run(Path({str(tmp_path)!r}))): print('locked', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"{tmp_path}: another process trains in it"):
        train(tmp_path, *BRIEF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock"]
    other.kill()
    other.wait()
    with lock(Run(tmp_path)):
        pass
