"""The jobs of a sweep: a failed one does not end the others, none leaves memory behind, and at the end a picture and what failed."""

import ctypes
import gc
import logging
import math
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from intern.errors import UserError, one_line
from intern.runs.directory import Run, runs_below

log = logging.getLogger(__name__)
log_file = logging.getLogger("intern.log_file")  # conf/hydra/job_logging/run.yaml: not to the terminal


def folder(hydra: HydraConf) -> Path | None:
    """The folder of the sweep that a run belongs to, None for a single run.

    A job may have a process of its own, where it is a run like any other: what tells is that its folder lies in the sweep's.
    """
    sweep = Path(hydra.sweep.dir).absolute()
    return sweep if Path(hydra.runtime.output_dir).is_relative_to(sweep) else None


@dataclass(frozen=True)
class Failure:
    """A job that failed: its number, why, and whether its input was at fault."""

    job: int
    reason: str
    bad_input: bool

    def __str__(self) -> str:
        everywhere = set.intersection(*map(set, jobs.values())) if len(jobs) > 1 else set()
        own = " ".join(override for override in jobs[self.job] if override not in everywhere)
        return f"job {self.job} ({own}) failed: {self.reason}"


# Of the sweep that this process conducts.
jobs: dict[int, list[str]] = {}  # the overrides of each job so far
failures: list[Failure] = []


def failed(error: Exception) -> float:
    """Notes that the job that runs now has failed, lets go of all it held, and gives it a score that is never the best."""
    failures.append(Failure(HydraConfig.get().job.num, one_line(error), isinstance(error, UserError)))
    link: BaseException | None = error
    while link is not None:  # the frames of a traceback keep the model alive
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return math.nan


def stopped(hydra: HydraConf) -> None:
    """Says how a sweep that was interrupted goes on."""
    log.warning(
        "sweep stopped at job %d: the same command with %s goes on",
        hydra.job.num,
        shlex.quote(f"hydra.sweep.dir={hydra.sweep.dir}"),
    )


def exit_code() -> int:
    """2 where nothing but bad input was the cause, otherwise 1."""
    return 2 if all(failure.bad_input for failure in failures) else 1


def release_memory() -> None:
    """Gives memory that nothing uses any more back to the system and to the GPU's driver."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # glibc keeps what was freed between blocks that are in use


class Sweep(Callback):
    """hydra.callbacks: after each job its memory goes; after the last one come the picture, the best job and the failures."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            jobs[config.hydra.job.num] = list(config.hydra.overrides.task)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            release_memory()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = list(runs_below(folder))
        if runs:
            from intern.display.plot import plot_sweep  # heavy: keeps --help fast

            best = min(runs, key=Run.score)
            plot_sweep([_point(run) for run in runs], folder / "sweep.png")
            log.info(
                "%d finished runs in %s; the best: %s, score %.4f", len(runs), folder, best.path.name, best.score()
            )
        for failure in failures:
            log.error("%s", failure)


def _point(run: Run) -> tuple[float, int, float]:
    """Learning rate, rank and score of a finished run."""
    cfg = run.read_config()
    return cfg.trainer.learning_rate, cfg.lora.r, run.score()
