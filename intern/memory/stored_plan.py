"""memory.json: the memory plan of a run, which a resume repeats."""

import logging
from dataclasses import asdict
from typing import Any

from intern.config.build import build
from intern.errors import UserError
from intern.memory.plan import MemoryPlan
from intern.runs.directory import Run

log = logging.getLogger(__name__)

SCHEMA_VERSION = (
    1  # raise it when a field of MemoryPlan changes its meaning; added and removed fields are noticed without it
)


def write_plan(run: Run, plan: MemoryPlan) -> None:
    """Write memory.json, whole or not at all."""
    run.write_json(run.memory, {"schema_version": SCHEMA_VERSION} | asdict(plan))


def read_plan(run: Run, layers: int) -> MemoryPlan | None:
    """Read the plan of a run that resumes.

    Which layers recompute decides how sums round, so repeating the plan keeps a resumed run bit for bit the same.

    Args:
        layers: decoder layers of the model.

    Returns:
        None if there is no plan, or one that this version does not understand: it is then measured again, with a warning.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
    """
    if not run.memory.is_file():
        return None
    values = run.read_json(run.memory)
    if (fault := _fault(values)) is None:
        plan = MemoryPlan(**values)
        if plan.layers == layers and 0 <= plan.checkpointed <= layers:
            return plan
        fault = f"{plan.checkpointed} of {plan.layers} layers checkpointed, and the model has {layers}"
    log.warning(
        "%s is not used (%s): memory is planned again; the run resumes, but not bit for bit the same", run.memory, fault
    )
    return None


def _fault(values: dict[str, Any]) -> str | None:
    """Remove the schema version from `values`; say why the rest is no plan, or None if it is one."""
    version = values.pop("schema_version", SCHEMA_VERSION)  # the first form had none
    if version != SCHEMA_VERSION:
        return f"schema_version={version}, and this version of intern reads {SCHEMA_VERSION}"
    try:
        build(MemoryPlan, values, "plan")
    except UserError as error:
        return str(error)
    return None
