"""A configuration and an empty run directory -> a finished run: the story of a training run, cheap checks first.

A little over 300 lines: what process 0 does and what the others do at the same time must be read together.
"""

import contextlib
import functools
import gc
import logging
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from intern import processes
from intern.config.build import literal_text
from intern.config.secrets import from_environment, storable
from intern.display.progress import progress_bars
from intern.errors import UserError
from intern.runs.checkpoints import Checkpoint, list_checkpoints
from intern.runs.directory import Run
from intern.runs.environment import describe, peak_memory
from intern.runs.failures import explain_disk_errors
from intern.runs.files import remove_file, rename
from intern.runs.lock import lock
from intern.runs.names import given_name
from intern.training.callbacks import build_callbacks
from intern.training.golden_answers import answer_golden_questions, score_answers
from intern.training.golden_loss import score_golden_rows, with_golden_loss
from intern.training.history import history_at
from intern.training.launch import check_processes
from intern.training.outcome import tell_outcome, warn_before_training
from intern.training.plan import TrainingPlan, build_plan
from intern.training.resume import (
    check_same,
    choose_checkpoint,
    extends_training,
    set_aside,
    step_of,
    warn_if_environment_changed,
)
from intern.training.summary import note_early_stop, summarize
from intern.training.trackers import TrackedRun, Trackers, track
from intern.training.trainer import InternTrainer
from intern.upstream import route_messages

log = logging.getLogger(__name__)


def finetune(cfg: DictConfig, run: Run, sweep: str | None = None, begin: Callable[[], None] = lambda: None) -> float:
    """Train an adapter and write the run directory; resume from the last checkpoint if `run` has one.

    A finished job of a sweep is not trained again. Several processes call it together; process 0 writes the run directory.

    Args:
        cfg: the composed conf/train.yaml.
        run: where everything is written.
        sweep: name of the sweep that this run belongs to; None for a single run.
        begin: called once nothing can be refused any more, before the first file is written (a tracker's own files apart).

    Returns:
        The score that a sweep minimizes, in nats per token: the loss on the golden answers, or on the training rows if there is no eval_file.

    Raises:
        UserError: bad input, found before training starts.
        RunError: training cannot continue.
        SystemExit: interrupted by Ctrl-C or SIGTERM, after a checkpoint was saved (exit code 128 + signal).
    """
    route_messages()
    _forget_previous_job()
    check_processes(cfg)
    processes.join(bool(cfg.trainer.get("use_cpu")), int(cfg.trainer.get("ddp_timeout", 1800)))
    try:
        score = _finetune(cfg, run, sweep, begin)
    except SystemExit:  # interrupted, and so are the others
        processes.leave()
        raise
    except RuntimeError as error:
        if (lost := processes.lost_process(error)) is not None:
            raise lost from error
        raise
    processes.leave()
    return score


def _finetune(cfg: DictConfig, run: Run, sweep: str | None, begin: Callable[[], None]) -> float:
    with processes.main_first():  # the others find tokenized rows in the cache
        plan = build_plan(cfg, run)
    cfg = _with_absolute_paths(cfg, plan)
    if run.finished and sweep is not None and not extends_training(cfg, run):
        check_same(cfg, run, {str(file.path): file.sha256 for file in plan.files})
        log.info("%s is finished, score %.4f: not run again", run.path, run.score())
        return run.score()
    log.info("%s", plan.data.found)
    log.info("%s", plan.precision)
    if not processes.is_main():
        return _train_along(cfg, run, plan, begin)
    _check_start(run, cfg, plan)
    with lock(run), explain_disk_errors(run), contextlib.ExitStack() as stack:
        _check_start(run, cfg, plan)  # again: another process may have trained in it meanwhile
        checkpoint, unusable = choose_checkpoint(run, bool(plan.args.load_best_model_at_end))
        if run.finished and checkpoint is None:
            raise UserError(f"{run.path} holds a finished run without checkpoints: it cannot be trained longer")
        history = history_at(run, checkpoint)
        base = plan.base.load(plan.quant, plan.precision, plan.args.max_length)
        environment = _environment(run, cfg, plan, sweep, checkpoint)
        run_id, sweep = environment["run_id"], environment["sweep"]
        tracked = TrackedRun(run, storable(cfg), run_id, sweep, step=step_of(checkpoint))
        trackers = stack.enter_context(track(plan.logger, tracked))
        begin()  # from here on nothing is refused any more
        _write_start(run, cfg, plan, environment, history, unusable)
        common = _Common(checkpoint, trackers.sample_answers)
        processes.share(lambda: common)
        model, metrics = _train(base, run, plan, trackers, checkpoint)
        with run.new_adapter() as folder:
            model.save_pretrained(str(folder))
            plan.tokenizer.save_pretrained(str(folder))
        metrics |= score_golden_rows(model, plan)
        trackers.report(metrics, _sample_answers(model, plan, trackers.sample_answers))
        from intern.display.plot import plot_loss  # matplotlib takes 0.3 s to import: not before the first step

        with run.new_file(run.loss_plot) as file:
            title = given_name(run) or "/".join(run.path.parts[-2:])
            plot_loss(
                with_golden_loss(run.read_history(), metrics),
                file,
                metrics["best_step"],
                metrics.get("base_eval_loss"),
                title,
            )
        metrics |= _highest(processes.gather(peak_memory()))
        run.write_json(run.metrics, metrics)
    tell_outcome(run, plan, metrics, is_job=sweep is not None)
    return run.score()


@dataclass(frozen=True)
class _Common:
    """What process 0 decides for all processes.

    Args:
        checkpoint: from which training resumes.
        sample_answers: how many golden questions are answered for the trackers.
    """

    checkpoint: Path | None
    sample_answers: int


def _train_along(cfg: DictConfig, run: Run, plan: TrainingPlan, begin: Callable[[], None]) -> float:
    """Do what process 0 does at the same time, without writing: every computation that needs all processes, in the same order."""
    base = plan.base.load(plan.quant, plan.precision, plan.args.max_length)
    common: _Common = processes.share(lambda: _Common(None, 0))
    begin()
    model, metrics = _train(base, run, plan, Trackers([]), common.checkpoint)
    metrics |= score_golden_rows(model, plan)
    _sample_answers(model, plan, common.sample_answers)
    processes.gather(peak_memory())
    return float(metrics.get("eval_loss", metrics["train_loss"]))


def _highest(peaks: list[dict[str, float]]) -> dict[str, float]:
    """Return the highest peak of memory of any process."""
    return {name: max(one[name] for one in peaks) for name in peaks[0]}


def _forget_previous_job() -> None:
    """Free what the previous job of a sweep left in this process: neither its memory nor its peak are this run's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _check_start(run: Run, cfg: DictConfig, plan: TrainingPlan) -> None:
    """Check that this run may be started, or resumed, in this folder.

    Raises:
        UserError: a finished run, or one that was started with another configuration or other data.
    """
    if run.finished and not extends_training(cfg, run):
        raise UserError(
            f"{run.path} holds a finished run: choose another hydra.run.dir, or raise trainer.max_steps to train it longer"
        )
    if list_checkpoints(run.checkpoints, run.path):
        check_same(cfg, run, {str(file.path): file.sha256 for file in plan.files})


def _environment(
    run: Run, cfg: DictConfig, plan: TrainingPlan, sweep: str | None, checkpoint: Path | None
) -> dict[str, Any]:
    """Return what environment.json will hold. A run that resumes keeps its id and its sweep."""
    environment = {"run_id": uuid.uuid4().hex[:12], "sweep": sweep, "run_dir": str(run.path)} | describe(plan.files)
    environment["from_environment"] = sorted(from_environment(cfg))
    environment["processes"] = processes.place().size
    if checkpoint is not None:
        before = run.read_json(run.environment)
        warn_if_environment_changed(before, environment)
        environment |= {name: before.get(name) for name in ("run_id", "sweep")}
        if before.get("gpu") != environment["gpu"]:
            run.memory.unlink(missing_ok=True)  # measured on another GPU
    return environment


def _write_start(
    run: Run,
    cfg: DictConfig,
    plan: TrainingPlan,
    environment: dict[str, Any],
    history: list[dict[str, Any]],
    unusable: Sequence[Checkpoint],
) -> None:
    """Write what is known at the start. The metrics of a finished run are lost only once all of it is written."""
    run.remove_partial_files()
    set_aside(unusable, run)
    with _unfinished(run):
        run.write_history(history)
        run.write_json(run.prompt, plan.prompt.to_json())
        run.write_json(run.environment, environment)
        run.write_config(cfg)


@contextlib.contextmanager
def _unfinished(run: Run) -> Iterator[None]:
    """Take away what marks a run as finished; give it back if what the block writes cannot be written, as on a full disk."""
    before = run.metrics.with_name(f".{run.metrics.name}.before")  # a partial file if the process is killed meanwhile
    had_metrics = run.metrics.is_file()
    if had_metrics:
        rename(run.metrics, run.path, before.name)
    try:
        yield
    except BaseException:
        if had_metrics:
            rename(before, run.path, run.metrics.name)
        raise
    remove_file(before, run.path)


def _train(
    model: PreTrainedModel, run: Run, plan: TrainingPlan, trackers: Trackers, checkpoint: Path | None
) -> tuple[Any, dict[str, Any]]:
    """Train, from a checkpoint if there is one; return the model with its adapter, and the metrics of training."""
    with progress_bars(len(plan.train.rows)):  # of packing
        trainer = InternTrainer(
            rules=plan.rules,
            answer_scores=functools.partial(score_answers, plan=plan) if plan.rules.eval_answers else None,
            model=model,
            args=plan.args,
            train_dataset=plan.train.rows,
            eval_dataset=plan.eval.rows if plan.eval is not None else None,
            processing_class=plan.tokenizer,
            peft_config=plan.lora,
        )
    callbacks = build_callbacks(trainer, plan.rules, run, trackers.log, plan.build_memory)
    log.info(
        "%d training rows, %s trainable parameters", len(plan.train.rows), f"{trainer.get_num_trainable_parameters():,}"
    )
    warn_before_training(trainer, plan)
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        callbacks.close()
    if (signal := callbacks.interruption.signal) is not None:
        log.warning(
            "interrupted after step %d; to resume: python -m intern.train %s",
            trainer.state.global_step,
            shlex.quote(f"resume={run.path}"),
        )
        sys.exit(128 + signal)
    if processes.is_main():
        note_early_stop(trainer, callbacks, run)
    return trainer.model, summarize(trainer, callbacks, plan)


def _sample_answers(model: Any, plan: TrainingPlan, count: int) -> list[dict[str, str]]:
    """Return golden questions with the reference and the model's answer, for the trackers."""
    if plan.eval_rows is None or not count:
        return []
    log.info("answering %d golden questions", min(count, len(plan.eval_rows)))
    return answer_golden_questions(model, plan, count, batch_size=count)


def _with_absolute_paths(cfg: DictConfig, plan: TrainingPlan) -> DictConfig:
    """Return the configuration as the run directory stores it: it means the same from every working directory."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("resume", None)
    cfg.model.pretrained_model_name_or_path = literal_text(plan.base.name)
    cfg.data.pop("sample", None)
    cfg.num_processes = processes.place().size
    for key, value in plan.data.values.items():
        cfg.data[key] = (
            [literal_text(one) for one in value] if isinstance(value, list) else value and literal_text(value)
        )
    return cfg
