"""Checks and how they are shown: a table in a terminal, Markdown in a pipe, JSON for scripts."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from intern.display.table import markdown
from intern.display.text import json_text, printable, without_tags
from intern.errors import RunError

Status = Literal["green", "amber", "red"]
GREEN: Status = "green"  # nothing to do
AMBER: Status = "amber"  # works, but a person should know it
RED: Status = "red"  # does not work, or makes what comes of it worthless
SCHEMA_VERSION = 1  # of as_json


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, what was found, and what to do about it (empty where there is nothing to do)."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def verdict(checks: Sequence[Check]) -> Status:
    """The worst status among the checks."""
    statuses = {check.status for check in checks}
    return RED if RED in statuses else AMBER if AMBER in statuses else GREEN


def raise_if_red(checks: Sequence[Check], subject: str) -> None:
    """Raises RunError, naming the red checks, where there are any."""
    if red := [check.name for check in checks if check.status == RED]:
        raise RunError(f"{subject}: {len(red)} of {len(checks)} checks red: {', '.join(red)}")


def as_json(checks: Sequence[Check], plan: Mapping[str, Any] | None = None) -> str:
    """The checks for a script: {"schema_version": 1, "verdict": "red", "checks": [{"name", "status", "found", "remedy"}, ...]}.

    Args:
        checks: the checks.
        plan: what the run would take on a card (intern.inspection.plan_display.plan_values); added as "plan".

    `verdict` is the worst status; a status is "green", "amber" or "red"; all other values are text. Names stay the same from
    version to version, what stands in `found` and `remedy` is for people.
    """
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict(checks),
        "checks": [asdict(check) for check in checks],
    }
    if plan is not None:
        content["plan"] = dict(plan)
    return json_text(json.dumps(content, indent=2, ensure_ascii=False))


def show_checks(checks: Sequence[Check], console: Console) -> None:
    """Prints the checks."""
    counts = Counter(check.status for check in checks)
    summary = ", ".join(f"{counts[status]} {status}" for status in (GREEN, AMBER, RED) if counts[status])
    if not console.is_terminal:
        rows = [[check.name, check.status, _folded(check.found), _folded(check.remedy)] for check in checks]
        sys.stdout.write(markdown(["check", "status", "found", "remedy"], rows, texts=4) + f"\n{summary}\n")
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    styles = {GREEN: "green", AMBER: "yellow", RED: "bold red"}
    for check in checks:
        told = Text(printable(check.found))
        if check.remedy:
            told.append(f"\n→ {printable(check.remedy)}", styles[check.status])
        table.add_row(Text(check.name), Text(f"● {check.status}", styles[check.status]), told)
    console.print(table)
    console.print(Text(summary))


def _folded(text: str) -> str:
    return without_tags(" ".join(printable(text).split()))
