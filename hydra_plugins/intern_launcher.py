"""hydra/launcher=process, gpus or slurm: every job of a sweep runs as its own command, `python -m intern.train ... hydra.run.dir=ITS_FOLDER`.

A little over 300 lines: Hydra looks for launchers in modules of this package, and they share how a job is started and what its end means.
"""

import contextlib
import copy
import logging
import math
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from intern.cli import sweep
from intern.cli.command import WANTS_TRACEBACK
from intern.cli.sweep_check import PlannedJob, check_jobs, planned_job
from intern.errors import UserError
from intern.runs.directory import Run

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A job of a sweep.

    Args:
        number: its place in the sweep.
        overrides: its own ones.
        run: its run directory.
        command: what is executed.
        exit_code: of the command; negative: the signal that ended it; None: it did not run to its end.
        reason: why there is no exit code.
    """

    number: int
    overrides: list[str]
    run: Run
    command: list[str]
    exit_code: int | None = None
    reason: str | None = None

    def failure(self) -> str | None:
        """Return why the job failed in one line, or None if it did not."""
        if self.exit_code == 0:
            return None
        if self.exit_code is None:
            return self.reason or "not run"
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            return f"killed by {name}" + (" (host memory?)" if name == "SIGKILL" else "")
        if self.exit_code - 128 in list(signal.Signals):
            return f"interrupted by {signal.Signals(self.exit_code - 128).name}: the same sweep resumes from there"
        with contextlib.suppress(UserError):  # an interpreter that could not start has left no failure.json
            return str(self.run.read_json(self.run.failure)["error"])
        return f"exit code {self.exit_code}"


def _check(launcher: Any, job_overrides: Sequence[Sequence[str]], asks_gpu: bool) -> None:
    """Check all jobs of a sweep before the first one starts. A search chooses its jobs while it runs: each of them checks itself."""
    if not str(launcher.config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        return
    jobs: list[PlannedJob] = []
    for number, overrides in enumerate(job_overrides):
        try:
            config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
            jobs.append(planned_job(number, list(overrides), config, str(launcher.config.hydra.sweep.dir)))
        except (HydraException, OmegaConfBaseException) as error:
            jobs.append(PlannedJob(number, list(overrides), error, Run(Path(str(launcher.config.hydra.sweep.dir)))))
    check_jobs(jobs, asks_gpu)
    sweep.announce(job_overrides)


class CheckedLauncher(BasicLauncher):
    """Hydra's own launcher, which runs the jobs one after another in this process, after a check of all of them."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, called by Hydra with the overrides of each."""
        _check(self, job_overrides, asks_gpu=True)
        return super().launch(job_overrides, initial_job_idx)


class CommandLauncher(Launcher):
    """Runs every job as a command: a crash affects no other job, and memory is freed with the process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, called by Hydra with the overrides of each; return values are their scores, NaN for a job that failed."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        _check(self, job_overrides, asks_gpu=False)  # its own process would hold GPU memory
        before = HydraConfig.instance().cfg
        try:
            made = [self._job(number, list(one)) for number, one in enumerate(job_overrides, start=initial_job_idx)]
            self.run([job for job, _ in made])
        finally:
            HydraConfig.instance().cfg = before
        return [self._result(job, config) for job, config in made]

    def run(self, jobs: list[Job]) -> None:
        """Run the jobs' commands and set their exit codes."""
        raise NotImplementedError

    def _job(self, number: int, overrides: list[str]) -> tuple[Job, DictConfig]:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # for interpolations of ${hydra:...}
        sweep_dir = Path(str(config.hydra.sweep.dir)).absolute()
        run = Run(sweep_dir / str(config.hydra.sweep.subdir))
        run.path.mkdir(parents=True, exist_ok=True)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(run.path)
        more = [
            f"--config-dir={source.path}"
            for source in self.config.hydra.runtime.config_sources
            if source.provider == "command-line"
        ]
        # Later overrides win: these make it a single run, and say which sweep it belongs to.
        place = ["hydra.mode=RUN", f"hydra.run.dir={_quoted(run.path)}", f"hydra.sweep.dir={_quoted(sweep_dir)}"]
        inherited = [one for one in self.config.hydra.overrides.hydra if not one.startswith("hydra.sweep")]
        command = [sys.executable, "-m", "intern.train", *more, *overrides, *inherited, *place]
        sweep.record.overrides[number] = overrides
        return Job(number, overrides, run, command), config

    def _result(self, job: Job, config: DictConfig) -> JobReturn:
        score = math.nan
        if (failure := job.failure()) is None:
            score = job.run.score()
        else:
            sweep.record.failures.append(sweep.Failure(job.number, failure, bad_input=job.exit_code == 2))
        task_cfg = copy.deepcopy(config)
        with open_dict(task_cfg):
            del task_cfg["hydra"]
        done = JobReturn(overrides=job.overrides, cfg=task_cfg, hydra_cfg=config, working_dir=str(Path.cwd()))
        done.task_name = str(config.hydra.job.name)
        done.status, done.return_value = JobStatus.COMPLETED, score
        return done


def _quoted(path: Path) -> str:
    """Return a path as text in Hydra's grammar."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


class ProcessLauncher(CommandLauncher):
    """Runs jobs as processes on this machine: one after another, or one at a time on each device.

    Args:
        devices: values of CUDA_VISIBLE_DEVICES, "all", or None: one job at a time on all devices.
    """

    def __init__(self, devices: Sequence[int | str] | str | None) -> None:
        self.devices = devices
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._signal = 0

    def run(self, jobs: list[Job]) -> None:
        devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        names = _devices(self.devices)
        for name in names:
            devices.put(name)
        log.info("%d jobs, %d at a time, each in its own process", len(jobs), len(names))

        def work(job: Job) -> None:
            device = devices.get()
            try:
                self._run(job, device, quiet=len(names) > 1)
            finally:
                devices.put(device)

        with self._forwarding_signals(), ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(work, jobs))
        if self._signal:
            log.warning(
                "sweep stopped; to resume: the same command with %s",
                shlex.quote(f"hydra.sweep.dir={self.config.hydra.sweep.dir}"),
            )
            sys.exit(128 + self._signal)

    def _run(self, job: Job, device: str | None, quiet: bool) -> None:
        if self._signal:
            return
        own = " ".join(filter_overrides(job.overrides))
        log.info("job %d%s: %s", job.number, f" on device {device}" if device is not None else "", own)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})
        if not WANTS_TRACEBACK:
            environment.pop("HYDRA_FULL_ERROR", None)
        with contextlib.ExitStack() as stack:
            # Progress of several jobs at once would be unreadable: train.log has their messages, terminal.log those of crashes.
            output = stack.enter_context((job.run.path / "terminal.log").open("wb")) if quiet else None
            # Its own process group: the terminal's Ctrl-C reaches only this process, which forwards it once.
            process = subprocess.Popen(job.command, env=environment, stdout=output, stderr=output, process_group=0)
            self._running[job.number] = process
            begun = time.monotonic()
            if self._signal:  # it arrived while the process was being started
                process.send_signal(self._signal)
            job.exit_code = process.wait()
            del self._running[job.number]
        if quiet:
            log.info("job %d: %s", job.number, job.failure() or f"done, score {job.run.score():.4f}")
        if not self._signal:
            sweep.report_ended(job.number, job.run, time.monotonic() - begun, has_failed=job.exit_code != 0)

    @contextlib.contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        """Forward Ctrl-C and SIGTERM to the running jobs, which save a checkpoint; no other job is started."""

        def forward(number: int, frame: Any) -> None:
            self._signal = number
            for process in list(self._running.values()):
                process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _devices(wanted: Sequence[int | str] | str | None) -> list[str | None]:
    """Return values of CUDA_VISIBLE_DEVICES, one for each job that runs at the same time; [None]: one job on all devices."""
    if wanted is None:
        return [None]
    if wanted != "all":
        return [str(device) for device in wanted]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [name.strip() for name in visible.split(",")]
    import torch  # heavy: only if devices must be counted

    if not torch.cuda.device_count():
        raise UserError("hydra.launcher.devices=all: no CUDA GPU found; hydra/launcher=process needs none")
    return [str(index) for index in range(torch.cuda.device_count())]


class SlurmJob:
    """Runs a job's command on a node of the cluster. At SLURM's warning before its time is up, it saves and is queued again."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __call__(self) -> int:
        # Its own process group: the warning's signal, which is sent to all, would end it before it has saved.
        self.process = subprocess.Popen(self.command, process_group=0)
        signal.signal(signal.SIGTERM, lambda number, frame: self.process.send_signal(number))
        # In a thread: signal handlers interrupt the main thread, and two waits in one thread would block each other.
        self.waiting = threading.Thread(target=self.process.wait)
        self.waiting.start()
        self.waiting.join()
        return self.process.returncode

    def checkpoint(self) -> Any:
        """Return what submitit, which calls this at the warning, puts into the queue."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.waiting.join()
        return DelayedSubmission(SlurmJob(self.command))


class SlurmLauncher(CommandLauncher):
    """Runs jobs as an array of SLURM jobs, through submitit.

    Args:
        cluster: "slurm", or "local" for processes on this machine.
        max_num_timeout: how often a job whose time is up is queued again.
        parameters: of submitit's executor, such as timeout_min.
    """

    def __init__(self, cluster: str, max_num_timeout: int, parameters: DictConfig) -> None:
        self.cluster = cluster
        self.max_num_timeout = max_num_timeout
        values: Any = OmegaConf.to_container(parameters, resolve=True)
        self.parameters: dict[str, Any] = values

    def run(self, jobs: list[Job]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UserError("hydra/launcher=slurm needs submitit: pip install 'intern[slurm]'") from error
        folder = Path(str(self.config.hydra.sweep.dir)).absolute() / ".submitit"
        try:
            executor = submitit.AutoExecutor(folder, self.cluster, slurm_max_num_timeout=self.max_num_timeout)
            executor.update_parameters(**self.parameters)
        except (NameError, RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"hydra.launcher: {' '.join(str(error).split())}") from error
        submitted = executor.submit_array([SlurmJob(job.command) for job in jobs])
        for job, remote in zip(jobs, submitted, strict=True):
            log.info(
                "job %d in the queue as %s: %s", job.number, remote.job_id, " ".join(filter_overrides(job.overrides))
            )
        try:
            self._wait(jobs, submitted)
        except KeyboardInterrupt:
            names = " ".join(one.job_id for one in submitted)
            log.warning("no longer waiting; to end the queued jobs: scancel %s", names)
            raise

    def _wait(self, jobs: list[Job], submitted: list[Any]) -> None:
        import submitit

        for job, remote in zip(jobs, submitted, strict=True):
            try:
                job.exit_code = remote.result()
            except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
                job.reason = f"SLURM ended {remote.job_id} ({remote.state}), see {remote.paths.stderr}"
                log.debug("%s", error)
            log.info("job %d: %s", job.number, job.failure() or f"done, score {job.run.score():.4f}")
