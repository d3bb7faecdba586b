"""Rows -> a table on standard output: drawn in a terminal, Markdown in a pipe."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints the table; the first column is text, the others are figures."""
    console = Console()
    if console.is_terminal:
        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))
