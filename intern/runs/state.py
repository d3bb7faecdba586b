"""A run directory -> whether its run is finished, running, failed or interrupted, and why."""

import contextlib
import fcntl
import os
import re
from enum import StrEnum

from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.files import open_file

_LOG_END = 65_536  # bytes at the end of train.log and history.jsonl that are searched for the last error or step
_STEP = re.compile(r'"step": ?(\d{1,12})\b')


class State(StrEnum):
    """What can be said of a run."""

    FINISHED = "finished"  # metrics.json is there, which is written last
    RUNNING = "running"  # a process has locked it
    FAILED = "failed"  # it ended with an error, and starts again
    INTERRUPTED = "interrupted"  # it was stopped, and can be resumed


def state_of(run: Run) -> State:
    """Return the state of a run."""
    if is_locked(run):
        return State.RUNNING
    if run.finished:
        return State.FINISHED
    failure = _failure(run)
    if failure is not None and not failure.get("begins_anew") and run.checkpoints.is_dir():
        return State.INTERRUPTED  # a full disk, for example: its checkpoints are good
    return State.FAILED if failure is not None or _last_error(run) else State.INTERRUPTED


def is_locked(run: Run) -> bool:
    """Return whether a process is training in a run directory now."""
    with contextlib.suppress(OSError, UserError), open_file(run.path / "run.lock", run.path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def why_unfinished(run: Run) -> str:
    """Return the reason why a run has no metrics: that it is still training, its last error, or how far training came."""
    step = last_step(run)
    after = f"; step {step} was the last one logged" if step is not None else ""
    if is_locked(run):
        return f"still training{after}"
    if (failure := _failure(run)) is not None and isinstance(failure.get("error"), str):
        return f"failed: {failure['error']}"
    if error := _last_error(run):
        return f"failed: {error}"
    return f"{State.INTERRUPTED}{after}"


def last_step(run: Run) -> int | None:
    """Return the last step in history.jsonl, None if there is none."""
    steps = _STEP.findall(_end(run, "history.jsonl"))
    return int(steps[-1]) if steps else None


def _failure(run: Run) -> dict[str, object] | None:
    try:
        return run.read_json(run.failure) if run.failure.is_file() else None
    except (UserError, OSError):
        return None


def _last_error(run: Run) -> str | None:
    """Return the last error in train.log."""
    lines = _end(run, "train.log").splitlines()
    errors = [number for number, line in enumerate(lines) if "[ERROR] " in line]
    if not errors:
        return None
    last = lines[errors[-1] :]
    if any(line.startswith("Traceback") for line in last):
        return next((line for line in reversed(last) if line.strip()), "").strip()
    return last[0].split("[ERROR] ", 1)[1].strip()


def _end(run: Run, name: str) -> str:
    """Return the end of a text file of the run; empty if there is none, or it is a link."""
    try:
        with open_file(run.path / name, run.path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END))
            return file.read(_LOG_END).decode("utf-8", errors="replace")
    except (OSError, UserError):
        return ""
