"""Compared runs -> their tables and what has to be said about them, on standard output."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from intern.comparison.groups import Runs
from intern.comparison.table import GROUP, STAR, narrowed, others, quality, table, without_shared_prefix
from intern.display.table import natural_width, show
from intern.display.text import visible

_MOST_OTHERS = 10  # runs that cannot be compared


def show_runs(runs: Runs, top: int, folder: Path, said: Sequence[str]) -> None:
    """Print the best runs, those that cannot be compared, and the notes.

    Args:
        runs: all compared runs.
        top: finished runs that get a row.
        folder: where compare.md has the rest.
        said: notes and advice.
    """
    left_out: list[str] = []
    if runs.finished:
        chosen = runs.finished[:top]
        headings, rows = table(runs, chosen, brief=True)
        console = Console()
        if console.is_terminal and natural_width(headings, rows) > console.width:
            prefix, names = without_shared_prefix([one.name for one in chosen])
            rows = [
                [f"{STAR}{name}" if runs.is_best(one) else name, *row[1:]]
                for one, name, row in zip(chosen, names, rows, strict=True)
            ]
            shown, rows = narrowed(headings, rows, console.width, keep=[quality(runs), GROUP])
            missing = [heading for heading in headings if heading not in shown]
            left_out = [f"… is {prefix}"] if prefix else []
            left_out += [f"Left out at this width, see compare.md: {', '.join(missing)}."] if missing else []
            headings = [heading.replace("_", " ") for heading in shown]  # they wrap between words
        show(headings, rows)
    if len(runs.finished) > top:
        sys.stdout.write(f"\n{len(runs.finished) - top} more runs in {visible(str(folder / 'compare.md'))}\n")
    if runs.others:
        total, most = len(runs.others), min(len(runs.others), _MOST_OTHERS)
        some = f"; {most} of them" if most < total else ""
        sys.stdout.write(f"\n{total} of {total + len(runs.finished)} runs cannot be compared{some}:\n\n")
        headings, rows = others(runs, most)
        show(headings, rows, texts=len(headings))
    sys.stdout.write("".join(f"\n{visible(line)}" for line in [*left_out, *said, f"files: {folder}"]) + "\n")
