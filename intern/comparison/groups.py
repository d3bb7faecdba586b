"""Folders of runs -> all their runs in order, grouped by what their scores were measured on, with the best run of each group."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from intern.comparison.columns import columns
from intern.comparison.reader import FinishedRun, OtherRun, read_run
from intern.config.suggestions import unknown
from intern.errors import UserError
from intern.evaluation.metrics import METRICS, Place, metrics_at
from intern.runs.find import RUN_ROOTS, runs_called

_ALWAYS_SHOWN = ("lora.r", "trainer.learning_rate")
_FIRST_IF_DIFFERENT = ("lora.lora_alpha", "lora.scale")  # without them, a sweep over ranks cannot be read
_UNGROUPED = ("trainable_parameters", "tokens_per_second", "peak_memory_gib", "train_seconds")


@dataclass(frozen=True)
class RunGroup:
    """Runs whose scores were measured on the same rows: only these are ranked against each other."""

    mark: str  # A, B, ... in the table
    name: str  # the file whose rows were scored
    runs: list[FinishedRun]
    best: FinishedRun | None  # None: no run of the group has the value


@dataclass(frozen=True)
class Runs:
    """All runs below some folders."""

    finished: list[FinishedRun]  # in the order of the table
    others: list[OtherRun]
    groups: list[RunGroup]
    best_by: str  # the column that the best run is chosen by
    missing: str | None  # the column that was asked for and that no run has
    evaluation: str | None  # the folder in RUN/evaluation that metrics are from
    differing: list[str]  # config keys whose values are not the same in all finished runs

    @property
    def ranked(self) -> list[RunGroup]:
        """Return the groups that have a best run."""
        return [group for group in self.groups if group.best is not None]

    @property
    def best(self) -> FinishedRun | None:
        """Return the best run, None if several groups have one."""
        return self.ranked[0].best if len(self.ranked) == 1 else None

    def is_best(self, run: FinishedRun) -> bool:
        """Return whether the run is the best one of its group."""
        return any(run is group.best for group in self.groups)

    def mark(self, run: FinishedRun) -> str:
        """Return the mark of the run's group."""
        return next(group.mark for group in self.groups if any(one is run for one in group.runs))


def given_paths(runs: str | Sequence[str] | None) -> list[str]:
    """Return the paths of `runs=a,b`, `runs=[a,b]` or a list; a path that exists is taken whole even if it has a comma.

    Args:
        runs: as given; None for the folders in which Hydra puts runs.
    """
    if runs is None:
        return [name for name in RUN_ROOTS if Path(name).is_dir()]
    if not isinstance(runs, str):
        return [str(one) for one in runs]
    if Path(runs).expanduser().exists() or _matches(runs):
        return [runs]
    return [part for one in runs.strip("[]").split(",") if (part := one.strip().strip("'\""))]


def read_runs(paths: Sequence[str], sort_by: str, evaluation: str | None) -> Runs:
    """Read every run below `paths`.

    Args:
        paths: folders or globs.
        sort_by: a column or a config key such as lora.r.
        evaluation: the folder in RUN/evaluation to read; None for the one that most runs have.

    Raises:
        UserError: a path that does not exist, no run at all, no column or key called `sort_by`, or no evaluation of this name.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in run_folders(path)))
    if not folders:
        raise UserError(
            f"runs={','.join(paths) or 'null'}: no run there: train one, or give the folder of a run or a sweep"
        )
    evaluation = _chosen_evaluation(folders, evaluation)
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    read = [read_run(folder, str(folder.relative_to(shared)), evaluation) for folder in folders]
    finished = _told_apart([one for one in read if isinstance(one, FinishedRun)], shared)
    keys = sorted({key for one in finished for key in one.config})
    sort_by = _present_name(sort_by)
    if finished and sort_by not in columns() and sort_by not in keys:
        raise UserError(f"sort_by={unknown(sort_by, [*columns(), *keys])}")
    is_ranked = sort_by in columns() and columns()[sort_by].higher_is_better is not None
    missing = sort_by if is_ranked and not any(sort_by in one.values for one in finished) else None
    best_by = sort_by if is_ranked and not missing else "score"
    groups = _groups(finished, best_by)
    in_groups = [one for group in groups for one in group.runs]
    return Runs(
        finished=in_groups if is_ranked else sorted(finished, key=lambda one: _place(one, sort_by)),
        others=[one for one in read if isinstance(one, OtherRun)],
        groups=groups,
        best_by=best_by,
        missing=missing,
        evaluation=evaluation,
        differing=_differing(finished, keys),
    )


def _told_apart(finished: list[FinishedRun], shared: Path) -> list[FinishedRun]:
    """Return the runs with their folders after names that several of them have."""
    counts = Counter(one.name for one in finished)
    return [
        replace(one, name=f"{one.name} ({one.run.path.relative_to(shared)})") if counts[one.name] > 1 else one
        for one in finished
    ]


def shown_keys(runs: Runs) -> list[str]:
    """Return the config keys of the table: rank and learning rate if there are any, then those that differ."""
    return [key for key in _ALWAYS_SHOWN if any(key in one.config for one in runs.finished)] + runs.differing


def _differing(finished: list[FinishedRun], keys: list[str]) -> list[str]:
    differing = [key for key in keys if len({one.config.get(key) for one in finished}) > 1 and key not in _ALWAYS_SHOWN]
    return sorted(differing, key=lambda key: key not in _FIRST_IF_DIFFERENT)


def _groups(finished: list[FinishedRun], best_by: str) -> list[RunGroup]:
    """Group the runs by what `best_by` was measured on; the best run comes first in each group, the largest group first."""
    names: dict[str, str] = {}
    by_data: dict[str, list[FinishedRun]] = {}
    for one in finished:
        name, digest = _measured_on(one, best_by)
        names.setdefault(digest or name, name)
        by_data.setdefault(digest or name, []).append(one)
    groups = []
    for data, runs in by_data.items():
        ranked = sorted(runs, key=lambda one: _place(one, best_by))
        groups.append(RunGroup("", names[data], ranked, ranked[0] if best_by in ranked[0].values else None))
    groups.sort(key=lambda group: (group.best is None, -len(group.runs), group.name))
    return [replace(group, mark=_mark(number)) for number, group in enumerate(groups)]


def _measured_on(one: FinishedRun, column: str) -> tuple[str, str | None]:
    """Return the name and the identity of the rows that a value was measured on."""
    if column in _UNGROUPED:
        return "", None
    if column in metrics_at(Place.COMPARE):
        return (one.evaluated_file, one.evaluated_data) if column in one.values else ("not evaluated", None)
    if column == "eval_loss" and "eval_loss" not in one.values:
        return "without golden rows", None
    rows = one.eval_rows if column in ("score", "eval_loss") and one.eval_rows is not None else one.train_rows
    return rows.name, rows.identity and f"{'golden' if rows.golden else 'training'} rows: {rows.identity}"


def _mark(number: int) -> str:
    """Return A to Z, then AA, AB, ..."""
    return (_mark(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def _place(one: FinishedRun, sort_by: str) -> tuple[bool, float, str]:
    """Return a key that sorts the best run first and runs without the value last."""
    if sort_by in columns():
        value = one.values.get(sort_by)
        sign = -1 if columns()[sort_by].higher_is_better else 1
        return value is None, sign * (value or 0.0), ""
    text = one.config.get(sort_by)
    try:
        return text is None, float(text or 0), ""
    except ValueError:
        return text is None, 0.0, text or ""


def _present_name(column: str) -> str:
    """Return the present name of a metric that was renamed."""
    return next((name for name, metric in METRICS.items() if column and column == metric.former_name), column)


def run_folders(path: str) -> Iterator[Path]:
    """Yield the run directories at or below a path or glob, or of a name, finished or not; nothing below a run is searched."""
    given = Path(path).expanduser()
    starts = [given] if given.is_dir() else _matches(path)
    # A folder that the user names may be a link; a link that a glob finds leads to other people's runs, and .hydra is no run.
    starts = [
        start
        for start in starts
        if start.is_dir() and (start == given or not (start.is_symlink() or start.name.startswith(".")))
    ]
    if not starts:
        named = runs_called(path)
        if not named:
            raise UserError(f"runs={path}: no such folder, and no run below outputs/ or multirun/ has this name")
        yield from (run.path for run in named)
    for start in starts:
        for here, folders, files in os.walk(start.resolve()):
            begun = ".hydra" in folders or "train.log" in files
            if "config.yaml" in files or (begun and "multirun.yaml" not in files):
                folders.clear()
                yield Path(here)
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def _matches(pattern: str) -> list[Path]:
    given = Path(pattern).expanduser()
    return sorted(Path(given.anchor).glob(str(given.relative_to(given.anchor))))


def _chosen_evaluation(folders: list[Path], wanted: str | None) -> str | None:
    """Return the evaluation that was asked for, or the one that most runs have: of several, the first by name.

    Raises:
        UserError: no run has the one that was asked for.
    """
    names: Counter[str] = Counter()
    for folder in folders:
        with contextlib.suppress(OSError):  # a run without evaluations, or one that cannot be listed
            below = sorted((folder / "evaluation").iterdir())
            names.update(one.name for one in below if (one / "metrics.json").is_file())
    if wanted is None:
        return min(names, key=lambda name: (-names[name], name)) if names else None
    if str(wanted) not in names:
        known = f"there are {', '.join(sorted(names))}" if names else "python -m intern.evaluate run_dir=... makes one"
        raise UserError(f"evaluation={wanted}: no run has an evaluation of this name: {known}")
    return str(wanted)
