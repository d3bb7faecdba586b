"""An evaluation -> report.html (one file, self-contained), report.md and their plots. Answers are untrusted text and stay text."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from intern.display.plot import Point, labels, plot_changes, plot_rows, plot_scores
from intern.display.table import markdown
from intern.evaluation.bootstrap import FEW, FEW_MARK, Comparison, Estimate
from intern.evaluation.evaluate import Evaluation, Group, Row
from intern.evaluation.metrics import SCORES

_PLOTTED = ("loss", "token_f1", "rouge_l", "figures_right")
_HEADLINES = ("loss", "token_f1", "figures_right", "refused_rightly", "refused_wrongly")
_SHOWN_ROWS = 8  # worst and best ones each
_MOST_TOPICS = 40  # in the plot; the table has all
_MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]()#+!|~<>&$-])")


@dataclass(frozen=True)
class _Line:
    """One score of one group, as text."""

    label: str
    rows: int
    few: bool
    before: str
    after: str
    difference: str
    verdict: str  # better, worse, unclear, too few (rows), or nothing where neither is better


def write_report(evaluation: Evaluation) -> None:
    """Writes the plots and both reports into the evaluation's folder."""
    plots = _draw(evaluation)
    view = _view(evaluation)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    images = {path.stem: Markup(base64.b64encode(path.read_bytes()).decode()) for path in plots}
    html = environment.get_template("report.html.jinja").render(images=images, **view)
    (evaluation.folder / "report.html").write_text(html, encoding="utf-8")
    (evaluation.folder / "report.md").write_text(_markdown(view, plots), encoding="utf-8")


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of any of the tables must know."""
    found = []
    groups = [group for group in evaluation.groups if group.kind != "topic"]
    if any(group.rows < FEW for group in groups):
        found.append(f"{FEW_MARK} fewer than {FEW} rows: too few to rely on.")
    if trained := sum(bool(row.trained) for row in evaluation.rows):
        found.append(
            f"{trained} of {len(evaluation.rows)} golden rows are training rows (same question, same answer): their scores show memory."
        )
    if all(row.trained is None for row in evaluation.rows):
        found.append(f"What training saw: {evaluation.overlap.told_by}")
    unfit = sum(row.before.prediction.loss is None or row.after.prediction.loss is None for row in evaluation.rows)
    if unfit:
        found.append(f"{unfit} rows do not fit into trainer.max_length: they have answers and no loss.")
    if not evaluation.losses_comparable:
        found.append(
            "The two runs' tokenizers split the references differently: their losses per token cannot be compared."
        )
    return found


def _view(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the reports show, as text and numbers."""
    before, after = evaluation.sides
    everything = evaluation.groups[0]
    judged = everything.counted["judged"] > 0
    ranked = sorted(evaluation.rows, key=lambda row: (row.after.token_f1, -(row.after.loss or 0.0)))
    shown = min(_SHOWN_ROWS, len(ranked) // 2)
    unanswerable = sum(row.unanswerable for row in evaluation.rows)
    return {
        "title": f"{after.name} against {before.name}" if before.run != after.run else "Adapter against base",
        "names": (before.name, after.name),
        "runs": [(side.name, str(side.run.path), side.adapted) for side in evaluation.sides],
        "file": str(evaluation.file.path),
        "sha256": evaluation.file.sha256,
        "rows": len(evaluation.rows),
        "unanswerable": unanswerable,
        "contexts": [
            (side.name, "with chunk_text" if side.with_material else "closed book") for side in evaluation.sides
        ],
        "headlines": [_line(name, everything) for name in _HEADLINES],
        "groups": [
            {
                "label": group.label,
                "seen": f"{group.seen_chunks} of {group.rows} rows are on chunks that training saw.",
                "lines": [_line(name, group) for name in SCORES if name != "judged" or judged],
            }
            for group in evaluation.groups
            if group.kind != "topic"
        ],
        "topics": [
            {
                "label": group.label,
                "seen": f"{group.seen_chunks} of {group.rows}",
                "loss": _line("loss", group),
                "f1": _line("token_f1", group),
                "figures": _line("figures_right", group),
            }
            for group in evaluation.groups
            if group.kind == "topic"
        ],
        "worst": [_example(row) for row in ranked[:shown]],
        "best": [_example(row) for row in reversed(ranked[len(ranked) - shown :])],
        "notes": notes(evaluation),
        "few": FEW,
        "few_mark": FEW_MARK,
        "told_by": _told(evaluation),
        "speed": [
            (name, f"{figures['seconds']:,.1f} s", f"{figures['tokens_per_second']:,.0f}")
            for name, figures in evaluation.speed.items()
        ],
        "limits": _limits(evaluation, judged),
        "settings": {name: str(value) for name, value in evaluation.settings.items() if value is not None},
    }


def _told(evaluation: Evaluation) -> str:
    """How it is known what training saw, and how much of the golden file that is."""
    if all(row is None for row in evaluation.overlap.rows):
        return evaluation.overlap.told_by
    rows, chunks = sum(map(bool, evaluation.overlap.rows)), sum(map(bool, evaluation.overlap.chunks))
    return f"{evaluation.overlap.told_by} {rows} of {len(evaluation.rows)} golden rows are training rows, {chunks} are on its chunks."


def _line(name: str, group: Group) -> _Line:
    score, comparison = SCORES[name], group.scores[name]
    points = score.form.endswith("%")
    difference = comparison.difference
    if points:  # a difference of shares is one of percentage points
        scaled = (
            None if value is None else value * 100 for value in (difference.value, difference.low, difference.high)
        )
        text = _with_bounds(Estimate(*scaled), "+.1f", " points")
    else:
        text = _with_bounds(difference, f"+{score.form}")
    return _Line(
        label=score.label,
        rows=group.counted[name],
        few=group.counted[name] < FEW,
        before=_with_bounds(comparison.before, score.form),
        after=_with_bounds(comparison.after, score.form),
        difference=text,
        verdict=_verdict(comparison, score.higher_is_better) if group.counted[name] >= FEW else "too few",
    )


def _with_bounds(estimate: Estimate, form: str, unit: str = "") -> str:
    if estimate.value is None:
        return "–"
    value = f"{estimate.value:{form}}".replace("-", "−")
    if estimate.low is None or estimate.high is None:
        return f"{value}{unit}"
    low, high = (f"{bound:{form}}".replace("-", "−") for bound in (estimate.low, estimate.high))
    return f"{value}{unit} [{low}, {high}]"


def _verdict(comparison: Comparison, higher_is_better: bool | None) -> str:
    low, high = comparison.difference.low, comparison.difference.high
    if low is None or high is None or higher_is_better is None:
        return ""
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == higher_is_better else "worse"


def _example(row: Row) -> dict[str, Any]:
    of_training = {
        True: "training saw its chunk",
        False: "training never saw its chunk",
        None: "unknown to training or not: cannot be told",
    }
    marks = [f"row {row.number}", *([row.topic] if row.topic else []), of_training[row.seen]]
    if row.trained:
        marks.append("is a training row")
    if row.unanswerable:
        marks.append("the material does not say")
    return {
        "marks": marks,
        "question": row.question,
        "reference": row.reference,
        "before": row.before.prediction.answer,
        "after": row.after.prediction.answer,
        "f1": (f"{row.before.token_f1:.2f}", f"{row.after.token_f1:.2f}"),
        "loss": tuple("–" if side.loss is None else f"{side.loss:.2f}" for side in (row.before, row.after)),
        "missing": ", ".join(row.after.missing),
        "invented": ", ".join(row.after.invented),
        "cut": not row.after.prediction.ended,
    }


def _limits(evaluation: Evaluation, judged: bool) -> list[str]:
    """What these scores do not say."""
    limits = [
        "Whether an answer is true: it is compared with one reference. A right answer in other words scores low, a wrong one in the same words high.",
        "What a figure is said of: numbers are compared as they are written in digits, without sign, unit or scale, wherever they stand.",
        "What the model keeps of its other abilities, how it talks over several turns, how it behaves on questions unlike these.",
        "How much luck is in this training: the intervals speak of the choice of golden rows, not of another seed of the same training.",
        "What the base has read before: training rows are compared by equal text alone, so a chunk told in other words counts as never seen.",
        "Each difference for itself: at 95 %, about one in twenty of the many intervals here excludes 0 by chance.",
    ]
    if evaluation.settings["generation"].get("do_sample"):
        limits.append("How answers vary: each question was answered once, by sampling.")
    if judged:
        limits.append("Where the judging model errs; it reads answers that may try to persuade it.")
    return limits


def _draw(evaluation: Evaluation) -> list[Path]:
    """The plots that the rows allow."""
    folder = evaluation.folder
    groups = [group for group in evaluation.groups if group.kind != "topic"]
    names = (evaluation.sides[0].name, evaluation.sides[1].name)
    panels = {
        SCORES[score].label: {
            names[0]: [_point(group.scores[score].before) for group in groups],
            names[1]: [_point(group.scores[score].after) for group in groups],
        }
        for score in _PLOTTED
    }
    drawn = [folder / "scores.png"]
    plot_scores(panels, [group.label for group in groups], [SCORES["figures_right"].label], drawn[0])
    kinds: dict[str, list[tuple[float, float]]] = {}
    for label, mark in (("training saw the chunk", True), ("it never did", False), ("cannot be told", None)):
        points = [
            (row.before.loss, row.after.loss)
            for row in evaluation.rows
            if row.seen is mark and row.before.loss is not None and row.after.loss is not None
        ]
        if points:
            kinds[label] = points
    if kinds and evaluation.losses_comparable:
        drawn.append(folder / "rows.png")
        plot_rows(kinds, names, "loss (nats a token)", drawn[-1])
    topics = sorted((group for group in evaluation.groups if group.kind == "topic"), key=lambda group: -group.rows)
    changes = [
        (group.label, point) for group in topics[:_MOST_TOPICS] if (point := _point(group.scores["loss"].difference))
    ]
    if changes:
        names_shown = labels([label for label, _ in changes], 48)
        pairs = sorted(zip(names_shown, (point for _, point in changes), strict=True), key=lambda pair: pair[1][0])
        drawn.append(folder / "topics.png")
        plot_changes(
            pairs, f"change of the loss, {names[1]} minus {names[0]} (nats a token; left is better)", drawn[-1]
        )
    for name in ("rows.png", "topics.png"):
        if folder / name not in drawn:
            (folder / name).unlink(missing_ok=True)  # of an earlier start
    return drawn


def _point(estimate: Estimate) -> Point | None:
    return None if estimate.value is None else (estimate.value, estimate.low, estimate.high)


def _markdown(view: dict[str, Any], plots: list[Path]) -> str:
    """The same as the page, for places that show Markdown."""
    first, second = view["names"]
    parts = [
        f"# {view['title']}\n",
        *(f"- {name}: `{path}`{'' if adapted else ' without its adapter'}" for name, path, adapted in view["runs"]),
    ]
    parts.append(
        f"- {view['rows']} golden rows of `{view['file']}`; "
        + ", ".join(f"{name}: {how}" for name, how in view["contexts"])
    )
    parts.append(f"- Seen by training: {view['told_by']}\n")
    parts += [f"> {note}\n" for note in view["notes"]]
    columns = ["score", "rows", first, second, "difference", ""]
    for group in view["groups"]:
        lines = [
            [
                line.label,
                f"{line.rows}{' ' + FEW_MARK if line.few else ''}",
                line.before,
                line.after,
                line.difference,
                line.verdict,
            ]
            for line in group["lines"]
        ]
        parts.append(f"## {group['label']}\n\n{group['seen']}\n\n{markdown(columns, lines)}")
    parts.append("Brackets hold 95 % intervals (bootstrap over chunks; the difference is paired).\n")
    parts += [f"![{path.stem}]({path.name})\n" for path in plots]
    if view["topics"]:
        lines = [
            [
                _plain(topic["label"]),
                topic["seen"],
                topic["loss"].before,
                topic["loss"].after,
                topic["loss"].difference,
                topic["f1"].after,
            ]
            for topic in view["topics"]
        ]
        parts.append(
            "## By topic\n\n"
            + markdown(
                ["topic", "on seen chunks", f"loss: {first}", second, "difference", f"token F1: {second}"], lines
            )
        )
    for name in ("worst", "best"):
        parts.append(f"## The {name} rows by token F1 of {second}\n")
        for one in view[name]:
            parts.append(
                f"**{_plain(one['question'])}** ({_plain('; '.join(one['marks']))})\n\n- reference: {_plain(one['reference'])}\n"
                f"- {first}: {_plain(one['before'])}\n- {second}: {_plain(one['after'])}\n"
                f"- token F1 {one['f1'][0]} → {one['f1'][1]}, loss {one['loss'][0]} → {one['loss'][1]}\n"
            )
    parts.append("## What this does not measure\n\n" + "".join(f"- {limit}\n" for limit in view["limits"]))
    parts.append("## Time\n\n" + markdown(["model", "seconds of answering", "answer tokens a second"], view["speed"]))
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Somebody's text as Markdown that shows it as it stands, on one line."""
    return _MARKDOWN_SIGNS.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\&", "&amp;")
