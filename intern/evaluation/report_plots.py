"""An evaluation -> scores.png, rows.png and topics.png, as far as its rows allow them."""

from pathlib import Path

from intern.display.plot import Point, labels, plot_changes, plot_rows, plot_scores
from intern.evaluation.bootstrap import Estimate
from intern.evaluation.evaluate import Evaluation
from intern.evaluation.metrics import Place, metrics_at

NARROW = "_narrow"  # ends the names of plots for a telephone
_MOST_TOPICS = 40  # in the plot; the table has all
_SEEN = {True: "training saw the chunk", False: "it never did", None: "unknown"}


def draw_plots(evaluation: Evaluation) -> list[Path]:
    """Write the plots into the evaluation's folder and delete those of an earlier start that no longer apply.

    Returns:
        The plots, in the order in which reports show them; those for a telephone, *_narrow.png, last.
    """
    made = [_draw_scores(evaluation), _draw_rows(evaluation), _draw_topics(evaluation)]
    made += [_draw_scores(evaluation, NARROW), _draw_topics(evaluation, NARROW)]
    drawn = [target for target in made if target is not None]
    for name in ("rows.png", "topics.png", f"topics{NARROW}.png"):
        if evaluation.folder / name not in drawn:
            (evaluation.folder / name).unlink(missing_ok=True)
    return drawn


def _draw_scores(evaluation: Evaluation, kind: str = "") -> Path:
    groups = [group for group in evaluation.groups if group.kind != "topic"]
    first, second = (side.name for side in evaluation.sides)
    shown = metrics_at(Place.PLOT)
    panels = {
        metric.label: {
            first: [_point(group.scores[name].before) for group in groups],
            second: [_point(group.scores[name].after) for group in groups],
        }
        for name, metric in shown.items()
    }
    shares = [metric.label for metric in shown.values() if metric.format.endswith("%")]
    target = evaluation.folder / f"scores{kind}.png"
    plot_scores(panels, [group.label for group in groups], shares, target, narrow=kind == NARROW)
    return target


def _draw_rows(evaluation: Evaluation) -> Path | None:
    kinds: dict[str, list[tuple[float, float]]] = {}
    for seen, label in _SEEN.items():
        points = [
            (row.before.loss, row.after.loss)
            for row in evaluation.rows
            if row.seen is seen and row.before.loss is not None and row.after.loss is not None
        ]
        if points:
            kinds[label] = points
    if not kinds or not evaluation.losses_comparable:
        return None
    first, second = (side.name for side in evaluation.sides)
    plot_rows(kinds, (first, second), "loss (nats per token)", evaluation.folder / "rows.png")
    return evaluation.folder / "rows.png"


def _draw_topics(evaluation: Evaluation, kind: str = "") -> Path | None:
    topics = sorted((group for group in evaluation.groups if group.kind == "topic"), key=lambda group: -group.rows)
    changes = [
        (group.label, point) for group in topics[:_MOST_TOPICS] if (point := _point(group.scores["loss"].difference))
    ]
    if not changes:
        return None
    names = labels([label for label, _ in changes], 24 if kind == NARROW else 48)
    pairs = sorted(zip(names, (point for _, point in changes), strict=True), key=lambda pair: pair[1][0])
    first, second = (side.name for side in evaluation.sides)
    between = "\n" if kind == NARROW else " "
    title = f"change of the loss, {second} minus {first}{between}(nats per token; left is better)"
    target = evaluation.folder / f"topics{kind}.png"
    plot_changes(pairs, title, target, narrow=kind == NARROW)
    return target


def _point(estimate: Estimate) -> Point | None:
    return None if estimate.value is None else (estimate.value, estimate.low, estimate.high)
