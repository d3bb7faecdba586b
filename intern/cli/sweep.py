"""The jobs of a sweep: one that fails does not end the others, none leaves memory behind, and a summary is logged at the end."""

import ctypes
import gc
import logging
import math
import shlex
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from intern.errors import UserError, one_line
from intern.runs.directory import Run
from intern.runs.find import runs_below

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
        overrides: those of each job, by its number.
        failures: the jobs that failed.
    """

    overrides: dict[int, list[str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def describe(self, failure: Failure) -> str:
        """Return one line with the job's own overrides, without those that all jobs have."""
        shared = set.intersection(*map(set, self.overrides.values())) if len(self.overrides) > 1 else set()
        own = " ".join(override for override in self.overrides[failure.job] if override not in shared)
        return f"job {failure.job} ({own}) failed: {failure.reason}"

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
    """hydra.callbacks: releases memory after each job; after the last one draws the picture and logs the best job and the failures."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            record.overrides[config.hydra.job.num] = list(config.hydra.overrides.task)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            release_memory()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = list(runs_below(folder))
        if runs and not record.all_refused:  # nothing in the folder has changed
            from intern.display.plot import plot_sweep  # heavy: keeps --help fast

            best = min(runs, key=Run.score)
            plot_sweep([_point(run) for run in runs], folder / "sweep.png")
            log.info(
                "%d finished runs in %s; the best: %s, score %.4f", len(runs), folder, best.path.name, best.score()
            )
        for failure in record.failures:
            log.error("%s", record.describe(failure))


def _point(run: Run) -> tuple[float, int, float]:
    """Return learning rate, rank and score of a finished run."""
    cfg = run.read_config()
    return cfg.trainer.learning_rate, cfg.lora.r, run.score()
