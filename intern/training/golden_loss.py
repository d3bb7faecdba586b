"""A trained model and the golden rows -> its loss on their answers with an interval, next to the base's, which is scored once and stored."""

import contextlib
import hashlib
import json
import logging
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intern import processes
from intern.errors import RunError
from intern.evaluation.bootstrap import paired_bootstrap
from intern.inference.losses import answer_losses
from intern.model.quantized_cache import identity
from intern.training.plan import TrainingPlan

log = logging.getLogger(__name__)

Losses = list[tuple[float, int]]  # of each row: nats, summed over its answer's tokens, and how many these are
_STORED = Path("~/.cache/intern/base_losses")
_MOST_STORED = 200  # bases with a golden file each; the ones that were not used for the longest time are removed
_RESAMPLES = 1000


def score_golden_rows(model: Any, plan: TrainingPlan) -> dict[str, Any]:
    """Return the loss on the golden answers, in nats per token (every token counts the same), its 95 % interval, and the base's loss.

    Several processes share the rows.

    Args:
        model: the base with its adapter.
        plan: of its training.

    Returns:
        Part of metrics.json: `eval_loss` with `eval_loss_low` and `eval_loss_high`, `base_eval_loss`, `eval_rows`, `eval_tokens`; nothing
        if the plan has no golden rows. The bounds are None if there is too little to resample.

    Raises:
        RunError: the adapter's loss is NaN or infinite.
    """
    if plan.eval is None:
        return {}
    log.info("scoring %d golden rows", len(plan.eval.rows))
    losses = _score(model, plan)
    if not math.isfinite(sum(loss for loss, _ in losses)):
        raise RunError(
            f"the loss on the golden answers is {sum(loss for loss, _ in losses)}: lower trainer.learning_rate; the adapter was saved"
        )
    before = _base_losses(model, plan)
    score = paired_bootstrap(_columns(before), _columns(losses), _clusters(plan), plan.args.seed, _RESAMPLES)
    return {
        "eval_loss": sum(loss for loss, _ in losses) / sum(count for _, count in losses),
        "eval_loss_low": score.after.low,
        "eval_loss_high": score.after.high,
        "base_eval_loss": score.before.value,
        "eval_rows": len(losses),
        "eval_tokens": sum(count for _, count in losses),
    }


def _score(model: Any, plan: TrainingPlan) -> Losses:
    assert plan.eval is not None
    rows, size = plan.eval.rows.to_list(), plan.args.per_device_eval_batch_size
    here = processes.place()
    mine = [number for number in range(len(rows)) if number // size % here.size == here.rank]  # whole batches
    losses = answer_losses(model, [rows[number] for number in mine], plan.tokenizer.pad_token_id, size)
    found = {number: loss for part in processes.gather(list(zip(mine, losses, strict=True))) for number, loss in part}
    return [found[number] for number in range(len(rows))]


def _base_losses(model: Any, plan: TrainingPlan) -> Losses:
    """Return the base's losses: those of an earlier run with the same base and the same golden rows, or measured without the adapter."""
    file = _stored_file(plan)
    stored = processes.share(lambda: _read(file, plan) if file is not None else None)
    if stored is not None:
        return stored
    log.info("scoring them with the base too, to compare with")
    with model.disable_adapter():
        losses = _score(model, plan)
    if file is not None and processes.is_main():
        _store(file, losses)
    return losses


def _stored_file(plan: TrainingPlan) -> Path | None:
    """Return the file whose name is a hash of all that decides the base's losses; None if nothing identifies the base's weights."""
    weights = identity(plan.base.name, plan.base.config)
    if weights is None:
        return None
    assert plan.eval is not None
    made_of = [
        weights,
        plan.quant.config.to_dict() if plan.quant is not None else None,
        [plan.precision.device, str(plan.precision.dtype), plan.precision.fp16, plan.precision.bf16],
        torch.cuda.get_device_name() if plan.precision.device == "cuda" else "cpu",
        [version(library) for library in ("torch", "transformers", "bitsandbytes")],
        str(plan.base.config._attn_implementation),
        plan.args.per_device_eval_batch_size,
        [[row["input_ids"], row["labels"]] for row in plan.eval.rows],
    ]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return _STORED.expanduser() / f"{key}.json"


def _read(file: Path, plan: TrainingPlan) -> Losses | None:
    assert plan.eval is not None
    try:
        losses = [(float(loss), int(count)) for loss, count in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
    if len(losses) != len(plan.eval.rows):
        return None
    with contextlib.suppress(OSError):
        os.utime(file)
    return losses


def _store(file: Path, losses: Losses) -> None:
    """Write a file, complete or not at all; a disk without room for it stops nothing."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        others = sorted(file.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
        for other in others[: max(0, len(others) - _MOST_STORED + 1)]:
            other.unlink()
        draft = file.with_suffix(f".{os.getpid()}")
        try:
            draft.write_text(json.dumps(losses), encoding="utf-8")
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


def _columns(losses: Losses) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses and the tokens of all rows, each of shape (rows,)."""
    return np.array([loss for loss, _ in losses], dtype=float), np.array([count for _, count in losses], dtype=float)


def _clusters(plan: TrainingPlan) -> list[Any]:
    """Return what each scored row belongs to: its context, or itself without one, since questions on one text are not independent."""
    assert plan.eval is not None and plan.eval_rows is not None
    contexts = dict(zip(plan.eval_rows["row"], plan.eval_rows["chunk_text"], strict=True))
    return [contexts.get(row) or row for row in plan.eval.origins["row"]]


def with_golden_loss(history: list[dict[str, Any]], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return log lines with the golden loss of the last step's weights, if that step was not evaluated.

    Args:
        history: the lines of history.jsonl.
        metrics: those of metrics.json.
    """
    last = metrics["optimizer_steps"]
    is_there = any(entry.get("optimizer_steps") == last and "eval_loss" in entry for entry in history)
    if metrics["best_step"] is not None or "eval_loss" not in metrics or is_there:
        return history
    return [*history, {"step": last, "optimizer_steps": last, "eval_loss": metrics["eval_loss"]}]
