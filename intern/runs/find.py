"""run_dir= or resume= -> the run that is meant: a path, a name, "latest", "best", or the best job of a sweep."""

import difflib
import logging
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.names import called, given_name
from intern.runs.ranking import rank
from intern.runs.state import State, state_of, why_unfinished

log = logging.getLogger(__name__)

RUN_ROOTS = ("outputs", "multirun")  # where Hydra puts runs, in the working directory
_DEEPEST = 8  # levels below the folder that is searched
_MOST_FOLDERS = 100_000
_INSIDE_A_RUN = {"adapter", "checkpoints", "evaluation", "wandb", ".hydra"}


def resolve(run_dir: str | Path | None, root: Path | None = None) -> Run:
    """Return the finished run that the user means; if it had to be chosen, a line of the log says which one it is.

    Args:
        run_dir: a run's folder or name; a folder of runs such as a sweep's (its best job); "latest" or "best", among all runs below
            outputs/ and multirun/ of `root`.
        root: the folder of outputs/ and multirun/; the working directory by default.

    Raises:
        UserError: there is no such run, it is unfinished, or the best of runs that were scored on different rows was asked for.
    """
    root = root or Path.cwd()
    runs = resolve_all(run_dir, root)
    if str(run_dir) == "latest":
        run = max(runs, key=lambda run: run.metrics.stat().st_mtime)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.metrics.stat().st_mtime))
        log.info("run_dir=latest: %s, finished %s", called(run, root), when)
        return run
    if len(runs) == 1 and str(run_dir) != "best":
        return runs[0]
    return best_of(runs, str(run_dir), root)


def resolve_all(run_dir: str | Path | None, root: Path | None = None) -> list[Run]:
    """Return all finished runs that `run_dir` stands for: one, those of a folder such as a sweep's, or all for "latest" and "best".

    Args:
        run_dir: as for `resolve`.
        root: the folder of outputs/ and multirun/; the working directory by default.

    Raises:
        UserError: there is none, or the run is unfinished.
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
        return runs
    path = Path(str(run_dir)).expanduser()
    path = path if path.is_absolute() else root / path
    named = [] if path.is_dir() else _named(str(run_dir), root)
    if not path.is_dir() and not named:
        if path.is_file():
            raise UserError(f"run_dir={run_dir}: is a file; unpack a packed run and give the folder that was in it")
        near = difflib.get_close_matches(str(run_dir), _names(root), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"run_dir={run_dir}: no such folder, and no run below outputs/ or multirun/ has this name{hint}"
        )
    if len(named) > 1 and (finished := [run for run in named if run.finished]):
        return finished
    run = named[0] if named else Run(path.resolve())
    if run.finished:
        return [run]
    if run.config.is_file():
        remedy = {
            State.RUNNING: "wait until it has finished",
            State.FAILED: "fix the cause and train again",
        }.get(state_of(run), f"to resume it: python -m intern.train {shlex.quote(f'resume={run.path}')}")
        raise UserError(f"run_dir={run_dir}: this run is not finished ({why_unfinished(run)}): {remedy}")
    runs = list(runs_below(path))
    if not runs:
        raise UserError(f"run_dir={run_dir}: neither a run (no config.yaml) nor a folder of finished runs")
    return runs


def find_any(asked: str, root: Path | None = None) -> Run:
    """Return the run that the user means, finished or not.

    Args:
        asked: as for `resolve`.
        root: the folder of outputs/ and multirun/; the working directory by default.

    Raises:
        UserError: there is no such run.
    """
    root = root or Path.cwd()
    path = root / Path(asked).expanduser()
    if asked not in ("latest", "best"):
        named = [] if path.is_dir() else _named(asked, root)
        run = named[0] if len(named) == 1 else Run(path.resolve())
        if run.config.is_file() or _is(run.failure) or _is(run.path / "train.log"):
            return run
    return resolve(asked, root)


def best_of(runs: list[Run], asked: str, root: Path) -> Run:
    """Return the run with the lowest score, if all were scored on the same rows.

    Args:
        runs: finished runs. If some have a golden loss, those that only have a training loss are not considered.
        asked: what the user asked for, such as "best" or a sweep's folder.
        root: folders below it are shown without this part.

    Raises:
        UserError: no run has a score, or they were scored on different rows.
    """
    groups = rank(runs)
    if not groups:
        raise UserError(f"run_dir={asked}: none of the {len(runs)} finished runs has a score that can be read")
    rivals = [group for group in groups if group.rows.golden] or groups
    if len(rivals) > 1:
        bests = [
            f"of {len(group.runs)} on {group.rows.name or 'unknown rows'}: run_dir={shlex.quote(_short(group.best.path, root))}"
            for group in rivals
        ]
        raise UserError(
            f"run_dir={asked}: the {sum(len(group.runs) for group in rivals)} finished runs were scored on different rows, so their losses "
            f"cannot be compared; name a run or a folder of runs. The best {'; the best '.join(bests)}"
        )
    best = rivals[0]
    left_out = len(runs) - len(best.runs)
    log.info(
        "run_dir=%s: %s, %s, the best of %d%s",
        asked,
        called(best.best, root),
        best.score,
        len(best.runs),
        f" ({left_out} without a golden loss not considered)" if left_out else "",
    )
    return best.best


def runs_called(name: str, root: Path | None = None) -> list[Run]:
    """Return the runs that were given this name, or else the jobs of a sweep that was: NAME/0, NAME/1 and so on; finished or not.

    Args:
        name: as given with name=.
        root: the folder of outputs/ and multirun/; the working directory by default.
    """
    root = root or Path.cwd()
    folders = [folder for place in RUN_ROOTS for folder in _folders_with(root / place, "config.yaml")]
    names = [(given_name(run), run) for run in (Run(folder.resolve()) for folder in folders)]
    found = [run for given, run in names if given == name]
    return found or [run for given, run in names if given and given.startswith(f"{name}/")]


def _names(root: Path) -> list[str]:
    """Return the names of all runs, and those of sweeps."""
    folders = [folder for place in RUN_ROOTS for folder in _folders_with(root / place, "config.yaml")]
    given = [name for folder in folders if (name := given_name(Run(folder)))]
    return sorted({one for name in given for one in (name, name.rpartition("/")[0]) if one})


def _named(name: str, root: Path) -> list[Run]:
    """Return the one run of this name, or the jobs of a sweep.

    Raises:
        UserError: several runs have the name, apart from a sweep's jobs.
    """
    found = runs_called(name, root)
    if len(found) > 1 and given_name(found[0]) == name:
        places = ", ".join(_short(run.path, root) for run in found)
        raise UserError(f"{name}: {len(found)} runs have this name: give the folder of one: {places}")
    return found


def _short(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def find_unfinished(run_dir: str | Path, root: Path | None = None) -> Run:
    """Return the run that resume= means.

    Args:
        run_dir: a run's folder or name, or "latest": the newest unfinished run below outputs/ and multirun/ of `root`.
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
        path = root / Path(run_dir).expanduser()
        named = [] if path.exists() else _named(str(run_dir), root)
        run = named[0] if len(named) == 1 else Run(path.resolve())
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
