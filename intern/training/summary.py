"""Trained steps -> the part of metrics.json that is about training, and a last line in history.jsonl if it stopped early."""

import logging
from typing import Any

from intern.runs.directory import SCHEMA_VERSION, Run
from intern.training.callbacks import Callbacks
from intern.training.plan import TrainingPlan
from intern.training.trainer import InternTrainer

log = logging.getLogger(__name__)


def summarize(trainer: InternTrainer, callbacks: Callbacks, plan: TrainingPlan) -> dict[str, Any]:
    """Return the metrics of training.

    Args:
        trainer: after training.
        callbacks: its callbacks.
        plan: what it trained.
    """
    steps, memory = callbacks.steps, callbacks.memory
    # Of the state, which checkpoints store, and not of history.jsonl: a file may have been changed before a resume.
    losses = [entry["loss"] for entry in trainer.state.log_history if isinstance(entry.get("loss"), float)]
    tokens = trainer.state.num_input_tokens_seen
    best_step = _best_step(trainer)
    return {
        "schema_version": SCHEMA_VERSION,
        "optimizer_steps": steps.taken,
        "skipped_steps": steps.skipped,
        "best_step": best_step,
        "best_metric": trainer.state.best_metric if best_step is not None else None,
        "train_loss": sum(losses) / len(losses) if losses else callbacks.window.mean_loss,
        "train_seconds": round(steps.seconds, 1),
        "train_tokens": tokens,
        "epochs": round(float(trainer.state.epoch or 0), 3),
        "tokens_per_second": round(tokens / steps.seconds, 1),
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "checkpointed_layers": memory.plan.checkpointed if memory is not None and memory.plan is not None else None,
        "train_rows": len(plan.train.rows),
        "dropped_rows": len(plan.train.dropped),
        "shortened_rows": plan.train.shortened,
    }


def note_early_stop(trainer: InternTrainer, callbacks: Callbacks, run: Run) -> None:
    """Append a line to history.jsonl if training stopped early."""
    if callbacks.early_stopping is None or not callbacks.early_stopping.stopped:
        return
    state, metric = trainer.state, trainer.args.metric_for_best_model
    log.info("stopped early at step %d: %s was best at step %s", state.global_step, metric, state.best_global_step)
    entry = {
        "step": state.global_step,
        "optimizer_steps": callbacks.steps.taken,
        "skipped_steps": callbacks.steps.skipped,
        "stopped_early": True,
        "best_step": state.best_global_step,
        "best_metric": state.best_metric,
    }
    run.append_history(entry)


def _best_step(trainer: InternTrainer) -> int | None:
    """Return the step whose weights the adapter has if the best checkpoint was loaded at the end; None: the last step's."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return int(best.rsplit("-", 1)[1]) if best else None
