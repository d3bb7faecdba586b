"""What a training run should be warned about, and what came of it: its result, what is doubtful about it, and what to do next."""

import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intern.display.text import visible
from intern.evaluation.bootstrap import FEW
from intern.runs.directory import Run
from intern.runs.names import called
from intern.training.plan import TrainingPlan
from intern.training.steps import steps_of_run
from intern.training.trainer import InternTrainer

log = logging.getLogger(__name__)

_MANY_EPOCHS = 10  # beyond this a model repeats its training rows instead of learning from them
_USUAL_EPOCHS = 3
_RISE = 0.01  # a loss that rises by a smaller fraction is noise
_LONGEST_QUESTION = 200  # characters of an example


def warn_before_training(trainer: InternTrainer, plan: TrainingPlan) -> None:
    """Warn, in one line each, of few rows repeated many times, of a warm-up without an end, and of golden rows that are trained on."""
    rows, args = len(plan.train.rows), plan.args
    packed: Any = trainer.train_dataset
    steps, per_epoch = steps_of_run(len(packed), args, plan.rules.min_steps)
    if steps / per_epoch > _MANY_EPOCHS:
        fewer = _USUAL_EPOCHS * per_epoch
        log.warning(
            "%d steps over %d training rows are %.0f epochs: the model will repeat the rows rather than learn from them; "
            "use more rows, or trainer.min_steps=%d trainer.max_steps=%d for %d epochs",
            steps, rows, steps / per_epoch, fewer, fewer, _USUAL_EPOCHS,
        )  # fmt: skip
    if args.learning_rate == 0:
        log.warning("trainer.learning_rate=0: the adapter stays as it is; 2e-4 is typical")
    if args.warmup_steps >= steps:
        log.warning(
            "trainer.warmup_steps=%g: training ends after %d steps, before the learning rate has its full value",
            args.warmup_steps,
            steps,
        )
    if plan.data.golden is None or plan.data.data.eval_share:
        return
    shared = {file.sha256 for file in plan.data.golden.files} & {file.sha256 for file in plan.data.train.files}
    if shared:
        log.warning(
            "data.eval_file is also trained on (%s): the golden loss will show what the model repeats, not what it has learned; "
            "data.eval_file=null data.eval_share=0.1 holds rows out",
            ", ".join(sorted({file.path.name for file in plan.data.golden.files if file.sha256 in shared})),
        )  # fmt: skip


def warn_after_training(metrics: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Warn, in one line each, of a golden loss that rose while training went on, and of one that is higher than the base's.

    Args:
        metrics: those of metrics.json.
        history: the run's log entries.
    """
    measured = [(entry["eval_loss"], entry["step"]) for entry in history if isinstance(entry.get("eval_loss"), float)]
    if len(measured) > 1 and metrics["best_step"] is None:
        best, step = min(measured)
        last, end = measured[-1]
        if last > best * (1 + _RISE):
            log.warning(
                "the golden loss rose since step %d: %.3f there, %.3f at step %d; trainer.load_best_model_at_end=true keeps the best adapter, "
                "or train for trainer.max_steps=%d",
                step, best, last, end, step,
            )  # fmt: skip
    after, before = metrics.get("eval_loss"), metrics.get("base_eval_loss")
    if after is not None and before is not None and after > before:
        log.warning(
            "the golden loss is higher than the base's: the adapter answers these rows worse than the model without it; "
            "try a lower trainer.learning_rate, fewer steps, or rows that are more like the golden ones"
        )


def result_lines(metrics: dict[str, Any], golden_name: str | None) -> Iterator[str]:
    """Yield what came of a run, in two lines.

    Args:
        metrics: those of metrics.json.
        golden_name: of the golden file; None without one.
    """
    loss, base = metrics.get("eval_loss"), metrics.get("base_eval_loss")
    if loss is None:
        yield (
            f"training loss {metrics['train_loss']:.3f}; what was learned is not measured without golden rows: "
            "data.eval_file=FILE, or data.eval_share=0.1 to hold some out"
        )
    else:
        low, high = metrics.get("eval_loss_low"), metrics.get("eval_loss_high")
        bounds = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        against = f"; the base's is {base:.3f} ({loss / base - 1:+.0%})" if base else ""
        few = f", fewer than {FEW} and too few to rely on" if metrics["eval_rows"] < FEW else ""
        rows = f"{golden_name}" if str(golden_name).startswith("held-out") else f"rows of {golden_name}"
        yield f"golden loss {loss:.3f}{bounds} on {metrics['eval_rows']:,} {rows}{few}{against}"
    memory = (
        f"at most {metrics['peak_gpu_gib']:.1f} GiB of GPU memory"
        if "peak_gpu_gib" in metrics
        else f"at most {metrics['peak_host_rss_gib']:.1f} GiB of memory"
    )
    skipped = f", {metrics['skipped_steps']} more skipped by fp16" if metrics["skipped_steps"] else ""
    yield (
        f"{metrics['optimizer_steps']:,} steps ({metrics['epochs']:.2g} epochs{skipped}), {metrics['train_tokens']:,} tokens in "
        f"{metrics['train_seconds']:,.0f} s ({metrics['tokens_per_second']:,.0f} tokens/s), {memory}"
    )


def next_commands(run: Run, question: str, needs_context: bool) -> list[str]:
    """Return commands for a shell: ask the run, score its answers, compare it with others.

    Args:
        run: a finished run.
        question: an example.
        needs_context: whether it can only be asked with a text.
    """
    here = Path.cwd()
    path = str(run.path.relative_to(here)) if run.path.is_relative_to(here) and run.path != here else str(run.path)
    name = shlex.quote(f"run_dir={path}")
    is_short = len(question) <= _LONGEST_QUESTION and visible(question) == question
    asked = _shell_word("question", question if is_short else "...")
    context = " context='...'" if needs_context else ""
    runs = "" if path.startswith(("outputs/", "multirun/")) else f" {shlex.quote(f'runs={Path(path).parent}')}"
    return [
        f"python -m intern.query {name} {asked}{context}",
        f"python -m intern.evaluate {name}",
        f"python -m intern.compare{runs}",
    ]


def _shell_word(key: str, text: str) -> str:
    """Return `key=text` for a shell: in double quotes, which are easier to read, if nothing in it means anything there."""
    return shlex.quote(f"{key}={text}") if set(text) & set('"$`\\\\!') else f'{key}="{text}"'


def tell_outcome(run: Run, plan: TrainingPlan, metrics: dict[str, Any], is_job: bool) -> None:
    """Log the result of a run that has just finished, its warnings, and the next commands.

    Args:
        run: the run.
        plan: what it trained.
        metrics: those of metrics.json.
        is_job: whether it is a job of a sweep, whose end has commands of its own.
    """
    golden = plan.data.golden
    log.info("saved %s", called(run))
    for line in result_lines(metrics, golden.name if golden is not None else None):
        log.info("%s", line)
    warn_after_training(metrics, run.read_history())
    if not is_job:
        rows = golden.rows if golden is not None else plan.data.train.rows
        for command in next_commands(run, str(rows[0]["question"]), plan.prompt.context == "always"):
            log.info("next: %s", command)
