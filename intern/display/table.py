"""Rows -> a table: drawn in a terminal, Markdown in a pipe."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """How a metric is shown: its heading, whether higher is better (None: neither), and its format."""

    label: str
    higher_is_better: bool | None
    form: str


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """Print a table to standard output.

    Args:
        columns: the headings.
        rows: the cells.
        texts: how many columns, from the left, are text; the others are numbers.
    """
    console = Console()
    if console.is_terminal:
        console.print(terminal_table(columns, rows, texts, frame=box.HEAVY_HEAD))
    else:
        sys.stdout.write(markdown(columns, rows, texts))


def terminal_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    texts: int = 1,
    last_is_text: bool = False,
    frame: box.Box = box.SIMPLE_HEAD,
) -> Table:
    """Return a table for a terminal. No text is read as rich's markup, and none controls the terminal.

    Args:
        columns: the headings.
        rows: the cells; those that are Text keep their style and line breaks, and must be printable.
        texts: how many columns, from the left, are text; the others are numbers.
        last_is_text: whether the last column is text too.
        frame: the lines around the cells.
    """
    table = Table(box=frame)
    for column, is_text in zip(columns, _are_texts(columns, texts, last_is_text), strict=True):
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(_one_line(cell)) for cell in row))
    return table


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1, last_is_text: bool = False) -> str:
    """Return a table as Markdown, in which no cell can break out of its place. The arguments are those of `terminal_table`."""
    lines = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---" if is_text else "---:" for is_text in _are_texts(columns, texts, last_is_text)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def printable(text: str) -> str:
    """Return the text with escapes for characters that control a terminal. Line breaks stay."""
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in text)


def _are_texts(columns: Sequence[str], texts: int, last_is_text: bool) -> list[bool]:
    last = len(columns) - 1
    return [index < texts or (last_is_text and index == last) for index in range(len(columns))]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
