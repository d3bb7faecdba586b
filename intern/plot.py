"""Log steps -> loss.png; the runs of a sweep -> sweep.png."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MOST_LINES = 8  # that can be told apart


def plot_loss(history: list[dict[str, Any]], target: Path, best_step: int | None = None) -> None:
    """Draws training loss and, where it was measured during training, the golden rows' loss against optimizer steps (nats a token).

    The token F1 of answers, where it was measured, has the scale on the right; a line stands at the step whose weights were kept.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (("loss", "training rows", "-"), ("eval_loss", "golden rows", "o-")):
        points = [(entry["optimizer_steps"], entry[name]) for entry in history if isinstance(entry.get(name), float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    handles, answers = list(axes.lines), [entry for entry in history if "eval_f1" in entry]
    if answers:
        right = axes.twinx()
        steps, scores = [entry["optimizer_steps"] for entry in answers], [entry["eval_f1"] for entry in answers]
        handles += right.plot(steps, scores, "s--", color="tab:green", label="golden answers, token F1")
        right.set_ylabel("token F1")
        right.set_ylim(bottom=0)
        right.spines["top"].set_visible(False)
    best = next((entry for entry in history if entry["step"] == best_step), None)
    if best is not None:
        label = f"kept: step {best_step}"
        handles.append(axes.axvline(best["optimizer_steps"], color="0.4", linestyle=":", label=label))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss on answers (nats a token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if handles:
        axes.legend(handles=handles, frameon=False)
    draft = target.with_name(f".{target.name}")
    figure.savefig(draft, format="png")
    draft.replace(target)


def plot_sweep(points: list[tuple[float, int, float]], target: Path) -> None:
    """Draws the score (lower is better, nats a token) against the rank, a line for each learning rate; of many rates, coloured points.

    Args:
        points: learning rate, rank and score of each run; runs that share rate and rank give the line their mean.
        target: the PNG file.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ranks = sorted({rank for _, rank, _ in points})
    rates = sorted({rate for rate, _, _ in points})
    if len(rates) <= _MOST_LINES:
        for rate in rates:
            scores = {rank: [score for r, k, score in points if (r, k) == (rate, rank)] for rank in ranks}
            means = [(rank, sum(found) / len(found)) for rank, found in scores.items() if found]
            axes.plot(*zip(*means, strict=True), "o-", label=f"{rate:g}")
        axes.legend(title="learning rate", frameon=False)
    else:
        colours, along, scored = zip(*points, strict=True)
        figure.colorbar(axes.scatter(along, scored, c=colours, norm="log"), label="learning rate")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank (lora.r)")
    axes.set_ylabel("loss on answers (nats a token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    draft = target.with_name(f".{target.name}")
    figure.savefig(draft, format="png")
    draft.replace(target)
