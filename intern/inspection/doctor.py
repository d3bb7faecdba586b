"""A composed training configuration -> everything that can stop its run, checked in seconds without loading weights.

Each check stands alone: what a library raises in one of them becomes a red line, and all others still run. So neither this module nor the
modules of the checks import anything heavy at the top, and what the checks share (DoctorPieces) is made when it is first read.
"""

import contextlib
from collections.abc import Callable

from omegaconf import DictConfig

from intern.cards import Card
from intern.errors import RunError, UserError, one_line
from intern.inspection.check import AMBER, RED, Check
from intern.inspection.doctor_card import card_checks, planned
from intern.inspection.doctor_configuration import (
    check_adapter,
    check_configuration,
    check_golden_rows,
    check_model,
    check_tokenizer,
    check_training_rows,
)
from intern.inspection.doctor_machine import (
    check_accelerators,
    check_gpu,
    check_imports,
    check_libraries,
    check_precision,
    check_python,
    check_quantization,
)
from intern.inspection.doctor_memory_and_disk import (
    check_disk,
    check_gpu_memory,
    check_host_memory,
    check_run_directory,
)
from intern.inspection.doctor_network import check_hub, check_tracker, check_weights
from intern.inspection.doctor_pieces import DoctorPieces, SkippedError
from intern.inspection.planned_run import CardPieces, PlannedRun

CHECKS: dict[str, Callable[[DoctorPieces], Check]] = {
    "Python": check_python,
    "libraries": check_libraries,
    "imports": check_imports,
    "accelerators": check_accelerators,
    "configuration": check_configuration,
    "GPU": check_gpu,
    "precision": check_precision,
    "quantization": check_quantization,
    "hub": check_hub,
    "model": check_model,
    "weights": check_weights,
    "tokenizer": check_tokenizer,
    "adapter": check_adapter,
    "training rows": check_training_rows,
    "golden rows": check_golden_rows,
    "GPU memory": check_gpu_memory,
    "host memory": check_host_memory,
    "disk": check_disk,
    "run directory": check_run_directory,
    "W&B": check_tracker,
}


def diagnose(cfg: DictConfig) -> list[Check]:
    """Run every check, in the order of CHECKS. Raises nothing.

    Args:
        cfg: the composed conf/doctor.yaml.
    """
    return _all_checks(DoctorPieces(cfg), CHECKS)


def plan_for_card(cfg: DictConfig, card: Card) -> tuple[list[Check], PlannedRun | None]:
    """Run every check of a run on a card that need not be here. Raises nothing.

    Args:
        cfg: the composed conf/doctor.yaml.
        card: the card.

    Returns:
        The checks, in the order of CHECKS, and what the run would take; None if a red check is in its way.
    """
    pieces = CardPieces(cfg, card)
    checks = _all_checks(pieces, CHECKS | card_checks())
    with contextlib.suppress(Exception):  # whatever it is, a check has shown it
        return checks, planned(pieces)
    return checks, None


def _all_checks(pieces: DoctorPieces, checks: dict[str, Callable[[DoctorPieces], Check]]) -> list[Check]:
    try:
        return [run_check(name, check, pieces) for name, check in checks.items()]
    finally:
        pieces.restore_network()


def run_check(name: str, check: Callable[[DoctorPieces], Check], pieces: DoctorPieces) -> Check:
    """Run one check; what it raises becomes its line."""
    try:
        return check(pieces)
    except SkippedError as missing:
        return Check(name, AMBER, "skipped", f"fix {missing} first")
    except (UserError, RunError) as error:
        found, _, remedy = str(error).rpartition(": ")  # these messages end with what to do
        return Check(name, RED, found or str(error), remedy if found else "")
    except Exception as error:  # a check that fails must not hide the others
        return Check(name, RED, one_line(error)[:300], "this check itself failed; training may fail in the same way")
