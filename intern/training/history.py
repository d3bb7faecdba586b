"""Log entries of training: a line each in history.jsonl, the same to the trackers, and the progress display."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from intern.runs.directory import Run
from intern.training.steps import OptimizerSteps

log = logging.getLogger(__name__)

# Parts of the libraries' log entries that metrics.json has for the whole run.
_LEFT_OUT = {"total_flos", "train_runtime"} | {f"train_{unit}_per_second" for unit in ("tokens", "samples", "steps")}
_SHOWN = {"loss": ".3f", "eval_loss": ".3f", "eval_f1": ".3f", "tokens_per_second": ",.0f", "loss_scale": ".0f"}


class History(TrainerCallback):
    """Writes every log entry to history.jsonl, reports it, and shows progress: a bar in a terminal, a line of text elsewhere.

    Args:
        run: whose history.jsonl is written.
        steps: counts optimizer steps.
        report: called with each entry, for the trackers.
    """

    def __init__(self, run: Run, steps: OptimizerSteps, report: Callable[[dict[str, Any]], None]) -> None:
        self.run = run
        self.steps = steps
        self.report = report
        self._tokens = 0  # tokens and time at the last log entry
        self._since = 0.0
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = self._start = time.monotonic()
        self._first = state.global_step
        self._tokens = state.num_input_tokens_seen
        if self._console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, numbers="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = {name: value for name, value in kwargs["logs"].items() if name not in _LEFT_OUT}
        if "train_loss" in logs:
            return  # the libraries' summary after the last step: metrics.json has it
        entry: dict[str, Any] = {
            "step": state.global_step,
            "optimizer_steps": self.steps.taken,
            "skipped_steps": self.steps.skipped,
        } | logs
        self._since += logs.get("eval_runtime", 0.0)  # tokens/s count the time of training only
        if "loss" in logs:
            now, tokens = time.monotonic(), state.num_input_tokens_seen
            entry["tokens_per_second"] = round((tokens - self._tokens) / max(now - self._since, 1e-9), 1)
            self._tokens, self._since = tokens, now
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            if scaler is not None:
                entry["loss_scale"] = scaler.get_scale()
        # JSON has no NaN and no infinity: they are written as text.
        self.run.append_history({name: str(value) if _is_not_finite(value) else value for name, value in entry.items()})
        self.report(entry)
        self._show(entry, state)

    def _show(self, entry: dict[str, Any], state: TrainerState) -> None:
        numbers = "  ".join(
            f"{name.replace('tokens_per_second', 'tokens/s')} {entry[name]:{form}}"
            for name, form in _SHOWN.items()
            if name in entry
        )
        if self._console.is_terminal:
            self._bar.update(self._task, numbers=numbers)
            return
        seconds_per_step = (time.monotonic() - self._start) / max(state.global_step - self._first, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds_per_step * (state.max_steps - state.global_step)))
        log.info("step %d/%d  %s  left %s", state.global_step, state.max_steps, numbers, left)

    def close(self) -> None:
        """Remove the progress bar from the terminal."""
        if self._console.is_terminal:
            self._bar.stop()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
