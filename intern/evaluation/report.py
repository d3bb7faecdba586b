"""An evaluation -> report.html (one self-contained file) and report.md. Answers are untrusted text and stay text."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from intern.display.table import markdown
from intern.display.text import in_lines, markdown_text
from intern.evaluation.bootstrap import FEW_MARK
from intern.evaluation.evaluate import Evaluation
from intern.evaluation.report_plots import NARROW, draw_plots
from intern.evaluation.report_view import build_view
from intern.runs.files import write_text


def write_report(evaluation: Evaluation) -> None:
    """Write the plots and both reports into the evaluation's folder."""
    plots = draw_plots(evaluation)
    view = build_view(evaluation)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_without_control_characters,
    )
    images = {path.stem: Markup(base64.b64encode(path.read_bytes()).decode()) for path in plots}
    html = environment.get_template("report.html.jinja").render(images=images, **view)
    write_text(evaluation.folder / "report.html", evaluation.folder, html)
    write_text(evaluation.folder / "report.md", evaluation.folder, _markdown(view, plots))


def _without_control_characters(value: Any) -> Any:
    """Show the control characters of texts as escapes, except line breaks and tabs, which the page shows as such."""
    return in_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown(view: dict[str, Any], plots: list[Path]) -> str:
    """Return the same content as the page, for places that show Markdown."""
    first, second = view["names"]
    parts = [
        f"# {view['title']}\n",
        *(
            f"- {name}: {markdown_text(path)}{'' if adapted else ' without its adapter'}"
            for name, path, adapted in view["runs"]
        ),
        f"- {view['rows']} golden rows of {markdown_text(view['file'])}; "
        + ", ".join(f"{name}: {how}" for name, how in view["contexts"]),
        f"- Seen by training: {markdown_text(view['told_by'])}\n",
    ]
    parts += [f"> {markdown_text(note)}\n" for note in view["notes"]]
    columns = ["metric", "rows", first, second, "difference", ""]
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
    parts += [f"![{path.stem}]({path.name})\n" for path in plots if not path.stem.endswith(NARROW)]
    if view["topics"]:
        parts.append("## By topic\n\n" + _topics(view))
    for name in ("worst", "best"):
        parts.append(f"## The {name} rows by {view['ranked_by']} of {second}\n")
        for one in view[name]:
            parts.append(
                f"**{markdown_text(one['question'])}** ({markdown_text('; '.join(one['marks']))})\n\n"
                f"- reference: {markdown_text(one['reference'])}\n"
                f"- {first}: {markdown_text(one['before'])}\n- {second}: {markdown_text(one['after'])}\n"
                f"- {view['ranked_by']} {one['score'][0]} → {one['score'][1]}, loss {one['loss'][0]} → {one['loss'][1]}\n"
            )
    parts.append("## What this does not measure\n\n" + "".join(f"- {limit}\n" for limit in view["limits"]))
    parts.append("## Time\n\n" + markdown(["model", "seconds of answering", "tokens/s"], view["speed"]))
    return "\n".join(parts)


def _topics(view: dict[str, Any]) -> str:
    first, second = view["names"]
    columns = ["topic", "on seen chunks"]
    for label in view["topic_metrics"]:
        columns += [f"{label}: {first}", second, "difference"]
    lines = []
    for topic in view["topics"]:
        cells = [cell for line in topic["lines"] for cell in (line.before, line.after, line.difference)]
        lines.append([markdown_text(topic["label"]), topic["seen"], *cells])
    return markdown(columns, lines)
