"""An evaluation -> everything that its reports show, as text and numbers without markup."""

from dataclasses import dataclass
from typing import Any

from intern.evaluation.bootstrap import FEW, FEW_MARK, Estimate, PairedScore
from intern.evaluation.evaluate import Evaluation
from intern.evaluation.metrics import MAIN_METRIC, METRICS, Place, metrics_at
from intern.evaluation.scores import Group, Row
from intern.runs.names import called

_SHOWN_ROWS = 8  # worst and best rows each


@dataclass(frozen=True)
class Line:
    """One metric of one group, as text."""

    label: str
    rows: int
    few: bool
    before: str
    after: str
    difference: str
    verdict: str  # better, worse, unclear, too few (rows), or empty if neither direction is better


def notes(evaluation: Evaluation) -> list[str]:
    """Return what a reader of any of the tables must know."""
    found = []
    groups = [group for group in evaluation.groups if group.kind != "topic"]
    if any(group.rows < FEW for group in groups):
        found.append(f"{FEW_MARK} fewer than {FEW} rows: too few to rely on.")
    if trained := sum(bool(row.trained) for row in evaluation.rows):
        found.append(
            f"{trained} of {len(evaluation.rows)} golden rows are training rows (same question, same answer): their scores measure memory."
        )
    if all(row.trained is None for row in evaluation.rows):
        found.append(f"What training saw: {evaluation.overlap.told_by}")
    unfit = sum(row.before.prediction.loss is None or row.after.prediction.loss is None for row in evaluation.rows)
    if unfit:
        found.append(f"{unfit} rows do not fit into trainer.max_length: they have answers but no loss.")
    if not evaluation.losses_comparable:
        found.append(
            "The two runs' tokenizers split the references differently: their losses per token cannot be compared."
        )
    return found


def build_view(evaluation: Evaluation) -> dict[str, Any]:
    """Return the variables of report.html.jinja; report.md is made from the same ones."""
    before, after = evaluation.sides
    everything = evaluation.groups[0]
    known = {name for name, rows in everything.counted.items() if rows}
    ranked = sorted(evaluation.rows, key=lambda row: (row.after.values[MAIN_METRIC] or 0.0, -(row.after.loss or 0.0)))
    shown = min(_SHOWN_ROWS, len(ranked) // 2)
    topics = metrics_at(Place.TOPICS)
    refuses = any(row.unanswerable or row.before.answer.refused or row.after.answer.refused for row in evaluation.rows)
    return {
        "title": f"{after.name} against {before.name}" if before.run != after.run else "Adapter against base",
        "names": (before.name, after.name),
        "runs": [(side.name, called(side.run), side.adapted) for side in evaluation.sides],
        "file": str(evaluation.file.path),
        "sha256": evaluation.file.sha256,
        "rows": len(evaluation.rows),
        "unanswerable": sum(row.unanswerable for row in evaluation.rows),
        "contexts": [
            (side.name, "with chunk_text" if side.with_context else "closed book") for side in evaluation.sides
        ],
        "headlines": [
            line(name, everything)
            for name in metrics_at(Place.CARD)
            if name in known and (refuses or "refused" not in name)
        ],
        "groups": [
            {
                "label": group.label,
                "seen": _seen_chunks(group, " rows are on chunks that training saw"),
                "lines": [line(name, group) for name in METRICS if name in known],
            }
            for group in evaluation.groups
            if group.kind != "topic"
        ],
        "topic_metrics": [metric.short_label for metric in topics.values()],
        "topics": [
            {
                "label": group.label,
                "seen": _seen_chunks(group),
                "lines": [line(name, group) for name in topics],
            }
            for group in evaluation.groups
            if group.kind == "topic"
        ],
        "ranked_by": METRICS[MAIN_METRIC].label,
        "worst": [_example(row) for row in ranked[:shown]],
        "best": [_example(row) for row in reversed(ranked[len(ranked) - shown :])],
        "notes": notes(evaluation),
        "few": FEW,
        "few_mark": FEW_MARK,
        "told_by": _seen_by_training(evaluation),
        "speed": [
            (name, f"{speed['seconds']:,.1f} s", f"{speed['tokens_per_second']:,.0f}")
            for name, speed in evaluation.speed.items()
        ],
        "limits": _limits(evaluation, "judged" in known),
        "settings": {name: str(value) for name, value in evaluation.settings.items() if value is not None},
    }


def line(name: str, group: Group) -> Line:
    """Return one metric of a group, as every report shows it.

    Args:
        name: a key of METRICS.
        group: rows with their scores.
    """
    metric, score = METRICS[name], group.scores[name]
    if metric.format.endswith("%"):  # a difference of shares is shown in percentage points
        points = (
            None if value is None else value * 100
            for value in (score.difference.value, score.difference.low, score.difference.high)
        )
        difference = _with_bounds(Estimate(*points), "+.1f", " points")
    else:
        difference = _with_bounds(score.difference, f"+{metric.format}")
    return Line(
        label=metric.label,
        rows=group.counted[name],
        few=group.counted[name] < FEW,
        before=_with_bounds(score.before, metric.format),
        after=_with_bounds(score.after, metric.format),
        difference=difference,
        verdict=_verdict(score, metric.higher_is_better) if group.counted[name] >= FEW else "too few",
    )


def _seen_chunks(group: Group, what: str = "") -> str:
    """Return how many rows are on chunks that training saw, as far as it is known."""
    known = group.rows - group.unknown_chunks
    if not known:
        return "The rows name no chunk, so it is unknown which of them training saw." if what else "unknown"
    unknown = f"; of {group.unknown_chunks} it is unknown" if group.unknown_chunks else ""
    return f"{group.seen_chunks} of {known}{what}{unknown}{'.' if what else ''}"


def _seen_by_training(evaluation: Evaluation) -> str:
    """Return how it is known what training saw, and how much of the golden file that is."""
    if all(row is None for row in evaluation.overlap.rows):
        return evaluation.overlap.told_by
    rows, chunks = sum(map(bool, evaluation.overlap.rows)), sum(map(bool, evaluation.overlap.chunks))
    on = f", {chunks} are on its chunks" if any(chunk is not None for chunk in evaluation.overlap.chunks) else ""
    return f"{evaluation.overlap.told_by} {rows} of {len(evaluation.rows)} golden rows are training rows{on}."


def _with_bounds(estimate: Estimate, form: str, unit: str = "") -> str:
    if estimate.value is None:
        return "–"
    value = f"{estimate.value:{form}}".replace("-", "−")
    if estimate.low is None or estimate.high is None:
        return f"{value}{unit}"
    low, high = (f"{bound:{form}}".replace("-", "−") for bound in (estimate.low, estimate.high))
    return f"{value}{unit} [{low}, {high}]"


def _verdict(score: PairedScore, higher_is_better: bool | None) -> str:
    low, high = score.difference.low, score.difference.high
    if low is None or high is None or higher_is_better is None:
        return ""
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == higher_is_better else "worse"


def _example(row: Row) -> dict[str, Any]:
    of_training = {
        True: "training saw its chunk",
        False: "training never saw its chunk",
        None: "whether training saw its chunk is unknown",
    }
    turn = f", turn {row.turn}" if row.turn else ""
    marks = [f"row {row.number}{turn}", *([row.topic] if row.topic else []), of_training[row.seen]]
    if row.trained:
        marks.append("is a training row")
    if row.unanswerable:
        marks.append("the context does not say")
    return {
        "marks": marks,
        "question": row.question,
        "reference": row.reference,
        "before": row.before.prediction.answer,
        "after": row.after.prediction.answer,
        "score": tuple(f"{side.values[MAIN_METRIC] or 0.0:.2f}" for side in (row.before, row.after)),
        "loss": tuple("–" if side.loss is None else f"{side.loss:.2f}" for side in (row.before, row.after)),
        "missing": ", ".join(row.after.missing),
        "invented": ", ".join(row.after.invented),
        "cut": not row.after.prediction.ended,
    }


def _limits(evaluation: Evaluation, judged: bool) -> list[str]:
    """Return what these scores do not measure."""
    limits = [
        "Whether an answer is true: it is compared with one reference. A right answer in other words scores low, a wrong one in the same words high.",
        "What a number refers to: numbers are compared as they are written in digits, without sign, unit or scale, wherever they are in the text.",
        "What is left of the model's other abilities, its behavior over several turns, and its answers to questions unlike these.",
        "How much chance is in this training: the intervals cover the choice of golden rows, not another seed of the same training.",
        "What the base read in pre-training; and training rows are found by equal text only, so a reworded chunk counts as never seen.",
        "Many differences at once: at 95 %, about one interval in twenty excludes 0 by chance.",
    ]
    if evaluation.settings["generation"].get("do_sample"):
        limits.append("How much answers vary: each question was answered once, by sampling.")
    if judged:
        limits.append("Errors of the judging model; it reads answers that may try to persuade it.")
    return limits
