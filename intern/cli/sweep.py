"""The jobs of a sweep: one that fails does not end the others, none leaves memory behind, and a summary is logged at the end."""

import ctypes
import gc
import logging
import math
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from intern.cli.messages import say
from intern.config.secrets import refuse
from intern.errors import UserError, one_line
from intern.runs.directory import Run
from intern.runs.find import runs_below
from intern.runs.ranking import Ranked, rank

log = logging.getLogger(__name__)
log_file = logging.getLogger(
    "intern.log_file"
)  # only to train.log, not to the terminal (conf/hydra/job_logging/run.yaml)


@dataclass(frozen=True)
class Failure:
    """A job that failed.

    Args:
        job: its number.
        reason: in one line.
        bad_input: whether the user's input was at fault.
    """

    job: int
    reason: str
    bad_input: bool


@dataclass
class SweepRecord:
    """The jobs of a sweep so far.

    Args:
        overrides: those of each job that has started, by its number.
        failures: the jobs that failed.
        planned: overrides of all jobs; empty if nothing is known of those to come, as in a search.
        seconds: that each job took which has ended; None if it failed or was finished before.
    """

    overrides: dict[int, list[str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    planned: list[list[str]] = field(default_factory=list)
    seconds: dict[int, float | None] = field(default_factory=dict)

    def describe(self, failure: Failure) -> str:
        """Return one line with the job's own overrides, without those that all jobs have."""
        return f"{self.called(failure.job)} failed: {failure.reason}"

    def called(self, job: int) -> str:
        """Return "job 3 (lora.r=16)": a job with its own overrides."""
        return f"job {job} ({own_overrides(self.overrides[job], self.planned or list(self.overrides.values()))})"

    @property
    def all_refused(self) -> bool:
        """Whether every job failed because of bad input; also if there was none, since the sweep itself was refused."""
        return len(self.failures) == len(self.overrides) and all(failure.bad_input for failure in self.failures)

    @property
    def exit_code(self) -> int:
        """0 if no job failed, 2 if only bad input was the cause, otherwise 1."""
        if not self.failures:
            return 0
        return 2 if all(failure.bad_input for failure in self.failures) else 1


# The one sweep that this process runs. Hydra's callback, its launcher and the command each see a part of it, and share no object.
record = SweepRecord()


def own_overrides(overrides: Sequence[str], of_all: Sequence[Sequence[str]]) -> str:
    """Return the overrides that not all jobs have."""
    shared = set.intersection(*map(set, of_all)) if len(of_all) > 1 else set()
    return " ".join(override for override in overrides if override not in shared)


def announce(planned: Sequence[Sequence[str]]) -> None:
    """Say how many jobs there are and what all of them have in common; remember them to tell how far the sweep is."""
    record.planned = [list(overrides) for overrides in planned]
    shared = set.intersection(*map(set, planned)) if planned else set()
    same = " ".join(override for override in planned[0] if override in shared) if planned else ""
    log.info("%d jobs, all checked%s", len(planned), f"; the same in all: {same}" if same and len(planned) > 1 else "")


def report_ended(job: int, run: Run, seconds: float, has_failed: bool) -> None:
    """Log that a job has ended, the time that is left, and the best job so far. Nothing is logged in a search, whose length is not known here.

    Args:
        job: its number.
        run: its run directory.
        seconds: that it took.
        has_failed: whether it failed.
    """
    total = len(record.planned)
    if not total:
        return
    was_finished = run.finished and time.time() - run.metrics.stat().st_mtime > seconds + 1
    record.seconds[job] = None if has_failed or was_finished else seconds
    left = total - len(record.seconds)
    how = "failed" if has_failed else "was finished" if was_finished else "done"
    said = [f"job {job} {how} after {_duration(seconds)}, {len(record.seconds)} of {total}"]
    measured = [taken for taken in record.seconds.values() if taken is not None]
    if left and measured:
        said.append(f"{left} left, about {_duration(left * statistics.mean(measured))} one after another")
    groups = rank(runs_below(run.path.parent))
    if groups:
        said.append(f"best so far: {_best(groups[0])}")
    log.info("%s", "; ".join(said))


def _best(group: Ranked) -> str:
    """Return the best job of a group with its own overrides, and its score by its name."""
    name = group.best.path.name
    number = int(name) if name.isdecimal() else -1
    called = record.called(number) if number in record.overrides else name
    return f"{called}, {group.score}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{minutes} min"
        if minutes < 100
        else f"{minutes // 60} h {minutes % 60} min"
    )


def folder(hydra: HydraConf) -> Path | None:
    """Return the folder of the sweep that a run belongs to, or None for a single run.

    A job may have its own process, in which it is a single run for Hydra: then its folder, inside the sweep's, tells.
    """
    sweep = Path(hydra.sweep.dir).absolute()
    return sweep if Path(hydra.runtime.output_dir).is_relative_to(sweep) else None


def record_failure(error: Exception) -> float:
    """Note that the current job failed and free everything its frames hold; return NaN, a score that is never the best."""
    record.failures.append(Failure(HydraConfig.get().job.num, one_line(error), isinstance(error, UserError)))
    link: BaseException | None = error
    while link is not None:  # frames of a traceback keep the model alive
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return math.nan


def warn_stopped(hydra: HydraConf) -> None:
    """Say how a sweep that was interrupted is resumed."""
    log.warning(
        "sweep stopped at job %d; to resume: the same command with %s",
        hydra.job.num,
        shlex.quote(f"hydra.sweep.dir={hydra.sweep.dir}"),
    )


def release_memory() -> None:
    """Return unused memory to the operating system and the GPU's driver."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # glibc keeps freed memory between blocks that are in use


class Sweep(Callback):
    """hydra.callbacks: refuses credentials before Hydra stores the configuration, releases memory after each job.

    After the last job it draws the picture and logs the best job and the failures.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            refuse(config)
        except UserError as error:
            say(str(error))
            sys.exit(2)  # Hydra makes a warning of any other exception of a callback

    on_multirun_start = on_run_start

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            record.overrides[config.hydra.job.num] = list(config.hydra.overrides.task)
            self._begun = time.monotonic()

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            release_memory()
            job, run = config.hydra.job.num, Run(Path(config.hydra.runtime.output_dir))
            has_failed = any(failure.job == job for failure in record.failures)
            report_ended(job, run, time.monotonic() - self._begun, has_failed)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = list(runs_below(folder))
        if runs and not record.all_refused:  # nothing in the folder has changed
            from intern.display.plot import plot_sweep  # heavy: keeps --help fast

            plot_sweep([_point(run) for run in runs], folder / "sweep.png")
            groups = rank(runs)
            bests = "; ".join(_best(group) for group in groups)
            log.info("%d finished runs in %s; the best: %s", len(runs), folder, bests or "none has a score")
            place = shlex.quote(f"run_dir={folder}")
            compared = shlex.quote(f"runs={folder}")
            for command in (f"evaluate {place}", f"compare {compared}", f"query {place} question='...'"):
                log.info("next: python -m intern.%s", command)
        for failure in record.failures:
            log.error("%s", record.describe(failure))


def _point(run: Run) -> tuple[float, int, float]:
    """Return learning rate, rank and score of a finished run."""
    cfg = run.read_config()
    return cfg.trainer.learning_rate, cfg.lora.r, run.score()
