"""A configuration and an empty run directory -> a finished run: the whole story of a training run, cheap checks first."""

import functools
import gc
import logging
import math
import sys
import uuid
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import (
    PreTrainedModel,
    PrinterCallback,
)

from intern.display.progress import progress_bars
from intern.errors import RunError, UserError
from intern.evaluation.metrics import token_f1
from intern.inference.generate import build_generation, generate
from intern.inference.losses import answer_losses
from intern.runs.directory import SCHEMA_VERSION, Run
from intern.runs.environment import describe, peak_memory
from intern.training.health import Health
from intern.training.plan import TrainingPlan, build_plan
from intern.training.resume import Carried, check_same, goes_on_longer, tell_changes
from intern.training.trackers import Tracker, tracking
from intern.training.trainer import (
    History,
    InternTrainer,
    Interruption,
    OptimizerSteps,
    Patience,
)
from intern.upstream import route_messages

log = logging.getLogger(__name__)

_SAMPLE_TOKENS = 128  # the longest sample answer


def finetune(cfg: DictConfig, run: Run, sweep: str | None = None) -> float:
    """Trains an adapter as `cfg` says and fills `run`; a run directory that an interruption left with checkpoints is gone on with.

    A job of a sweep whose run directory is finished already is not run again.

    Args:
        cfg: the composed conf/train.yaml.
        run: where everything is written.
        sweep: the name of the sweep that this run belongs to, None for a single run.

    Returns:
        What a sweep minimizes: the loss on the golden answers, or on the training rows without an eval_file (nats a token).

    Raises:
        UserError: bad input, found before training starts.
        RunError: training cannot go on.
        SystemExit: interrupted by Ctrl-C or SIGTERM, after a checkpoint was saved (exit code 128 + signal).
    """
    route_messages()
    _forget_the_job_before()
    plan = build_plan(cfg, run)
    cfg = _with_absolute_paths(cfg, plan)
    if run.finished and sweep is not None and not goes_on_longer(cfg, run):
        check_same(cfg, run, {str(file.path): file.sha256 for file in plan.files})
        log.info("%s is finished, score %.4f: not run again", run.path, run.score())
        return run.score()
    log.info("%s", plan.precision)
    with run.lock(), run.told_when_full(), tracking(plan.logger, cfg, run, *_open(run, cfg, plan, sweep)) as tracker:
        model, metrics = _train(plan.base.load(plan.quant, plan.precision), run, plan, tracker)
        with run.new_adapter() as folder:
            model.save_pretrained(str(folder))
            plan.tokenizer.save_pretrained(str(folder))
        metrics |= _evaluate(model, plan)
        tracker.report(run, metrics, _sample_answers(model, plan, tracker.sample_answers))
        from intern.display.plot import (
            plot_loss,  # matplotlib takes a third of a second that the first step need not wait for
        )

        plot_loss(run.read_history(), run.loss_plot, metrics["best_step"])
        run.write_json(run.metrics, metrics | peak_memory())
    log.info("saved %s", run.path)
    return run.score()


def _forget_the_job_before() -> None:
    """A sweep's jobs share one process: what the last one left behind is neither this one's memory nor its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _open(run: Run, cfg: DictConfig, plan: TrainingPlan, sweep: str | None) -> tuple[str, str | None]:
    """Writes what is known at the start; returns the run's id and its sweep's name, the old ones where the run goes on.

    Raises:
        UserError: a finished run, or one that was begun with another configuration or other data.
    """
    if run.finished and not goes_on_longer(cfg, run):
        raise UserError(
            f"{run.path} holds a finished run: take another hydra.run.dir, or a higher trainer.max_steps to go on"
        )
    if run.finished and run.last_checkpoint() is None:
        raise UserError(f"{run.path} holds a finished run whose checkpoints are gone: it cannot go on")
    environment = {"run_id": uuid.uuid4().hex[:12], "sweep": sweep, "run_dir": str(run.path)} | describe(plan.files)
    if run.last_checkpoint() is not None:
        check_same(cfg, run, environment["data"])
        before = run.read_json(run.environment)
        tell_changes(before, environment)
        environment |= {name: before.get(name) for name in ("run_id", "sweep")}
        if before.get("gpu") != environment["gpu"]:
            run.memory.unlink(missing_ok=True)  # measured on another card
    run.metrics.unlink(missing_ok=True)  # from here on the run is unfinished again
    run.drop_drafts()
    run.write_config(cfg)
    run.write_json(run.prompt, plan.prompt.to_json())
    run.write_json(run.environment, environment)
    return environment["run_id"], environment["sweep"]


def _train(model: PreTrainedModel, run: Run, plan: TrainingPlan, tracker: Tracker) -> tuple[Any, dict[str, Any]]:
    """Trains, from the last checkpoint where there is one; returns the model with its adapter, and the figures of training."""
    steps = OptimizerSteps(plan.rules.min_steps, plan.rules.max_skipped_steps)
    interruption = Interruption()
    history = History(run, steps, tracker.log)
    memory = plan.memory
    carried = Carried()
    patience = None
    if plan.rules.early_stopping_patience is not None:
        patience = Patience(plan.rules.early_stopping_patience, steps)
    with progress_bars(len(plan.train.rows)):  # of packing
        trainer = InternTrainer(
            rules=plan.rules,
            answers_f1=functools.partial(_answers_f1, plan=plan) if plan.rules.eval_answers else None,
            model=model,
            args=plan.args,
            train_dataset=plan.train.rows,
            eval_dataset=plan.eval.rows if plan.eval is not None else None,
            processing_class=plan.tokenizer,
            peft_config=plan.lora,
            # A skipped step takes back the stop at max_steps, so `steps` follows what stops early and precedes what must stop.
            callbacks=[
                *([memory] if memory else []),
                *([patience] if patience else []),
                steps,
                carried,
                interruption,
                history,
                Health(run, steps),
            ],
        )
    trainer.remove_callback(PrinterCallback)
    carried.trainer = trainer
    if memory is not None:
        memory.trainer = trainer
    checkpoint = run.last_checkpoint()
    log.info(
        "%d training rows, %s trainable parameters", len(plan.train.rows), f"{trainer.get_num_trainable_parameters():,}"
    )
    run.drop_history_after(0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1]))
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        history.close()
        interruption.restore()
    if interruption.signal is not None:
        log.warning(
            "interrupted after step %d: python -m intern.train resume=%s goes on from there",
            trainer.state.global_step,
            run.path,
        )
        sys.exit(128 + interruption.signal)
    if patience is not None and patience.stopped:
        _note_early_stop(run, trainer, steps)
    losses = [entry["loss"] for entry in run.read_history() if isinstance(entry.get("loss"), float)]
    tokens = trainer.state.num_input_tokens_seen
    return trainer.model, {
        "schema_version": SCHEMA_VERSION,
        "optimizer_steps": steps.taken,
        "skipped_steps": steps.skipped,
        "best_step": _best_step(trainer),
        "best_metric": trainer.state.best_metric if _best_step(trainer) is not None else None,
        "train_loss": sum(losses) / len(losses) if losses else result.training_loss,
        "train_seconds": round(steps.seconds, 1),
        "train_tokens": tokens,
        "tokens_per_second": round(tokens / steps.seconds, 1),
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "checkpointed_layers": memory.plan.checkpointed if memory is not None and memory.plan is not None else None,
        "train_rows": len(plan.train.rows),
        "dropped_rows": len(plan.train.dropped),
        "shortened_rows": plan.train.shortened,
    }


def _note_early_stop(run: Run, trainer: InternTrainer, steps: OptimizerSteps) -> None:
    """A last line in history.jsonl, once: a run that was killed after it has it already."""
    state, metric = trainer.state, trainer.args.metric_for_best_model
    log.info("stopped early at step %d: %s is best at step %s", state.global_step, metric, state.best_global_step)
    entry = {
        "step": state.global_step,
        "optimizer_steps": steps.taken,
        "skipped_steps": steps.skipped,
        "stopped_early": True,
        "best_step": state.best_global_step,
        "best_metric": state.best_metric,
    }
    if not any("stopped_early" in line for line in run.read_history()):
        run.append_history(entry)


def _best_step(trainer: InternTrainer) -> int | None:
    """The step whose weights the adapter has, where the best checkpoint was asked for; None for the last."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return int(best.rsplit("-", 1)[1]) if best else None


def _evaluate(model: Any, plan: TrainingPlan) -> dict[str, Any]:
    """The loss on the golden answers, each token counting the same."""
    if plan.eval is None:
        return {}
    log.info("scoring %d golden rows", len(plan.eval.rows))
    losses = answer_losses(
        model, plan.eval.rows.to_list(), plan.tokenizer.pad_token_id, plan.args.per_device_eval_batch_size
    )
    total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    if not math.isfinite(total):
        raise RunError(
            f"the loss on the golden answers is {total}: lower trainer.learning_rate; the adapter is saved all the same"
        )
    return {"eval_loss": total / tokens, "eval_rows": len(losses), "eval_tokens": tokens}


def _sample_answers(model: Any, plan: TrainingPlan, count: int) -> list[dict[str, str]]:
    """Some golden questions with the reference and the model's answer, for the tracker."""
    if plan.eval_rows is None or not count:
        return []
    log.info("answering %d golden questions", min(count, len(plan.eval_rows)))
    return _answered(model, plan, count, batch_size=count)


def _answers_f1(model: Any, plan: TrainingPlan) -> float:
    """The mean token F1 of the answers to trainer.eval_answers golden questions."""
    answered = _answered(model, plan, plan.rules.eval_answers, plan.args.per_device_eval_batch_size)
    return sum(token_f1(row["answer"], row["reference"]) for row in answered) / len(answered)


def _answered(model: Any, plan: TrainingPlan, count: int, batch_size: int) -> list[dict[str, str]]:
    """Some golden questions, evenly spread over the file, with the reference and the model's answer."""
    assert plan.eval_rows is not None
    chosen = plan.eval_rows.select(range(0, len(plan.eval_rows), max(1, len(plan.eval_rows) // count))).select(
        range(min(count, len(plan.eval_rows)))
    )
    questions = list(chosen["question"])
    materials = list(chosen["chunk_text"]) if plan.prompt.scores_with_material else None
    generation = build_generation({"max_new_tokens": _SAMPLE_TOKENS, "do_sample": False}, plan.prompt, plan.tokenizer)
    answers = generate(model, plan.tokenizer, plan.prompt, generation, questions, materials, batch_size)
    return [
        {"question": question, "reference": reference, "answer": answer}
        for question, reference, (answer, _) in zip(questions, chosen["answer"], answers, strict=True)
    ]


def _with_absolute_paths(cfg: DictConfig, plan: TrainingPlan) -> DictConfig:
    """The configuration as the run directory keeps it: it must mean the same from every working directory."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("resume", None)
    cfg.model.pretrained_model_name_or_path = plan.base.name
    cfg.data.train_file = str(plan.train_file.path)
    if plan.eval_file is not None:
        cfg.data.eval_file = str(plan.eval_file.path)
    return cfg
