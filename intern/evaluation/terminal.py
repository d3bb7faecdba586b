"""An evaluation and standard tasks -> tables on standard output, as wide as the terminal allows."""

import sys
from collections.abc import Sequence

from rich.console import Console

from intern.display.table import least_width, show
from intern.display.text import visible
from intern.evaluation.evaluate import Evaluation
from intern.evaluation.lm_eval_tasks import TaskScore
from intern.evaluation.metrics import METRICS, Change, Place, metrics_at
from intern.evaluation.report_view import notes
from intern.evaluation.scores import Group


def show_evaluation(evaluation: Evaluation) -> None:
    """Print the scores of each group of rows but topics, the notes and the report's path.

    A terminal that is too narrow for one table gets a small one for each group.
    """
    first, second = (side.name for side in evaluation.sides)
    metrics = metrics_at(Place.TERMINAL)
    headings = ["golden rows"]
    for metric in metrics.values():
        headings += [f"{metric.short_label}: {first}", second]
        headings += [] if metric.change is Change.NONE else [""]
    groups = [group for group in evaluation.groups if group.kind != "topic"]
    rows = [[group.label, *(cell for name in metrics for cell in _cells(group, name))] for group in groups]
    console = Console()
    if not console.is_terminal or least_width(headings, rows) <= console.width:
        show(headings, rows)
    else:
        for group in groups:
            sys.stdout.write(f"\n{group.label}\n")
            lines = [[metric.short_label, *_cells(group, name), ""][:4] for name, metric in metrics.items()]
            show(["metric", first, second, "change"], lines)
    _say([*notes(evaluation), f"report: {evaluation.folder / 'report.html'}"])


def show_tasks(scores: Sequence[TaskScore]) -> None:
    """Print the scores of standard tasks."""
    sys.stdout.write("\n")
    rows = [
        [
            score.task,
            score.metric,
            str(score.rows),
            _with_error(score.base, score.base_error),
            _with_error(score.adapter, score.adapter_error),
            f"{score.adapter - score.base:+.3f}",
        ]
        for score in scores
    ]
    show(["standard task", "metric", "rows", "base", "adapter", "difference"], rows)


def _cells(group: Group, name: str) -> list[str]:
    """Return both models' values of a metric and, if it is shown, their change."""
    metric, score = METRICS[name], group.scores[name]
    form = ".0%" if metric.format.endswith("%") else metric.format
    before, after = score.before.value, score.after.value
    cells = ["-" if value is None else f"{value:{form}}" for value in (before, after)]
    if metric.change is Change.NONE:
        return cells
    if not before or after is None or score.difference.value is None:
        return [*cells, "-"]
    return [*cells, f"{after / before - 1:+.0%}" if metric.change is Change.PERCENT else f"{after / before:.1f} x"]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"\n{visible(line)}" for line in lines) + "\n")
