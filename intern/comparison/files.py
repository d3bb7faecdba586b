"""Compared runs -> compare.csv, compare.md and the plots."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from intern.comparison.columns import columns
from intern.comparison.groups import RunGroup, Runs, shown_keys
from intern.comparison.reader import FinishedRun, as_number
from intern.comparison.table import others, quality, table
from intern.display.plot import labels, plot_curves, plot_points
from intern.display.table import markdown
from intern.display.text import markdown_text, spreadsheet_cell
from intern.errors import UserError
from intern.evaluation.metrics import Place, metrics_at
from intern.runs.files import write_text

_MOST_CURVES = 12
_PLOTS = ("score_by_rank*.png", "quality_by_memory*.png", "loss_curves.png")
_LONGEST_HISTORY = 2**24  # bytes of history.jsonl that are drawn; 60,000 log steps
_HIGHEST_LOSS = 1e6  # a curve beyond it would flatten all others


def write_overview(runs: Runs, folder: Path, said: list[str], sort_by: str) -> None:
    """Write compare.csv, compare.md and the plots.

    Args:
        runs: all compared runs.
        folder: an existing folder.
        said: notes and advice as the terminal shows them.
        sort_by: as it was given.
    """
    _write_csv(runs, folder / "compare.csv")
    plots = _draw(runs, folder)
    parts = [
        f"# {len(runs.finished)} runs by {markdown_text(runs.best_by if runs.missing else sort_by)}\n",
        _escaped_table(*table(runs, runs.finished, brief=False)),
    ]
    if runs.evaluation:
        parts.append(f"Values with 95 % intervals are from the runs' evaluation {markdown_text(runs.evaluation)}.\n")
    parts += [f"{markdown_text(line)}\n" for line in said]
    parts += [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    if runs.others:
        parts.append("## Not compared\n\n" + _escaped_table(*others(runs), texts=3))
    write_text(folder / "compare.md", folder, "\n".join(parts))


def _escaped_table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    escaped = [[markdown_text(cell) for cell in row] for row in (headings, *rows)]
    return markdown(escaped[0], escaped[1:], min(texts, len(headings)))


def _write_csv(runs: Runs, target: Path) -> None:
    keys, measured = shown_keys(runs), metrics_at(Place.COMPARE)
    text = io.StringIO(newline="")
    writer = csv.writer(text)

    def write(cells: Sequence[object]) -> None:
        writer.writerow([spreadsheet_cell(cell) for cell in cells])

    ends = [f"{name}_{end}" for name in measured for end in ("low", "high")]
    write(["run", "path", "state", "best", *keys, *columns(), *ends, "gpu", "measured_on"])
    group_names = {id(one): group.name for group in runs.groups for one in group.runs}
    for one in runs.finished:
        bounds = [bound for name in measured for bound in one.bounds.get(name, (None, None))]
        values = [one.values.get(name) for name in columns()]
        config = [one.config.get(key) for key in keys]
        start = [one.name, str(one.run.path), "finished", runs.is_best(one)]
        write([*start, *config, *values, *bounds, one.gpu, group_names[id(one)]])
    for other in runs.others:
        write([other.name, str(other.path), other.reason, False])
    write_text(target, target.parent, text.getvalue())


def _draw(runs: Runs, folder: Path) -> list[Path]:
    """Write the plots that the runs allow, and remove those of an earlier start: score by rank, by memory, loss curves."""

    def points(group: RunGroup, x_of: str) -> list[tuple[float, tuple[float, float | None, float | None], bool]]:
        found = []
        for one in group.runs:
            x = one.values.get(x_of) if x_of in columns() else as_number(one.config.get(x_of))
            y = one.values.get(runs.best_by)
            if x is not None and y is not None:
                found.append((x, (y, *one.bounds.get(runs.best_by, (None, None))), runs.is_best(one)))
        return found

    way = "higher" if columns()[runs.best_by].higher_is_better else "lower"
    label = f"{quality(runs)} ({way} is better)"
    drawn_now: list[Path] = []

    def draws(name: str) -> Path:
        drawn_now.append(folder / f"{name}.png")
        return drawn_now[-1]

    # Scores that were measured on different rows are not drawn in one picture: each group has its own.
    several = len(runs.ranked) > 1
    for group in runs.ranked:
        mark, on = (f"_{group.mark}", f"\non {group.name} (group {group.mark})") if several else ("", "")
        by_rank = [point for point in points(group, "lora.r") if point[0] > 0]
        if len({x for x, *_ in by_rank}) > 1:
            plot_points(by_rank, "rank (lora.r)", label + on, draws(f"score_by_rank{mark}"), doubling=True)
        by_memory = points(group, "peak_memory_gib")
        if len({x for x, *_ in by_memory}) > 1:
            plot_points(by_memory, "peak memory (GiB)", label + on, draws(f"quality_by_memory{mark}"))
    bests = [group.best for group in runs.ranked if group.best is not None]
    drawn = list(dict.fromkeys([*bests, *runs.finished]))[:_MOST_CURVES]
    curves: dict[str, list[tuple[float, float]]] = {}
    best_label = None
    for one, name in zip(drawn, labels([_curve_name(runs, one) for one in drawn], 60), strict=True):
        if curve := _curve(one):
            curves[name] = curve
            best_label = name if one is runs.best else best_label
    if curves:
        plot_curves(curves, best_label, draws("loss_curves"))
    for pattern in _PLOTS:
        for plot in folder.glob(pattern):
            if plot not in drawn_now:
                plot.unlink()  # of an earlier start
    return drawn_now


def _curve(one: FinishedRun) -> list[tuple[float, float]]:
    """Return optimizer steps and training losses; empty if the history cannot be read."""
    try:
        if one.run.history.stat().st_size > _LONGEST_HISTORY:
            return []
        history = one.run.read_history()
    except (OSError, UserError):
        return []
    return [
        (float(entry["optimizer_steps"]), entry["loss"])
        for entry in history
        if isinstance(entry.get("loss"), float)
        and abs(entry["loss"]) <= _HIGHEST_LOSS
        and isinstance(entry.get("optimizer_steps"), int)
        and abs(entry["optimizer_steps"]) < 2**53
    ]


def _curve_name(runs: Runs, one: FinishedRun) -> str:
    varied = [key for key in shown_keys(runs) if len({other.config.get(key) for other in runs.finished}) > 1]
    return f"{one.name}: " + " ".join(f"{key.rsplit('.', 1)[-1]}={one.config.get(key)}" for key in varied[:3])
