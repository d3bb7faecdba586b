"""Log steps -> loss.png."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    draft = target.with_name(f".{target.name}")
    figure.savefig(draft, format="png")
    draft.replace(target)
