"""Rows -> a table on standard output: drawn to fit a terminal, Markdown in a pipe."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from intern.display.text import markdown_text, visible, without_tags

_TEXT, _HEADING = 16, 12  # characters: longer words of texts and headings may be broken, numbers never


@dataclass(frozen=True)
class Column:
    """How a value is shown: its heading, whether higher is better (None: neither), and its format."""

    label: str
    higher_is_better: bool | None
    form: str


def fitted(
    columns: Sequence[str], rows: Sequence[Sequence[str]], leaving: Sequence[str], texts: int = 1
) -> tuple[list[str], list[list[str]], int, list[str]]:
    """Return the table without the columns that a terminal has no room for: headings, rows, how many are text, and what was left out.

    Args:
        columns, rows, texts: as for `show`; outside of a terminal nothing is left out.
        leaving: headings of the columns that may go, the least telling one first.
    """
    console, headings, kept, gone = Console(), list(columns), [list(row) for row in rows], []
    for heading in leaving if console.is_terminal else ():
        if least_width(headings, kept, texts) <= console.width:
            break
        index = headings.index(heading)
        texts -= int(index < texts)
        gone.append(heading)
        del headings[index]
        for row in kept:
            del row[index]
    return headings, kept, texts, gone


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """Print the table.

    Args:
        columns: headings.
        rows: cells of each row.
        texts: the first `texts` columns are text, the others are numbers.
    """
    console = Console()
    if console.is_terminal:
        table = Table()
        widths = _column_widths(columns, rows, texts, console.width)
        for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
            table.add_column(
                Text(visible(column)), justify="left" if index < texts else "right", overflow="fold", width=width
            )
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))  # Text: a path may look like rich's markup
        console.print(table)
        return
    escaped = [
        [(markdown_text if index < texts else without_tags)(cell) for index, cell in enumerate(row)] for row in rows
    ]
    sys.stdout.write(markdown([without_tags(column) for column in columns], escaped, texts))


def terminal_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1, last_is_text: bool = False
) -> Table:
    """Return a light table for a terminal, whose cells are never read as rich's markup.

    Args:
        columns, rows, texts: as for `show`.
        last_is_text: whether the last column is text too.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for column, is_text in zip(columns, _are_texts(columns, texts, last_is_text), strict=True):
        table.add_column(Text(visible(column)), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1, last_is_text: bool = False) -> str:
    """Return the table as Markdown. No cell leaves its place; what else is Markdown in a cell takes effect.

    Args:
        columns, rows, texts: as for `show`.
        last_is_text: whether the last column is text too.
    """
    lines = [[visible(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---" if is_text else "---:" for is_text in _are_texts(columns, texts, last_is_text)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _are_texts(columns: Sequence[str], texts: int, last_is_text: bool) -> list[bool]:
    last = len(columns) - 1
    return [index < texts or (last_is_text and index == last) for index in range(len(columns))]


def natural_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return the columns of a terminal that the table needs if no cell is wrapped.

    Args:
        columns, rows: as for `show`.
    """
    return sum(_natural_widths(columns, rows)) + _borders(len(columns))


def least_width(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> int:
    """Return the columns of a terminal that the table needs if its cells are wrapped.

    Args:
        columns, rows, texts: as for `show`.
    """
    return sum(_least_widths(columns, rows, texts)) + _borders(len(columns))


def _natural_widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(cell_len(visible(row[index])) for row in (columns, *rows)) for index in range(len(columns))]


def _least_widths(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> list[int]:
    widths = []
    for index, heading in enumerate(columns):
        words = [cell_len(word) for row in rows for word in visible(row[index]).split()]
        longest = max(words, default=1)
        heading_words = max(map(cell_len, heading.split()), default=1)
        widths.append(max(min(longest, _TEXT) if index < texts else longest, min(heading_words, _HEADING)))
    return widths


def _column_widths(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int, available: int) -> list[int]:
    """Return the width of each column: as wide as its cells if there is room, else the room is shared by what each lacks."""
    natural = _natural_widths(columns, rows)
    room = available - _borders(len(columns))
    if sum(natural) <= room:
        return natural
    least = [min(pair) for pair in zip(_least_widths(columns, rows, texts), natural, strict=True)]
    spare, lacking = max(room - sum(least), 0), sum(natural) - sum(least)
    return [width + spare * (wanted - width) // max(lacking, 1) for width, wanted in zip(least, natural, strict=True)]


def _borders(count: int) -> int:
    return 3 * count + 1
