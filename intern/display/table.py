"""Rows -> a table on standard output: drawn in a terminal, Markdown in a pipe."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """How a figure is shown: its heading, whether higher is better (None: neither), and its form."""

    label: str
    higher_is_better: bool | None
    form: str


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """Prints the table; the first `texts` columns are text, the others are figures."""
    console = Console()
    if console.is_terminal:
        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < texts else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_one_line(cell)) for cell in row))  # a path may look like rich's markup
        console.print(table)
        return
    sys.stdout.write(markdown(columns, rows, texts))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """The table as Markdown; no cell can break out of its place."""
    lines = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---"] * texts + ["---:"] * (len(columns) - texts))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
