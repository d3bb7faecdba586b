"""Runs that are no longer needed -> free disk space: whole runs, or only their checkpoints. Never through a link, never while one trains."""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from intern.errors import UserError
from intern.runs.directory import PARTIAL_FILES, Run
from intern.runs.files import remove_file
from intern.runs.lock import lock

# What a run directory may hold. Anything else in it is the user's own, and stays. The order is that of the removal: a run without
# metrics.json is not taken for a finished one, and one without config.yaml is not taken for a run.
_OWN = (
    *("metrics.json", "checkpoints", "adapter", "evaluation", "wandb", "tensorboard", "memory.json", "prompt.json"),
    *(
        "environment.json",
        "history.jsonl",
        "loss.png",
        "terminal.log",
        "train.log",
        "failure.json",
        ".hydra",
        "config.yaml",
    ),
)
_LOCK = "run.lock"
_CHECKPOINT = re.compile(r"(damaged-)?checkpoint-\d+(\.\d+)?")


@dataclass(frozen=True)
class Removal:
    """What is removed of one run.

    Args:
        run: the run.
        paths: files and folders of it.
        size: bytes that this frees.
        left: names in its folder that stay: links, and what no run writes.
        whole: whether the run itself goes.
    """

    run: Run
    paths: list[Path]
    size: int
    left: list[str]
    whole: bool


def of_checkpoints(run: Run) -> Removal | None:
    """Return the removal of a run's checkpoints, None if it has none; links stay."""
    paths = list(_checkpoints(run))
    if not paths:
        return None
    left = [f"checkpoints/{name}" for name in _others_in_checkpoints(run)]
    return Removal(run, paths, sum(size_of(path) for path in paths), left, whole=False)


def of_run(run: Run) -> Removal:
    """Return the removal of everything that a run wrote."""
    names = sorted(
        (path.name for path in run.path.iterdir()), key=lambda name: _OWN.index(name) if name in _OWN else -1
    )
    foreign = [f"checkpoints/{name}" for name in _others_in_checkpoints(run)]
    paths = [run.path / name for name in names if _is_own(run.path / name) and (name != "checkpoints" or not foreign)]
    left = [name for name in sorted(names) if not _is_own(run.path / name) and name != _LOCK]
    if foreign:  # the folder stays for them; the checkpoints themselves go
        paths, left = [*_checkpoints(run), *paths], [*left, *foreign]
    return Removal(run, paths, sum(size_of(path) for path in paths), left, whole=True)


def _checkpoints(run: Run) -> Iterator[Path]:
    """Yield the folders of checkpoints, whole, damaged or unfinished, that training wrote."""
    if run.checkpoints.is_dir() and not run.checkpoints.is_symlink():
        for path in sorted(run.checkpoints.iterdir()):
            if _CHECKPOINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path


def _others_in_checkpoints(run: Run) -> list[str]:
    """Return the names in checkpoints/ that are the user's own."""
    if not run.checkpoints.is_dir() or run.checkpoints.is_symlink():
        return []
    return sorted({path.name for path in run.checkpoints.iterdir()} - {path.name for path in _checkpoints(run)})


def is_ours(run: Run) -> bool:
    """Return whether intern.train wrote this folder: another program's output/ may look like a run."""
    for file, keys in ((run.failure, {"error", "begins_anew"}), (run.metrics, {"schema_version", "train_loss"})):
        with contextlib.suppress(UserError, OSError):
            if keys <= run.read_json(file).keys():
                return True
    return False


def remove(removal: Removal) -> None:
    """Remove it, while holding the run's lock.

    Raises:
        BusyError: a process is training in the run now.
        UserError: something has become a link meanwhile.
        OSError: something cannot be removed; what was removed before stays removed.
    """
    run = removal.run
    with lock(run):
        for path in removal.paths:
            for part in (path.parent, path):
                if part != run.path and part.is_symlink():
                    raise UserError(f"{part}: has become a link: left as it is")
            if path.is_dir():
                shutil.rmtree(path)  # of links in it, only the links themselves
            else:
                remove_file(path, run.path)
        if not run.checkpoints.is_symlink():
            with contextlib.suppress(OSError):  # something of the user's own is in it, or it is not there
                run.checkpoints.rmdir()
        if removal.whole:
            remove_file(run.path / _LOCK, run.path)
    if removal.whole:
        with contextlib.suppress(OSError):  # something of the user's own is in it
            run.path.rmdir()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder. Links are not followed and count nothing."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    return sum(_sizes(path)) if stat.S_ISDIR(found.st_mode) else 0


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(place, name))  # noqa: PTH118  # a Path for each file takes most of the time
                if stat.S_ISREG(found.st_mode):
                    yield found.st_size


def _is_own(path: Path) -> bool:
    name = path.name
    is_draft = name.startswith((".adapter-", *PARTIAL_FILES))
    return (name in _OWN or is_draft) and not path.is_symlink()
