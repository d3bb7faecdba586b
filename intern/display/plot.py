"""Log steps, row lengths, evaluations and compared runs, sweeps -> PNG files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GREY, BLUE, ORANGE = "#8b95a1", "#1f6feb", "#d97706"
_NARROW = 3.6  # inches: what a telephone shows without making letters smaller
_MOST_LINES = 8  # whose colors can be told apart
Point = tuple[float, float | None, float | None]  # a score and its interval's bounds


def plot_loss(
    history: list[dict[str, Any]],
    target: Path,
    best_step: int | None = None,
    base_loss: float | None = None,
    title: str = "",
) -> None:
    """Draw the training loss and, if measured during training, the golden rows' loss against optimizer steps (nats per token).

    The token F1 of answers, if measured, has its scale on the right; a vertical line marks the step whose weights were kept.

    Args:
        history: the lines of history.jsonl.
        target: the PNG file.
        best_step: the step whose weights were kept; None for the last one.
        base_loss: the base's loss on the golden rows, drawn as a line; None if it was not measured.
        title: the run's name.
    """
    figure, axes = _figure(7, 4)
    for name, label, style, color in (
        ("loss", "training rows", "-", BLUE),
        ("eval_loss", "golden rows", "o--", ORANGE),
    ):
        points = [(entry["optimizer_steps"], entry[name]) for entry in history if isinstance(entry.get(name), float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, color=color)
    if base_loss is not None:
        axes.axhline(base_loss, color=GREY, linestyle="-.", label=f"the base on golden rows: {base_loss:.3f}")
    handles, answers = list(axes.lines), [entry for entry in history if "eval_f1" in entry]
    if answers:
        right = axes.twinx()
        steps, scores = [entry["optimizer_steps"] for entry in answers], [entry["eval_f1"] for entry in answers]
        handles += right.plot(steps, scores, "s:", color="tab:green", label="golden answers, token F1")
        right.set_ylabel("token F1")
        right.set_ylim(bottom=0)
        right.spines["top"].set_visible(False)
    best = next((entry for entry in history if entry["step"] == best_step), None)
    if best is not None:
        label = f"kept: step {best_step}"
        handles.append(axes.axvline(best["optimizer_steps"], color="0.4", linestyle=(0, (1, 3)), label=label))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss on answers (nats per token)")
    axes.set_ylim(bottom=0)
    if title:
        axes.set_title(labels([title], 60)[0], fontsize=10, loc="left")
    if handles:  # below the axes: no curve runs through it
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(figure, target)


def plot_sweep(points: list[tuple[float, int, float]], target: Path) -> None:
    """Draw the score (lower is better, nats per token) against the rank: a line per learning rate, or colored points if there are many.

    Args:
        points: learning rate, rank and score of each run; runs with the same rate and rank are averaged.
        target: the PNG file.
    """
    figure, axes = _figure(7, 4)
    ranks = sorted({rank for _, rank, _ in points})
    rates = sorted({rate for rate, _, _ in points})
    if len(rates) <= _MOST_LINES:
        for rate in rates:
            scores = {rank: [score for r, k, score in points if (r, k) == (rate, rank)] for rank in ranks}
            means = [(rank, sum(found) / len(found)) for rank, found in scores.items() if found]
            axes.plot(*zip(*means, strict=True), "o-", label=f"{rate:g}")
        axes.legend(title="learning rate", frameon=False)
    else:
        colors, along, scored = zip(*points, strict=True)
        figure.colorbar(axes.scatter(along, scored, c=colors, norm="log"), label="learning rate")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank (lora.r)")
    axes.set_ylabel("loss on answers (nats per token)")
    _save(figure, target)


def plot_lengths(histogram: np.ndarray, max_length: int, target: Path) -> None:
    """Draw a histogram of row lengths, with the length that rows are cut to.

    Args:
        histogram: histogram[n] rows have n tokens.
        max_length: trainer.max_length.
        target: the PNG file.
    """
    figure, axes = _figure(7, 4)
    lengths = np.flatnonzero(histogram)
    axes.hist(lengths, bins=min(60, int(lengths[-1] - lengths[0]) + 1), weights=histogram[lengths])
    if lengths[-1] > max_length / 2:  # otherwise the line would squeeze the rows into a corner
        axes.axvline(max_length, color="tab:red", linestyle="--", label=f"trainer.max_length={max_length:,}")
        axes.legend(frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens per training row")
    axes.set_ylabel("rows")
    _save(figure, target)


def plot_scores(
    panels: dict[str, dict[str, list[Point | None]]],
    groups: list[str],
    percent: list[str],
    target: Path,
    narrow: bool = False,
) -> None:
    """Draw one panel per score: for each group of rows a point with its 95 % confidence interval per model.

    Args:
        panels: by score, by model, a point for each of `groups`.
        groups: the names of the groups of rows.
        percent: scores that are fractions.
        target: the PNG file.
        narrow: one panel below the other, for a telephone.
    """
    count, height = len(panels), 0.55 * len(groups)
    size = (_NARROW, 0.7 + (0.6 + height) * count) if narrow else (2.2 + 2.3 * count, 1.3 + height)
    figure = Figure(figsize=size, dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(count if narrow else 1, 1 if narrow else count, sharey=True, squeeze=False).flat
    for axes, (score, models) in zip(row, panels.items(), strict=True):
        _tidy(axes)
        axes.grid(visible=False, axis="y")
        kinds = ((-0.14, GREY, "s"), (0.14, BLUE, "o"))
        for (offset, color, marker), (model, points) in zip(kinds, models.items(), strict=True):
            for index, point in enumerate(points):
                if point is not None:
                    label = model if index == 0 else None
                    _with_interval(axes, point, index + offset, color, label, marker)
        axes.set_title(score, fontsize=10)
        axes.set_xlim(left=0)
        if score in percent:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    row[0].set_yticks(range(len(groups)), groups)
    row[0].set_ylim(len(groups) - 0.5, -0.5)
    handles = {label: handle for axes in row for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(figure, target)


def plot_rows(kinds: dict[str, list[tuple[float, float]]], names: tuple[str, str], what: str, target: Path) -> None:
    """Draw each golden row as a point: its loss with the first model against its loss with the second one; below the line is better."""
    figure, axes = _figure(5.4, 5)
    for (kind, points), color in zip(kinds.items(), (BLUE, ORANGE, GREY), strict=False):
        first, second = zip(*points, strict=True)
        axes.scatter(first, second, s=22, color=color, alpha=0.65, linewidths=0, label=f"{kind} ({len(points)})")
    most = max((value for points in kinds.values() for point in points for value in point), default=1) * 1.05
    axes.plot([0, most], [0, most], color="#444", linewidth=0.8, zorder=0)
    axes.text(
        most * 0.9,
        most * 0.915,
        "no change",
        ha="right",
        va="bottom",
        rotation=45,
        rotation_mode="anchor",
        fontsize=8,
        color="#444",
    )
    axes.set_xlim(0, most)
    axes.set_ylim(0, most)
    axes.set_aspect("equal")
    axes.set_xlabel(f"{names[0]}: {what}")
    axes.set_ylabel(f"{names[1]}: {what}")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _save(figure, target)


def plot_changes(changes: list[tuple[str, Point]], what: str, target: Path, narrow: bool = False) -> None:
    """Draw the change of each topic with its 95 % confidence interval, the largest decrease first; narrow: for a telephone."""
    figure, axes = _figure(_NARROW if narrow else 7.4, 1.1 + 0.21 * len(changes))
    for index, (_, point) in enumerate(changes):
        _with_interval(axes, point, index, BLUE, None)
    axes.axvline(0, color="#444", linewidth=0.8)
    axes.set_yticks(range(len(changes)), [name for name, _ in changes], fontsize=8)
    axes.set_ylim(len(changes) - 0.4, -0.6)
    axes.set_xlabel(what)
    _save(figure, target)


def plot_curves(curves: dict[str, list[tuple[float, float]]], best: str | None, target: Path) -> None:
    """Draw the training loss of some runs against optimizer steps, with the best run on top of the others."""
    figure, axes = _figure(7.4, 4.4)
    for name, points in curves.items():
        chosen = name == best
        axes.plot(
            *zip(*points, strict=True),
            linewidth=2.2 if chosen else 1.1,
            alpha=1 if chosen else 0.75,
            color=BLUE if chosen else None,
            zorder=3 if chosen else 2,
            label=f"{name} (best)" if chosen else name,
        )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("training loss (nats per token)")
    if 0 < len(curves) <= 12:
        axes.legend(frameon=False, fontsize=8)
    _save(figure, target)


def plot_points(
    points: list[tuple[float, Point, bool]], x_label: str, y_label: str, target: Path, doubling: bool = False
) -> None:
    """Draw runs as points with their confidence intervals; the best one is highlighted.

    Args:
        points: position on the horizontal axis, score with its interval, and whether the run is the best, for each run.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        target: the PNG file.
        doubling: whether the horizontal axis is logarithmic to base 2, for ranks.
    """
    figure, axes = _figure(6.4, 4.2)
    for x, (y, low, high), chosen in sorted(points, key=lambda one: one[2]):
        color = BLUE if chosen else GREY
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=color, linewidth=1.4, alpha=0.8)
        axes.plot(
            x,
            y,
            "o",
            color=color,
            markersize=8 if chosen else 5.5,
            alpha=1 if chosen else 0.75,
            label="best run" if chosen else None,
        )
    if doubling:
        marks = sorted({x for x, _, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axes.set_xlim(marks[0] / 1.4, marks[-1] * 1.4)
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if any(chosen for *_, chosen in points):
        axes.legend(frameon=False, fontsize=9)
    _save(figure, target)


def _with_interval(axes: Axes, point: Point, height: float, color: str, label: str | None, marker: str = "o") -> None:
    value, low, high = point
    if low is not None and high is not None:
        axes.plot([low, high], [height, height], color=color, linewidth=1.8, solid_capstyle="butt")
    axes.plot(value, height, marker, color=color, markersize=5.5, label=label, clip_on=False)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, target: Path) -> None:
    draft = target.with_name(f".{target.name}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Glyph .* missing"
            )  # letters that the font lacks are drawn as boxes
            figure.savefig(draft, format="png")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)  # cut short by a full disk


def labels(names: Sequence[str], most: int) -> list[str]:
    """Return user-supplied names as they fit next to a plot; a dollar sign starts no formula.

    Args:
        names: of runs or topics.
        most: characters that are shown.
    """
    short = [name if len(name) <= most else f"{name[: most - 1]}…" for name in names]
    return ["".join(c if c.isprintable() else " " for c in name).replace("$", "\\$") for name in short]
