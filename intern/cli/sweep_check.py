"""The jobs of a sweep, before the first one starts -> all mistakes in any of them at once."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from intern.cli import sweep
from intern.cli.messages import say
from intern.errors import RunError, UserError, one_line
from intern.runs.directory import Run


@dataclass(frozen=True)
class PlannedJob:
    """A job that has not started.

    Args:
        number: its number.
        overrides: of its command line.
        cfg: its composed configuration, without Hydra's own; or the error that composing it ended with.
        run: its run directory.
    """

    number: int
    overrides: Sequence[str]
    cfg: DictConfig | HydraException | OmegaConfBaseException
    run: Run


def planned_job(number: int, overrides: Sequence[str], config: DictConfig, sweep_dir: str | Path) -> PlannedJob:
    """Return a job as Hydra composed it.

    Args:
        number, overrides: of the job.
        config: composed, with the group hydra.
        sweep_dir: the sweep's folder.
    """
    task = config.copy()
    OmegaConf.set_readonly(task, False)
    OmegaConf.set_struct(task, False)
    task.pop("hydra", None)
    return PlannedJob(number, overrides, task, Run(Path(sweep_dir) / str(number)))


def check_jobs(jobs: Sequence[PlannedJob], asks_gpu: bool) -> None:
    """Build the training plan of every job and throw it away.

    Args:
        jobs: all jobs of the sweep.
        asks_gpu: whether this process is the one that trains; otherwise its GPU is left alone.

    Raises:
        UserError: at least one job cannot run. Each mistake was written to standard error before, on a line of its own.
    """
    from intern.training.plan import PlanPieces  # heavy: keeps --help fast
    from intern.upstream import route_messages

    route_messages()
    mistakes: dict[str, list[PlannedJob]] = {}
    logging.disable(logging.WARNING)  # each job will say it again
    try:
        for job in jobs:
            try:
                if not isinstance(job.cfg, DictConfig):
                    raise job.cfg
                PlanPieces(job.cfg, job.run, asks_gpu=asks_gpu).take_all()
            except (UserError, RunError, HydraException, OmegaConfBaseException) as error:
                text = str(error) if isinstance(error, UserError | RunError) else one_line(error).partition(": ")[2]
                mistakes.setdefault(text, []).append(job)
    finally:
        logging.disable(logging.NOTSET)
        sweep.release_memory()
    if mistakes:
        count = len({job.number for having in mistakes.values() for job in having})
        for line in _lines(mistakes, jobs):
            say(line)
        raise UserError(f"{count} of {len(jobs)} jobs cannot run, so none was started: see above")


def _lines(mistakes: dict[str, list[PlannedJob]], jobs: Sequence[PlannedJob]) -> Iterator[str]:
    for text, having in mistakes.items():
        if len(having) == len(jobs) > 1:
            yield f"all jobs: {text}"
        else:
            named = [
                f"job {job.number} ({sweep.own_overrides(job.overrides, [one.overrides for one in jobs])})"
                for job in having
            ]
            yield f"{', '.join(named)}: {text}"
