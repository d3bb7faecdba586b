"""A run that was planned for a card -> one short table for a person, and numbers for scripts."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from intern.display.table import show
from intern.inspection.doctor_card import checkpointed
from intern.inspection.planned_run import PlannedRun
from intern.memory.speed import FASTEST, SLOWEST
from intern.units import GIB

_MEASURED = ("h100", "h200")
MEMORY_ERROR = 0.16  # of the peak: every measured row of docs/planning.md is within it


def plan_rows(run: PlannedRun) -> list[tuple[str, str]]:
    """Return the rows of the table: what, and how much of it."""
    rows, memory = run.rows, run.memory
    fitting = "fits" if run.is_enough else "does not fit"
    epochs = f"{run.steps / run.per_epoch:.1f} epochs of {run.per_epoch:,}"
    tokens = f"{rows.batch * run.batches:,.0f}{f' ({rows.basis})' if rows.basis else ''}"
    table = [
        ("card", f"{run.card.name}, {run.card.gib:.1f} GiB usable"),
        ("peak memory", f"about {memory.peak / GIB:.1f} GiB (within {MEMORY_ERROR:.0%}): {fitting}"),
        ("layers", checkpointed(run)),
        ("steps", f"{run.steps:,} ({epochs})"),
        ("tokens per step", tokens),
    ]
    if run.hours is None:
        reason = "its speed was never measured" if run.is_enough else "it does not fit"
        return [*table, ("time", f"not estimated: {reason}")]
    assert run.seconds is not None
    speed = rows.batch / run.seconds
    table += [
        ("tokens/s", f"about {speed:,.0f}, estimated ({speed / SLOWEST:,.0f} to {speed / FASTEST:,.0f})"),
        (
            "time",
            f"about {_hours(run.hours)}, estimated ({_hours(run.hours * FASTEST)} to {_hours(run.hours * SLOWEST)})",
        ),
    ]
    if run.price_per_hour is not None:
        price = run.hours * run.price_per_hour
        table.append(("price", f"about {price:,.2f}, estimated ({price * FASTEST:,.2f} to {price * SLOWEST:,.2f})"))
    return table


def show_plan(run: PlannedRun) -> None:
    """Print the table, and what its figures stand on."""
    sys.stdout.write("\n")
    show(["plan", run.card.key], plan_rows(run), texts=2)
    here = "" if run.card.key in _MEASURED else f", none of them on this card: {run.card.name} may be outside the range"
    note = (
        f"Estimated from measured runs of an 8B model on H100 and H200{here}. A range is as wide as these runs were from their "
        "estimates (docs/planning.md). Time is that of training alone, without start-up, checkpoints and golden rows."
    )
    console = Console()
    if console.is_terminal:
        console.print(Text(note))
    else:
        sys.stdout.write(f"\n{note}\n")


def plan_values(run: PlannedRun) -> dict[str, Any]:
    """Return the same for scripts; null where nothing is estimated."""
    hours = run.hours
    price = None if hours is None or run.price_per_hour is None else hours * run.price_per_hour

    def between(value: float | None) -> list[float] | None:
        return None if value is None else [value * FASTEST, value * SLOWEST]

    return {
        "gpu": run.card.key,
        "fits": run.is_enough,
        "peak_gib": run.memory.peak / GIB,
        "usable_gib": run.card.gib,
        "layers": run.memory.layers,
        "layers_checkpointed": run.memory.checkpointed,
        "steps": run.steps,
        "tokens_per_step": run.rows.batch * run.batches,
        "tokens_per_second": None if hours is None or run.seconds is None else run.rows.batch / run.seconds,
        "hours": hours,
        "hours_range": between(hours),
        "price": price,
        "price_range": between(price),
    }


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min" if hours * 60 >= 10 else f"{hours * 60:.1f} min"
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h"
