"""Compared runs -> their table, compare.csv, compare.md and the plots."""

import csv
import shlex
from collections.abc import Sequence
from pathlib import Path

from intern.display.plot import labels, plot_curves, plot_points
from intern.display.table import markdown
from intern.evaluation.bootstrap import FEW, FEW_MARK
from intern.evaluation.run_table import EVALUATED, FIGURES, FinishedRun, Runs, shown_keys

_BEST = "★"
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
_MOST_KEYS = 4  # config columns in the terminal, beside rank and rate
_MOST_CURVES = 12
_MOST_NAMED = 5  # runs in a note
_WIDEST = 40  # characters of a config value in the terminal


def table(runs: Runs, chosen: Sequence[FinishedRun], brief: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; `brief` leaves out what would not fit a terminal."""
    keys = shown_keys(runs)
    keys = keys[: len(keys) - len(runs.differing) + _MOST_KEYS] if brief else keys
    names = [
        name
        for name in FIGURES
        if (not brief or name in (*_IN_TERMINAL, runs.best_by)) and any(name in one.figures for one in runs.finished)
    ]
    if any("eval_loss" in one.figures for one in runs.finished) and brief:
        names = [name for name in names if name != "score"]  # the same number once more
    rows = []
    for one in chosen:
        mark = f"{_BEST} " if one is runs.best else ""
        values = [one.config.get(key, "") for key in keys]
        rows.append(
            [
                f"{mark}{one.name}",
                *(value if not brief or len(value) <= _WIDEST else f"{value[: _WIDEST - 1]}…" for value in values),
                *(_figure(one, name) for name in names),
                *([] if brief else [one.gpu or "CPU"]),
            ]
        )
    # The last part of a key says what it is, unless two keys end alike.
    last = [key.rsplit(".", 1)[-1] for key in keys]
    headings = [short if last.count(short) == 1 and brief else key for short, key in zip(last, keys, strict=True)]
    return ["run", *headings, *(FIGURES[name].label for name in names), *([] if brief else ["machine"])], rows


def narrowed(columns: list[str], rows: list[list[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """The table without the least telling columns, so that it fits `width` characters."""
    dropped = [FIGURES[name].label for name in _LEAST_TELLING]
    for label in dropped:
        widest = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
        if sum(widest) + 3 * len(columns) + 1 <= width:
            break
        if label in columns:
            gone = columns.index(label)
            columns, *rows = ([cell for index, cell in enumerate(row) if index != gone] for row in (columns, *rows))
    return columns, rows


def _figure(one: FinishedRun, name: str) -> str:
    if name not in one.figures:
        return ""
    form = FIGURES[name].form
    low, high = one.bounds.get(name, (None, None))
    bounds = f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    return f"{one.figures[name]:{form}}{bounds}{f' {FEW_MARK}' if name in one.few else ''}"


def others(runs: Runs, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """The runs that cannot be compared, as a table."""
    return ["run", "why", "overrides"], [[one.name, one.reason, one.overrides] for one in runs.others[:most]]


def notes(runs: Runs) -> list[str]:
    """What makes figures unreliable, or incomparable in one column."""
    found = []
    if any(one.few for one in runs.finished):
        found.append(f"{FEW_MARK} fewer than {FEW} rows: too few to rely on.")
    if trained := [one.name for one in runs.finished if one.trained_rows]:
        named = ", ".join(trained[:_MOST_NAMED]) + (", ..." if len(trained) > _MOST_NAMED else "")
        found.append(f"Evaluated on rows that they were trained on, among others: {named}.")
    if len({one.eval_data for one in runs.finished if one.eval_data}) > 1:
        found.append("Eval losses were measured on different golden files: they cannot be compared across these.")
    if len({one.evaluated_data for one in runs.finished if one.evaluated_data}) > 1:
        found.append(
            f"The evaluations {runs.evaluation!r} were made on different golden files: their scores cannot be compared across these."
        )
    if len({"eval_loss" in one.figures for one in runs.finished}) > 1:
        found.append("Some runs have no eval loss: their score is the train loss, which is another thing.")
    if len({one.gpu for one in runs.finished}) > 1:
        found.append("The runs were made on different machines: tokens/s, memory and time say as much about these.")
    return found


def advice(runs: Runs, paths: list[str], everything: bool) -> list[str]:
    """The best run and the shortest way to name it for the other commands."""
    if runs.best is None:
        return ["No run is finished."]
    by_score = runs.best_by == "score"
    name = str(runs.best.run.path)
    if by_score and everything:
        name = "best"
    elif by_score and len(paths) == 1 and Path(paths[0]).expanduser().is_dir():
        name = paths[0]
    return [
        f"{_BEST} best by {_quality(runs)} {_figure(runs.best, runs.best_by)}: {runs.best.run.path}",
        f"use it: python -m intern.query {shlex.quote(f'run_dir={name}')} question='...'",
    ]


def _quality(runs: Runs) -> str:
    """What "best" is judged by, in words."""
    if runs.best_by == "score" and all("eval_loss" in one.figures for one in runs.finished):
        return FIGURES["eval_loss"].label
    return FIGURES[runs.best_by].label


def write_overview(runs: Runs, folder: Path, said: list[str], sort_by: str) -> None:
    """compare.csv, compare.md and the plots."""
    keys = shown_keys(runs)
    with (folder / "compare.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        bounds = [f"{name}_{end}" for name in EVALUATED for end in ("low", "high")]
        writer.writerow(["run", "path", "state", "best", *keys, *FIGURES, *bounds, "gpu"])
        for one in runs.finished:
            ends = [end for name in EVALUATED for end in one.bounds.get(name, (None, None))]
            figures = [one.figures.get(name) for name in FIGURES]
            values = [one.config.get(key) for key in keys]
            writer.writerow([one.name, one.run.path, "finished", one is runs.best, *values, *figures, *ends, one.gpu])
        for other in runs.others:
            writer.writerow([other.name, other.path, other.reason, False])
    plots = _draw(runs, folder)
    parts = [f"# {len(runs.finished)} runs by {sort_by}\n", markdown(*table(runs, runs.finished, brief=False))]
    if runs.evaluation:
        parts.append(f"Scores with intervals (95 %) are from the runs' `evaluation/{runs.evaluation}`.\n")
    parts += [f"{line}\n" for line in said]
    parts += [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    if runs.others:
        parts.append("## Not compared\n\n" + markdown(*others(runs), texts=3))
    (folder / "compare.md").write_text("\n".join(parts), encoding="utf-8")


def _draw(runs: Runs, folder: Path) -> list[Path]:
    """The plots that the runs allow: score against rank, loss curves, quality against memory."""

    def points(x_of: str) -> list[tuple[float, tuple[float, float | None, float | None], bool]]:
        found = []
        for one in runs.finished:
            x = one.figures.get(x_of) if x_of in FIGURES else _as_number(one.config.get(x_of))
            y = one.figures.get(runs.best_by)
            if x is not None and y is not None:
                found.append((x, (y, *one.bounds.get(runs.best_by, (None, None))), one is runs.best))
        return found

    way = "higher" if FIGURES[runs.best_by].higher_is_better else "lower"
    label = f"{_quality(runs)} ({way} is better)"
    plots = {name: folder / f"{name}.png" for name in ("score_by_rank", "loss_curves", "quality_by_memory")}
    for plot in plots.values():
        plot.unlink(missing_ok=True)  # of an earlier start
    by_rank = [point for point in points("lora.r") if point[0] > 0]
    if len({x for x, *_ in by_rank}) > 1:
        plot_points(by_rank, "rank (lora.r)", label, plots["score_by_rank"], doubling=True)
    by_memory = points("peak_memory_gib")
    if len({x for x, *_ in by_memory}) > 1:
        plot_points(by_memory, "peak memory (GiB)", label, plots["quality_by_memory"])
    drawn = list(dict.fromkeys([*([runs.best] if runs.best else []), *runs.finished]))[:_MOST_CURVES]
    curves: dict[str, list[tuple[float, float]]] = {}
    best_label = None
    for one, name in zip(drawn, labels([_curve_name(runs, one) for one in drawn], 60), strict=True):
        curve = [
            (float(entry["optimizer_steps"]), float(entry["loss"]))
            for entry in one.run.read_history()
            if isinstance(entry, dict)
            and isinstance(entry.get("loss"), float)
            and isinstance(entry.get("optimizer_steps"), int)
        ]
        if curve:
            curves[name] = curve
            best_label = name if one is runs.best else best_label
    if curves:
        plot_curves(curves, best_label, plots["loss_curves"])
    return [plot for plot in plots.values() if plot.is_file()]


def _curve_name(runs: Runs, one: FinishedRun) -> str:
    varied = [key for key in shown_keys(runs) if len({other.config.get(key) for other in runs.finished}) > 1]
    return f"{one.name}: " + " ".join(f"{key.rsplit('.', 1)[-1]}={one.config.get(key)}" for key in varied[:3])


def _as_number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
