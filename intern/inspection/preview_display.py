"""Rows of tokens -> colored text in a terminal, marked plain text, an HTML page."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from intern.data.prompt import IGNORED, Kind, Token
from intern.display.table import markdown, terminal_table
from intern.display.text import json_text, printable
from intern.inspection.check import Check

# For each kind two backgrounds, so that neighboring tokens can be told apart, and what it is.
_COLORS: dict[str, tuple[str, str, str]] = {
    "template": ("#4a4a4a", "#3a3a3a", "template"),
    "system": ("#4b3f72", "#3b315c", "system prompt"),
    "material": ("#7a5c1e", "#644a15", "context"),
    "question": ("#1f4e79", "#173d60", "question"),
    "answer": ("#1e6b3c", "#15552e", "answer, with loss"),
    "end of turn": ("#a3286b", "#a3286b", "end of turn, with loss"),
    "cut": ("#8b1a1a", "#701212", "cut off"),
}
_BATCH_COLUMNS = ("row", "place", "position ids", "with loss", "begins")
_STATISTICS_COLUMNS = ("", "training rows", "golden rows")
_MAX_BYTES_PER_CHARACTER = 4  # UTF-8


@dataclass(frozen=True)
class Piece:
    """Tokens that form whole characters together: nearly always one."""

    text: str
    ids: tuple[int, ...]
    kind: Kind
    cut: bool
    loss: bool

    @property
    def color(self) -> str:
        return "cut" if self.cut else self.kind


@dataclass(frozen=True)
class ShownRow:
    """One row of the file as tokens."""

    title: str
    note: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Segment:
    """A row within a row of a batch: tokens start to end (exclusive), and the positions that the model is passed."""

    row: str  # its line in the file, "padding" or "unused"
    start: int
    end: int
    positions: str
    with_loss: int
    begins: str  # the beginning of its question


@dataclass(frozen=True)
class ShownBatch:
    """One row of a batch as the trainer's collator makes it."""

    title: str
    segments: list[Segment]


@dataclass(frozen=True)
class Preview:
    """Everything that a preview shows."""

    rows: list[ShownRow]
    batch: ShownBatch | None
    statistics: list[tuple[str, str, str]]  # name, training rows, golden rows
    checks: list[Check]
    lengths: Path | None  # the picture of the histogram


def pieces(tokens: Sequence[Token], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Group the tokens of a row into whole characters.

    Args:
        tokens: of the row, including those that were cut.
        labels: of the tokens that were not cut; empty if the row is not trained on.
        tokenizer: the model's.
    """
    loss = iter([label != IGNORED for label in labels])
    shown: list[Piece] = []
    waiting: list[int] = []
    for place, token in enumerate(tokens):
        carries = not token.cut and next(loss, False)
        waiting.append(token.id)
        text = str(tokenizer.decode(waiting))
        follows = tokens[place + 1] if place + 1 < len(tokens) else None
        same = follows is not None and (follows.kind, follows.cut) == (token.kind, token.cut)
        if text.endswith("\ufffd") and same and len(waiting) < _MAX_BYTES_PER_CHARACTER:
            continue  # the next token has the rest of this character
        shown.append(Piece(text, tuple(waiting), token.kind, token.cut, carries))
        waiting = []
    return shown


def show_rows(preview: Preview, console: Console) -> None:
    """Print colored tokens and tables to a terminal."""
    legend = Text()
    for first, _, meaning in _COLORS.values():
        legend.append(f" {meaning} ", f"white on {first}").append(" ")
    console.print(legend)
    for row in preview.rows:
        console.print()
        console.print(Text.assemble((printable(row.title), "bold"), "  ", printable(row.note)))
        text = Text()
        for place, piece in enumerate(row.pieces):
            style = f"{'bold ' if piece.loss else ''}{'strike ' if piece.cut else ''}white on {_COLORS[piece.color][place % 2]}"
            text.append(_visible(piece.text), style)
        console.print(text)
    if preview.batch is not None:
        console.print()
        console.print(Text(printable(preview.batch.title), "bold"))
        console.print(terminal_table(_BATCH_COLUMNS, map(_cells, preview.batch.segments), texts=0, last_is_text=True))
    console.print()
    console.print(terminal_table(_STATISTICS_COLUMNS, preview.statistics))


def plain_rows(preview: Preview) -> str:
    """Return the preview as plain text: one line per part of a row, tokens as JSON strings, so that no text can be mistaken for markup."""
    lines = []
    for row in preview.rows:
        lines += [f"## {row.title}", "", row.note, ""]
        for kind, loss, part in _parts(row.pieces):
            count = sum(len(piece.ids) for piece in part)
            size = f"{count} token{'s' if count != 1 else ''}"
            texts = " ".join(_json(piece.text) for piece in part)
            lines.append(f"    {kind}, {size}, {'loss' if loss else 'no loss'}: {texts}")
        lines.append("")
    if preview.batch is not None:
        cells = [_cells(segment) for segment in preview.batch.segments]
        lines += [f"## {preview.batch.title}", "", markdown(_BATCH_COLUMNS, cells, texts=0, last_is_text=True)]
    lines += ["## Statistics", "", markdown(_STATISTICS_COLUMNS, preview.statistics)]
    return "\n".join([*lines, "## Checks", "", ""])


def page(preview: Preview, title: str) -> str:
    """Return a self-contained HTML page without scripts."""
    colors = "\n".join(
        f".{name.replace(' ', '-')} {{ background: {first} }} .{name.replace(' ', '-')}.odd {{ background: {second} }}"
        for name, (first, second, _) in _COLORS.items()
    )
    legend = " ".join(
        f'<span class="token {name.replace(" ", "-")}">{text}</span>' for name, (_, _, text) in _COLORS.items()
    )
    body = [f"<h1>{_safe(title)}</h1>", f"<p>{legend}</p>"]
    for row in preview.rows:
        body += [
            f"<h2>{_safe(row.title)}</h2>",
            f"<p>{_safe(row.note)}</p>",
            f'<p class="row">{_spans(row.pieces)}</p>',
        ]
    if preview.batch is not None:
        body += [
            f"<h2>{_safe(preview.batch.title)}</h2>",
            _html_table(_BATCH_COLUMNS, [_cells(one) for one in preview.batch.segments]),
        ]
    body += ["<h2>Statistics</h2>", _html_table(_STATISTICS_COLUMNS, preview.statistics)]
    if preview.lengths is not None:
        picture = base64.b64encode(preview.lengths.read_bytes()).decode()
        body.append(f'<p><img alt="histogram of row lengths" src="data:image/png;base64,{picture}"></p>')
    checks = [(check.name, check.status, check.found, check.remedy) for check in preview.checks]
    body += ["<h2>Checks</h2>", _html_table(("check", "status", "found", "remedy"), checks)]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(title)}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; color: #222; background: #fff }}
h2 {{ margin-top: 2rem; font-size: 1.1rem }}
.row {{ font-family: ui-monospace, monospace; font-size: .9rem; line-height: 1.9 }}
.token {{ color: #fff; padding: .1em 0; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 2px }}
.loss {{ font-weight: bold }}
.cut {{ text-decoration: line-through }}
table {{ border-collapse: collapse }}
td, th {{ border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; vertical-align: top }}
td {{ overflow-wrap: break-word }}
.green {{ color: #15552e }} .amber {{ color: #8a5a00 }} .red {{ color: #a00; font-weight: bold }}
img {{ max-width: 100% }}
{colors}
</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _parts(row: list[Piece]) -> list[tuple[str, bool, list[Piece]]]:
    """Group neighbors of the same kind."""
    parts: list[tuple[str, bool, list[Piece]]] = []
    for piece in row:
        kind = f"{piece.kind} cut off" if piece.cut else piece.kind
        if not parts or parts[-1][:2] != (kind, piece.loss):
            parts.append((kind, piece.loss, []))
        parts[-1][2].append(piece)
    return parts


def _cells(segment: Segment) -> tuple[str, str, str, str, str]:
    span = f"{segment.start:,}-{segment.end - 1:,}"
    with_loss = str(segment.with_loss) if segment.positions else ""
    return segment.row, span, segment.positions, with_loss, printable(segment.begins)


def _json(text: str) -> str:
    """Return the text as a JSON string without terminal escapes: JSON itself lets DEL, C1 and invisible characters through."""
    quoted = json.dumps(text, ensure_ascii=False)
    return json_text("".join(json.dumps(c)[1:-1] if printable(c) != c else c for c in quoted))


def _visible(text: str) -> str:
    """Return the text with its line breaks marked."""
    return printable(text).replace("\n", "⏎\n")


def _spans(row: list[Piece]) -> str:
    spans = []
    for place, piece in enumerate(row):
        classes = [
            "token",
            piece.color.replace(" ", "-"),
            *(["odd"] if place % 2 else []),
            *(["loss"] if piece.loss else []),
        ]
        name = f"{'cut off' if piece.cut else piece.kind}, {'loss' if piece.loss else 'no loss'}, id {' '.join(map(str, piece.ids))}"
        spans.append(f'<span class="{" ".join(classes)}" title="{_safe(name)}">{_safe(_visible(piece.text))}</span>')
    return "".join(spans)


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_safe(column)}</th>" for column in columns)
    lines = ["<tr>" + "".join(f"<td{_status_class(cell)}>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _status_class(cell: str) -> str:
    return f' class="{cell}"' if cell in ("green", "amber", "red") else ""


def _safe(text: str) -> str:
    return html.escape(printable(text))
