"""Log entries of training: a line each in history.jsonl, the same to the trackers, and the progress display."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from intern.errors import UserError
from intern.runs.directory import Run
from intern.training.checkpoint_state import find_state
from intern.training.steps import OptimizerSteps

log = logging.getLogger(__name__)

# Parts of the libraries' log entries that metrics.json has for the whole run.
_LEFT_OUT = {"total_flos", "train_runtime"} | {f"train_{unit}_per_second" for unit in ("tokens", "samples", "steps")}
_SHOWN = {"loss": ".3f", "eval_loss": ".3f", "eval_f1": ".3f", "tokens_per_second": ",.0f", "loss_scale": ".0f"}


class History(TrainerCallback):
    """Writes every log entry to history.jsonl, reports it, and shows progress: a bar in a terminal, a line of text elsewhere.

    The same entries are in the state that a checkpoint stores: a resumed run gets its history from there (`history_at`).

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
        written = _as_json(entry)
        state.log_history[-1] = written  # in place of the library's, which lacks our counts
        self.run.append_history(written)
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


def history_at(run: Run, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Return the lines of history.jsonl as they were when a checkpoint was written, whatever has become of the file since then.

    Args:
        run: the run.
        checkpoint: a whole checkpoint; None: training starts at its first step, and the history is empty.

    Raises:
        UserError: history.jsonl is a link or no regular file, or a line is lost that only an earlier version's file had.
    """
    lines = _read_lines(run)
    if checkpoint is None:
        return []
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    before = [line for line in lines if line["step"] <= state.global_step and "stopped_early" not in line]
    entries = list(_entries(state, before, run))
    if before != entries:
        log.warning(
            "%s: differs from what was logged up to step %d: these lines are restored from %s",
            run.history, state.global_step, checkpoint.name,
        )  # fmt: skip
    return entries


def _read_lines(run: Run) -> list[dict[str, Any]]:
    """Return the lines of history.jsonl as far as it can be read; raise UserError if something else is in its place."""
    if not run.has(run.history):
        return []
    with contextlib.suppress(UserError):  # not UTF-8, or too large
        return run.read_history()
    return []


def _entries(state: TrainerState, lines: list[dict[str, Any]], run: Run) -> Iterator[dict[str, Any]]:
    """Yield the log entries that a checkpoint's state stores.

    Earlier versions stored the library's entries, which lack our counts: a line of history.jsonl with the same values has them.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    for logged in map(_as_json, state.log_history):
        if "optimizer_steps" in logged:
            yield logged
            continue
        same = [line for line in by_step.get(logged["step"], []) if _is_same(line, logged)]
        yield same[0] if same else _with_counts(logged, state, run)


def _is_same(line: dict[str, Any], logged: dict[str, Any]) -> bool:
    shared = line.keys() & logged.keys()
    return shared >= logged.keys() & {"loss", "eval_loss"} and all(line[name] == logged[name] for name in shared)


def _with_counts(logged: dict[str, Any], state: TrainerState, run: Run) -> dict[str, Any]:
    """Return the library's entry with our counts, which are its step if no step was skipped.

    Raises:
        UserError: some were, so nothing but the lost line knows how many until then.
    """
    stored: Any = state.stateful_callbacks
    steps = find_state(stored, OptimizerSteps.checkpoint_key)
    if steps is None or steps["attributes"].get("skipped") != 0:
        raise UserError(
            f"{run.history}: lacks the line of step {logged['step']}, which a checkpoint of an earlier version does not have either: put "
            "that file back from a copy, or start again in another hydra.run.dir"
        )
    counts = {"step": logged["step"], "optimizer_steps": logged["step"], "skipped_steps": 0}
    return counts | {name: value for name, value in logged.items() if name not in _LEFT_OUT}


def _as_json(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry as JSON can hold it, which has no NaN and no infinity: they become text."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }
