"""Compared runs -> the table for terminal and Markdown, and what has to be said about it."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from intern.comparison.columns import columns
from intern.comparison.groups import Runs, shown_keys
from intern.comparison.reader import FinishedRun
from intern.display.table import least_width, natural_width
from intern.evaluation.bootstrap import FEW, FEW_MARK
from intern.evaluation.metrics import METRICS, Place, metrics_at
from intern.runs.find import runs_called
from intern.runs.state import State

STAR = "★"
_IN_TERMINAL = (
    "trainable_parameters",
    "train_loss",
    "eval_loss",
    "token_f1",
    "tokens_per_second",
    "peak_memory_gib",
    "train_seconds",
)
_LEAST_TELLING = ("trainable_parameters", "train_loss", "train_seconds", "tokens_per_second", "peak_memory_gib")
_MOST_KEYS = 4  # config columns in the terminal besides rank and learning rate
_MOST_NAMED = 5  # runs in a note
_LONGEST = 60  # characters of a config value; longer ones, such as prompts, are in compare.csv only
_LEAST_PREFIX = 8  # characters that are worth leaving out
_INTERVAL = re.compile(r"(\[\S+,) (?=\S+\])")
GROUP = "on"


def table(runs: Runs, chosen: Sequence[FinishedRun], brief: bool) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows.

    Args:
        runs: all compared runs.
        chosen: those that get a row.
        brief: leave out what does not fit into a terminal.
    """
    keys = [key for key in shown_keys(runs) if key not in long_keys(runs)]
    least = len(keys) - sum(key in runs.differing for key in keys)
    keys = keys[: least + _MOST_KEYS] if brief else keys
    shown = {
        name: column
        for name, column in columns().items()
        if (not brief or name in (*_IN_TERMINAL, runs.best_by)) and any(name in one.values for one in runs.finished)
    }
    if any("eval_loss" in one.values for one in runs.finished) and brief:
        shown.pop("score", None)  # the same number again
    grouped = len(runs.ranked) > 1
    cells = [_without_shared_folder([one.config.get(key, "") for one in chosen]) for key in keys]
    rows = [
        [
            f"{STAR} {one.name}" if runs.is_best(one) else one.name,
            *([runs.mark(one)] if grouped else []),
            *(column[index] for column in cells),
            *(_value(one, name) for name in shown),
            *([] if brief else [one.gpu or "CPU"]),
        ]
        for index, one in enumerate(chosen)
    ]
    # The last part of a key is enough, unless two keys have the same one.
    last = [key.rsplit(".", 1)[-1] for key in keys]
    headings = [short if last.count(short) == 1 and brief else key for short, key in zip(last, keys, strict=True)]
    labels = [column.label for column in shown.values()]
    return ["run", *([GROUP] if grouped else []), *headings, *labels, *([] if brief else ["machine"])], rows


def narrowed(
    headings: list[str], rows: list[list[str]], width: int, keep: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return the table without the least telling columns, so that its wrapped cells fit a terminal.

    Args:
        headings, rows: of `table`.
        width: characters of the terminal.
        keep: headings that are never left out; the first column never is either.
    """
    if natural_width(headings, rows) <= width:
        return headings, rows
    rows = [[_INTERVAL.sub(r"\1", cell) for cell in row] for row in rows]  # an interval is not broken in two
    for heading in _order_of_leaving(headings):
        if least_width(headings, rows) <= width:
            break
        if heading in headings[1:] and heading not in keep:
            gone = headings.index(heading, 1)
            headings, *rows = ([cell for index, cell in enumerate(row) if index != gone] for row in (headings, *rows))
    return headings, rows


def without_shared_prefix(names: list[str]) -> tuple[str, list[str]]:
    """Return what all names begin with, up to a separator, and the names with an ellipsis in its place.

    Args:
        names: of runs; left as they are if there is only one, or if little would be saved.
    """
    shared = re.sub(r"[^/_=,. -]*$", "", os.path.commonprefix(names))  # noqa: RUF071  # by character is meant
    if len(names) < 2 or len(shared) < _LEAST_PREFIX:
        return "", names
    return shared, [f"…{name[len(shared) :]}" for name in names]


def _order_of_leaving(headings: list[str]) -> list[str]:
    values = [column.label for column in columns().values()]
    least_telling = [columns()[name].label for name in _LEAST_TELLING]
    keys = [heading for heading in headings if heading not in values and heading != GROUP]
    rest = [label for label in values if label not in least_telling]
    return [*least_telling, *reversed(keys[1:]), *reversed(rest)]


def long_keys(runs: Runs) -> list[str]:
    """Return the config keys that differ but whose values are too long for a table."""
    return [key for key in runs.differing if any(len(one.config.get(key, "")) > _LONGEST for one in runs.finished)]


def _without_shared_folder(values: list[str]) -> list[str]:
    """Return paths below the folder that all of them share; other values as they are."""
    paths = [Path(value) for value in values]
    if len(set(values)) < 2 or not all(path.is_absolute() for path in paths):
        return values
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


def _value(one: FinishedRun, name: str) -> str:
    if name not in one.values:
        return ""
    form = columns()[name].form
    low, high = one.bounds.get(name, (None, None))
    bounds = f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    return f"{one.values[name]:{form}}{bounds}{f' {FEW_MARK}' if name in one.few else ''}"


def others(runs: Runs, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the runs that cannot be compared as headings and rows; overrides that all of them share are left out.

    Args:
        runs: all runs.
        most: rows at most, None for all.
    """
    shared = set.intersection(*(set(one.arguments) for one in runs.others)) if len(runs.others) > 1 else set()
    rows = [
        [one.name, one.reason, " ".join(argument for argument in one.arguments if argument not in shared)]
        for one in runs.others[:most]
    ]
    return (
        (["run", "why", "overrides"], rows) if any(row[2] for row in rows) else (["run", "why"], [r[:2] for r in rows])
    )


def notes(runs: Runs) -> list[str]:
    """Return what makes values unreliable, or incomparable within a column."""
    found = []
    if any(one.few for one in runs.finished):
        found.append(f"{FEW_MARK} fewer than {FEW} rows: too few to rely on.")
    if trained := [one.name for one in runs.finished if one.trained_rows]:
        named = ", ".join(trained[:_MOST_NAMED]) + (", ..." if len(trained) > _MOST_NAMED else "")
        found.append(f"Evaluated on rows that they were trained on, among others: {named}.")
    if len({one.eval_rows.identity for one in runs.finished if one.eval_rows is not None}) > 1:
        found.append("Eval losses were measured on different golden files: they cannot be compared across these.")
    if len({one.evaluated_data for one in runs.finished if one.evaluated_data}) > 1:
        found.append(
            f"The evaluations {runs.evaluation!r} were made on different golden files: their metrics cannot be compared across these."
        )
    if len({"eval_loss" in one.values for one in runs.finished}) > 1:
        found.append("Some runs have no eval loss: their score is the train loss, which is not comparable with it.")
    if len({one.gpu for one in runs.finished}) > 1:
        found.append("The runs were made on different machines: tokens/s, memory and time depend on these.")
    if keys := long_keys(runs):
        found.append(f"Too long for a table, see compare.csv: {', '.join(keys)}.")
    return found


def advice(runs: Runs, paths: list[str], everything: bool) -> list[str]:
    """Return the best run of each group, the shortest way to name it for other commands, and how to get a missing value.

    Args:
        runs: all compared runs.
        paths: the folders they were looked for in.
        everything: whether these are all folders in which Hydra puts runs.
    """
    if not runs.finished:
        return [_nothing_to_compare(runs)]
    lines = [_how_to_get(runs, paths)] if runs.missing else []
    for group in runs.ranked:
        assert group.best is not None
        alone = len(runs.ranked) == 1
        name = str(group.best.run.path)
        if runs.best_by == "score" and alone and everything:
            name = "best"
        elif runs.best_by == "score" and alone and len(paths) == 1 and Path(paths[0]).expanduser().is_dir():
            name = paths[0]
        place = "" if alone else f"{group.mark}: {group.name} ({_counted(len(group.runs))}): "
        value = _value(group.best, runs.best_by)
        lines += [
            f"{place}{STAR} best by {quality(runs)} {value}: {group.best.run.path}",
            f"use it: python -m intern.query {shlex.quote(f'run_dir={name}')} question='...'",
        ]
    lacking = sum(runs.best_by not in one.values for one in runs.finished)
    if lacking and runs.best_by in metrics_at(Place.COMPARE):
        counted = f"{lacking} of the {_counted(len(runs.finished), 'finished ')}"
        lines.append(
            f"{counted} without {columns()[runs.best_by].label}: {_how_to_evaluate(runs, runs.best_by, paths)}."
        )
    return lines


def _nothing_to_compare(runs: Runs) -> str:
    """Return why there is no table, and what to do about it."""
    stopped = [one for one in runs.others if one.reason.startswith(State.INTERRUPTED)]
    resume = ""
    if stopped:
        command = f"python -m intern.train {shlex.quote(f'resume={stopped[0].path}')}"
        resume = f" {_counted(len(stopped))} can be resumed, such as: {command}"
    return f"Nothing can be compared: no run is finished, for the reasons above.{resume}"


def _how_to_evaluate(runs: Runs, metric: str, paths: list[str]) -> str:
    """Return the command that measures a metric of all compared runs, or of one of them if no one folder holds all."""
    needs = f" {METRICS[metric].needs}" if METRICS[metric].needs else ""
    lacking = [one for one in runs.finished if metric not in one.values]
    holds_all = len(paths) == 1 and (Path(paths[0]).expanduser().is_dir() or bool(runs_called(paths[0])))
    is_folder = holds_all and len(lacking) > 1
    run_dir = paths[0] if is_folder else str(lacking[0].run.path)
    each = ", for each run" if len(lacking) > 1 and not is_folder else ""
    return f"python -m intern.evaluate {shlex.quote(f'run_dir={run_dir}')}{needs} measures it{each}"


def _how_to_get(runs: Runs, paths: list[str]) -> str:
    missing = str(runs.missing)
    if missing in metrics_at(Place.COMPARE):
        how = _how_to_evaluate(runs, missing, paths)
    elif missing == "eval_loss":
        how = "train with data.eval_file=... to measure it"
    else:
        how = "the runs' metrics.json lack it"
    return (
        f"sort_by={missing}: none of the {_counted(len(runs.finished), 'finished ')} has a {columns()[missing].label}: {how}. "
        "Sorted by score instead."
    )


def _counted(count: int, what: str = "") -> str:
    return f"{count} {what}run{'' if count == 1 else 's'}"


def quality(runs: Runs) -> str:
    """Return in words what the best run is chosen by."""
    if runs.best_by == "score" and all("eval_loss" in one.values for one in runs.finished):
        return columns()["eval_loss"].label
    return columns()[runs.best_by].label
