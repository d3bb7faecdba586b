"""run_dir= or resume= -> the run that is meant: a path, "latest", "best", or the best job of a sweep."""

import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from intern.errors import UserError
from intern.runs.directory import Run

log = logging.getLogger(__name__)

RUN_ROOTS = ("outputs", "multirun")  # where Hydra puts runs, in the working directory
_DEEPEST = 8  # levels below the folder that is searched
_MOST_FOLDERS = 100_000
_INSIDE_A_RUN = {"adapter", "checkpoints", "evaluation", "wandb", ".hydra"}


def resolve(run_dir: str | Path | None, root: Path | None = None) -> Run:
    """Return the finished run that the user means.

    Args:
        run_dir: a run's folder; a folder of runs such as a sweep's (its best job); "latest" or "best", among all runs below
            outputs/ and multirun/ of `root`.
        root: the folder of outputs/ and multirun/; the working directory by default.

    Raises:
        UserError: there is no such run, or it is unfinished.
    """
    root = root or Path.cwd()
    if run_dir is None or not str(run_dir).strip():
        raise UserError(f"run_dir={'null' if run_dir is None else run_dir}: give a run's folder, latest or best")
    if str(run_dir) in ("latest", "best"):
        runs = [run for name in RUN_ROOTS for run in runs_below(root / name)]
        if not runs:
            raise UserError(
                f"run_dir={run_dir}: no finished run below {root}/outputs or {root}/multirun: train one, or give its path"
            )
        return (
            max(runs, key=lambda run: run.metrics.stat().st_mtime)
            if str(run_dir) == "latest"
            else min(runs, key=Run.score)
        )
    path = Path(str(run_dir)).expanduser()
    path = path if path.is_absolute() else root / path
    if not path.is_dir():
        raise UserError(f"run_dir={run_dir}: no such folder")
    run = Run(path.resolve())
    if run.finished:
        return run
    if run.config.is_file():
        raise UserError(
            f"run_dir={run_dir}: this run is unfinished (no metrics.json); to resume it: "
            f"python -m intern.train {shlex.quote(f'resume={run.path}')}"
        )
    runs = list(runs_below(path))
    if not runs:
        raise UserError(f"run_dir={run_dir}: neither a run (no config.yaml) nor a folder of finished runs")
    return min(runs, key=Run.score)


def find_unfinished(run_dir: str | Path, root: Path | None = None) -> Run:
    """Return the run that resume= means.

    Args:
        run_dir: a run's folder, or "latest": the newest unfinished run below outputs/ and multirun/ of `root`.
        root: the working directory by default.

    Raises:
        UserError: there is no such run, or one of its files or folders is a link, through which training would write.
    """
    root = root or Path.cwd()
    if str(run_dir) == "latest":
        found = [Run(folder.resolve()) for name in RUN_ROOTS for folder in _folders_with(root / name, "config.yaml")]
        runs = [run for run in found if not run.finished]
        if not runs:
            raise UserError(f"resume=latest: no unfinished run below {root}/outputs or {root}/multirun")
        run = max(runs, key=lambda run: max(file.lstat().st_mtime for file in (run.config, run.history) if _is(file)))
    else:
        run = Run((root / Path(run_dir).expanduser()).resolve())
        if not run.config.is_file():
            raise UserError(f"resume={run_dir}: no run there that can be resumed (no config.yaml)")
    for path in sorted(run.path.iterdir()):
        if path.is_symlink():
            raise UserError(
                f"{path}: is a link, and a run that is resumed is written to: put the files themselves there"
            )
    return run


def runs_below(folder: Path) -> Iterator[Run]:
    """Yield the finished runs in a folder and its subfolders, in the order of their paths."""
    for found in _folders_with(folder, "metrics.json"):
        if (run := Run(found.resolve())).config.is_file():
            yield run


def _folders_with(folder: Path, name: str) -> list[Path]:
    """Return the folders that have a regular file of this name, sorted. Links are not followed."""
    found = []
    for count, (place, folders, files) in enumerate(os.walk(folder)):
        if count == _MOST_FOLDERS:
            log.warning("%s: more than %d folders; only these were searched for runs", folder, _MOST_FOLDERS)
            break
        if name in files and _is(Path(place) / name):
            found.append(Path(place))
        depth = len(Path(place).relative_to(folder).parts)
        is_run = "config.yaml" in files
        folders[:] = [
            inner
            for inner in folders
            if depth < _DEEPEST and inner != ".hydra" and not (is_run and inner in _INSIDE_A_RUN)
        ]
    return sorted(found)


def _is(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()
