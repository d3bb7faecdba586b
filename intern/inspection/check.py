"""Checks and how they are shown: a table in a terminal, Markdown in a pipe, JSON for scripts."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

from intern.display.table import markdown, printable, terminal_table
from intern.errors import RunError

Status = Literal["green", "amber", "red"]
GREEN: Status = "green"  # nothing to do
AMBER: Status = "amber"  # works, but the user should know
RED: Status = "red"  # does not work, or makes the result worthless
SCHEMA_VERSION = 1  # of as_json


@dataclass(frozen=True)
class Check:
    """One thing that was checked, what was found, and what to do about it (empty if there is nothing to do)."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def verdict(checks: Sequence[Check]) -> Status:
    """Return the worst status among the checks."""
    statuses = {check.status for check in checks}
    return RED if RED in statuses else AMBER if AMBER in statuses else GREEN


def raise_if_red(checks: Sequence[Check], subject: str) -> None:
    """Raise RunError, naming the red checks, if there are any."""
    if red := [check.name for check in checks if check.status == RED]:
        raise RunError(f"{subject}: {len(red)} of {len(checks)} checks red: {', '.join(red)}")


def as_json(checks: Sequence[Check]) -> str:
    """Return the checks for a script: {"schema_version": 1, "verdict": "red", "checks": [{"name", "status", "found", "remedy"}, ...]}.

    `verdict` is the worst status; a status is "green", "amber" or "red"; all other values are text. Names stay the same from version to
    version; `found` and `remedy` are for people.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict(checks),
        "checks": [asdict(check) for check in checks],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def show_checks(checks: Sequence[Check], console: Console) -> None:
    """Print the checks: a table in a terminal, Markdown to standard output otherwise."""
    counts = Counter(check.status for check in checks)
    summary = ", ".join(f"{counts[status]} {status}" for status in (GREEN, AMBER, RED) if counts[status])
    if not console.is_terminal:
        cells = [[check.name, check.status, _one_line(check.found), _one_line(check.remedy)] for check in checks]
        sys.stdout.write(f"{markdown(['check', 'status', 'found', 'remedy'], cells, texts=4)}\n{summary}\n")
        return
    styles = {GREEN: "green", AMBER: "yellow", RED: "bold red"}
    rows = []
    for check in checks:
        text = Text(printable(check.found))
        if check.remedy:
            text.append(f"\n→ {printable(check.remedy)}", styles[check.status])
        rows.append(
            (Text(check.name, no_wrap=True), Text(f"● {check.status}", styles[check.status], no_wrap=True), text)
        )
    console.print(terminal_table(["check", "", "found, and what to do"], rows, texts=3))
    console.print(Text(summary))


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())
