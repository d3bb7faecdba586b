"""Log steps -> loss.png; row lengths -> lengths.png."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_loss(history: list[dict[str, Any]], target: Path) -> None:
    """Draws training loss and, where it was measured during training, the golden rows' loss against optimizer steps (nats a token)."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (("loss", "training rows", "-"), ("eval_loss", "golden rows", "o-")):
        points = [(entry["optimizer_steps"], entry[name]) for entry in history if isinstance(entry.get(name), float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss on answers (nats a token)")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False)
    _save(figure, axes, target)


def plot_lengths(histogram: np.ndarray, max_length: int, target: Path) -> None:
    """Draws how many rows are how many tokens long (histogram[n] rows of n tokens), beside the length that rows are cut to."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths = np.flatnonzero(histogram)
    axes.hist(lengths, bins=min(60, int(lengths[-1] - lengths[0]) + 1), weights=histogram[lengths])
    if lengths[-1] > max_length / 2:  # else the line would squeeze the rows into a corner
        axes.axvline(max_length, color="tab:red", linestyle="--", label=f"trainer.max_length={max_length:,}")
        axes.legend(frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens of a training row")
    axes.set_ylabel("rows")
    _save(figure, axes, target)


def _save(figure: Figure, axes: Any, target: Path) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    draft = target.with_name(f".{target.name}")
    figure.savefig(draft, format="png")
    draft.replace(target)
