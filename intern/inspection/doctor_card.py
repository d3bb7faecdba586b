"""The doctor's checks of a run that is planned for a card that is not here; they take the place of those of this machine."""

from collections.abc import Callable
from typing import cast

from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.doctor_configuration import check_golden_rows, check_model, check_tokenizer, check_training_rows
from intern.inspection.doctor_memory_and_disk import TIGHT, amount, data_bytes, smaller
from intern.inspection.doctor_pieces import DoctorPieces
from intern.inspection.planned_run import CardPieces, PlannedRun
from intern.memory.estimate import datasets_cache, host_memory, run_directory
from intern.units import GIB

_THERE = "on the machine with the card"


def card_checks() -> dict[str, Callable[[DoctorPieces], Check]]:
    """Return the checks that differ from those of a run on this machine, by their names in intern.inspection.doctor.CHECKS."""
    checks: dict[str, Callable[[CardPieces], Check]] = {
        "accelerators": _accelerators,
        "GPU": _gpu,
        "precision": _precision,
        "quantization": _quantization,
        "model": _model,
        "weights": lambda pieces: Check("weights", GREEN, "not needed for a plan"),
        "tokenizer": _tokenizer,
        "training rows": _training_rows,
        "golden rows": _golden_rows,
        "GPU memory": _gpu_memory,
        "host memory": lambda pieces: Check(
            "host memory", GREEN, f"about {host_memory(False, None) / GIB:.1f} GiB needed {_THERE}"
        ),
        "disk": _disk,
        "run directory": lambda pieces: Check("run directory", GREEN, f"not looked at: it will be {_THERE}"),
        "W&B": lambda pieces: Check("W&B", GREEN, f"not looked at: python -m intern.doctor asks it {_THERE}"),
    }
    return cast(dict[str, Callable[[DoctorPieces], Check]], checks)  # what diagnose passes them is a CardPieces


def _accelerators(pieces: CardPieces) -> Check:
    if pieces.trainer.get("use_liger_kernel") is False:
        return Check("accelerators", GREEN, "Liger is switched off (trainer.use_liger_kernel=false)")
    both = "liger-kernel and nvidia-cudnn-frontend" if pieces.card.is_hopper else "liger-kernel"
    return Check("accelerators", GREEN, f"assumed {_THERE}: {both} (pip install '.[gpu]')")


def _gpu(pieces: CardPieces) -> Check:
    major, minor = pieces.card.capability
    return Check(
        "GPU",
        GREEN,
        f"planned: {pieces.card.name}, compute capability {major}.{minor}, {pieces.card.gib:.1f} GiB usable; this machine's is not looked at",
    )


def _precision(pieces: CardPieces) -> Check:
    _ = pieces.precision_rules
    plan = pieces.precision
    found = f"{pieces.card.name}: {plan.in_words}"
    if plan.fp16 and pieces.card.has_bf16:
        return Check(
            "precision",
            AMBER,
            f"{found}; this card has bfloat16",
            "trainer=ampere quant=nf4_bf16 needs no loss scaling",
        )
    return Check("precision", GREEN, found)


def _quantization(pieces: CardPieces) -> Check:
    quant = pieces.known("quant", "configuration")
    return Check(
        "quantization", GREEN, f"{quant.name}; not tried, which takes the card" if quant is not None else "none"
    )


def _model(pieces: CardPieces) -> Check:
    made = check_model(pieces)
    if reason := pieces.found_base[1]:
        found, _, remedy = reason.rpartition(": ")
        return Check("model", AMBER, f"{made.found}, as published; its config.json: {found or reason}", remedy)
    return made


def _tokenizer(pieces: CardPieces) -> Check:
    pieces.known("base", "model")
    if pieces.own_tokenizer is None:
        return Check(
            "tokenizer", AMBER, "not here: tokens are estimated from the length of the texts", "fix model first"
        )
    return check_tokenizer(pieces)


def _training_rows(pieces: CardPieces) -> Check:
    return _rows("training rows", pieces, check_training_rows, 0)


def _golden_rows(pieces: CardPieces) -> Check:
    data = pieces.known("data", "configuration")
    if data.eval_share or not data.eval_files:
        return check_golden_rows(pieces)
    return _rows("golden rows", pieces, check_golden_rows, 1)


def _rows(name: str, pieces: CardPieces, counted: Callable[[DoctorPieces], Check], which: int) -> Check:
    pieces.known("data", "configuration")
    pieces.known("base", "model")
    if pieces.own_tokenizer is not None:
        return counted(pieces)
    table = pieces.read_rows[which]
    assert table is not None
    return Check(
        name, GREEN, f"{table.name}: {len(table.rows):,} valid rows; only the tokenizer shows whether they fit"
    )


def _gpu_memory(pieces: CardPieces) -> Check:
    run = planned(pieces)
    plan = run.memory
    found = f"about {plan.peak / GIB:.1f} GiB of {pieces.card.gib:.1f}: {checkpointed(run)}"
    remedy = smaller(pieces.trainer.get("activation_checkpointing"))
    if not run.is_enough:
        return Check("GPU memory", RED, f"{found}: does not fit", f"{remedy}, or choose another card with gpu=")
    if (
        plan.checkpointed == plan.layers and plan.peak > TIGHT * plan.budget
    ):  # any other plan has something left to give up
        return Check("GPU memory", AMBER, f"{found}: tight", remedy)
    return Check("GPU memory", GREEN, found)


def planned(pieces: CardPieces) -> PlannedRun:
    """The planned run.

    Raises:
        SkippedError: something that it needs is bad, and has a red line of its own.
    """
    for name, check in [
        ("configured_args", "configuration"),
        ("precision", "precision"),
        ("base", "model"),
        ("adapted", "adapter"),
        ("planned_rows", "training rows"),
    ]:
        pieces.known(name, check)
    return pieces.planned


def checkpointed(run: PlannedRun) -> str:
    """Which layers are computed twice, and what else the plan gives up."""
    plan = run.memory
    parts = [f"{plan.checkpointed} of {plan.layers} layers checkpointed"]
    parts += ["their inputs in host memory"] if plan.offloaded else []
    parts += ["tiled MLPs"] if plan.tiled else []
    parts += [f"{plan.unpacked / GIB:.1f} GiB of weights dequantized"] if plan.unpacked else []
    return ", ".join(parts)


def _disk(pieces: CardPieces) -> Check:
    data = pieces.known("data", "configuration")
    trainable = pieces.known("adapted", "adapter").get_nb_trainable_parameters()[0]
    args = pieces.known("configured_args", "configuration")
    parts = [
        (datasets_cache(data_bytes(data)), "datasets cache"),
        (run_directory(trainable, pieces.state_bytes, args.save_total_limit), "run directory"),
    ]
    listed = ", ".join(f"{amount(size)} {name}" for size, name in parts)
    return Check("disk", GREEN, f"about {listed}, and the base's files, {_THERE}")
