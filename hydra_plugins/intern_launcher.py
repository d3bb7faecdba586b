"""hydra/launcher=process, gpus or slurm: each job of a sweep is a command of its own, `python -m intern.train ... hydra.run.dir=ITS_FOLDER`."""

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from intern.cli import sweep
from intern.cli.command import WANTS_TRACEBACK
from intern.errors import UserError
from intern.runs.directory import Run

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A job of a sweep: its number, its own overrides and its run directory; after it ran, the exit code of its command."""

    number: int
    overrides: list[str]
    run: Run
    command: list[str]
    exit_code: int | None = None  # below zero: the signal that ended it; None: it never ran to its end
    reason: str | None = None  # where there is no exit code

    def failure(self) -> str | None:
        """Why it failed; None where it did not."""
        if self.exit_code == 0:
            return None
        if self.exit_code is None:
            return self.reason or "not run"
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            return f"killed by {name}" + (" (host memory?)" if name == "SIGKILL" else "")
        if self.exit_code - 128 in list(signal.Signals):
            return f"interrupted by {signal.Signals(self.exit_code - 128).name}: the same sweep goes on from there"
        with contextlib.suppress(UserError):  # an interpreter that could not start, say, has left no failure.json
            return str(self.run.read_json(self.run.failure)["error"])
        return f"exit code {self.exit_code}"


class CommandLauncher(Launcher):
    """Runs each job as a command and returns what the jobs scored: a crash takes down nothing else, and all memory goes with its process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's entry: the overrides of each job -> their scores, NaN for a job that failed."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        before = HydraConfig.instance().cfg
        try:
            made = [self._job(number, list(one)) for number, one in enumerate(job_overrides, start=initial_job_idx)]
            self.run([job for job, _ in made])
        finally:
            HydraConfig.instance().cfg = before
        return [self._result(job, config) for job, config in made]

    def run(self, jobs: list[Job]) -> None:
        """Runs the jobs' commands and sets their exit codes."""
        raise NotImplementedError

    def _job(self, number: int, overrides: list[str]) -> tuple[Job, DictConfig]:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
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
        # Later overrides win: these say that it is a single run, and where the sweep is that it belongs to.
        place = ["hydra.mode=RUN", f"hydra.run.dir={_quoted(run.path)}", f"hydra.sweep.dir={_quoted(sweep_dir)}"]
        inherited = [one for one in self.config.hydra.overrides.hydra if not one.startswith("hydra.sweep")]
        command = [sys.executable, "-m", "intern.train", *more, *overrides, *inherited, *place]
        sweep.jobs[number] = overrides
        return Job(number, overrides, run, command), config

    def _result(self, job: Job, config: DictConfig) -> JobReturn:
        score = math.nan
        if (failure := job.failure()) is None:
            score = job.run.score()
        else:
            sweep.failures.append(sweep.Failure(job.number, failure, bad_input=job.exit_code == 2))
        task_cfg = copy.deepcopy(config)
        with open_dict(task_cfg):
            del task_cfg["hydra"]
        done = JobReturn(overrides=job.overrides, cfg=task_cfg, hydra_cfg=config, working_dir=str(Path.cwd()))
        done.task_name = str(config.hydra.job.name)
        done.status, done.return_value = JobStatus.COMPLETED, score
        return done


def _quoted(path: Path) -> str:
    """A path as Hydra's grammar takes any text."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


class ProcessLauncher(CommandLauncher):
    """Jobs as processes on this machine, one after another, or one on each device at a time."""

    def __init__(self, devices: Sequence[int | str] | str | None) -> None:
        self.devices = devices
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._signal = 0

    def run(self, jobs: list[Job]) -> None:
        devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        names = _devices(self.devices)
        for name in names:
            devices.put(name)
        log.info("%d jobs, %d at a time, each in a process of its own", len(jobs), len(names))

        def work(job: Job) -> None:
            device = devices.get()
            try:
                self._run(job, device, quiet=len(names) > 1)
            finally:
                devices.put(device)

        with self._handing_on_signals(), ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(work, jobs))
        if self._signal:
            log.warning(
                "sweep stopped: the same command with %s goes on",
                shlex.quote(f"hydra.sweep.dir={self.config.hydra.sweep.dir}"),
            )
            sys.exit(128 + self._signal)

    def _run(self, job: Job, device: str | None, quiet: bool) -> None:
        if self._signal:
            return
        own = " ".join(filter_overrides(job.overrides))
        log.info("\t#%d%s : %s", job.number, f" on device {device}" if device is not None else "", own)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})
        if not WANTS_TRACEBACK:
            environment.pop("HYDRA_FULL_ERROR", None)
        with contextlib.ExitStack() as stack:
            # Several jobs at once would write over each other's progress: train.log has what they say, terminal.log what crashes say.
            output = stack.enter_context((job.run.path / "terminal.log").open("wb")) if quiet else None
            # A group of its own: the terminal's Ctrl-C reaches this process alone, which hands it on once.
            process = subprocess.Popen(job.command, env=environment, stdout=output, stderr=output, process_group=0)
            self._running[job.number] = process
            if self._signal:  # it came while the process was being started
                process.send_signal(self._signal)
            job.exit_code = process.wait()
            del self._running[job.number]
        if quiet:
            log.info("\t#%d : %s", job.number, job.failure() or f"done, score {job.run.score():.4f}")

    @contextlib.contextmanager
    def _handing_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM go to the running jobs, which save a checkpoint; no other job is started."""

        def hand_on(number: int, frame: Any) -> None:
            self._signal = number
            for process in list(self._running.values()):
                process.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _devices(wanted: Sequence[int | str] | str | None) -> list[str | None]:
    """Values of CUDA_VISIBLE_DEVICES, one for each job at a time; [None] where jobs take turns on all there is."""
    if wanted is None:
        return [None]
    if wanted != "all":
        return [str(device) for device in wanted]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [name.strip() for name in visible.split(",")]
    import torch  # heavy: only where the devices are to be counted

    if not torch.cuda.device_count():
        raise UserError("hydra.launcher.devices=all: no CUDA GPU found; hydra/launcher=process needs none")
    return [str(index) for index in range(torch.cuda.device_count())]


class SlurmJob:
    """What runs on the cluster's node: the job's command. SLURM's warning before the time is up makes it save and wait in the queue again."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __call__(self) -> int:
        # A group of its own: the warning's signal, which goes to all, would end it before it has saved.
        self.process = subprocess.Popen(self.command, process_group=0)
        signal.signal(signal.SIGTERM, lambda number, frame: self.process.send_signal(number))
        # In a thread: signal handlers interrupt the main one, and two waits in one thread would lock each other out.
        self.waiting = threading.Thread(target=self.process.wait)
        self.waiting.start()
        self.waiting.join()
        return self.process.returncode

    def checkpoint(self) -> Any:
        """Called by submitit at the warning; what it returns is put into the queue."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.waiting.join()
        return DelayedSubmission(SlurmJob(self.command))


class SlurmLauncher(CommandLauncher):
    """Jobs as an array of SLURM jobs, through submitit."""

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
                "\t#%d in the queue as %s : %s", job.number, remote.job_id, " ".join(filter_overrides(job.overrides))
            )
        try:
            self._wait(jobs, submitted)
        except KeyboardInterrupt:
            names = " ".join(one.job_id for one in submitted)
            log.warning("not waiting any more; scancel ends what is in the queue: %s", names)
            raise

    def _wait(self, jobs: list[Job], submitted: list[Any]) -> None:
        import submitit

        for job, remote in zip(jobs, submitted, strict=True):
            try:
                job.exit_code = remote.result()
            except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
                job.reason = f"SLURM ended {remote.job_id} ({remote.state}), see {remote.paths.stderr}"
                log.debug("%s", error)
            log.info("\t#%d : %s", job.number, job.failure() or f"done, score {job.run.score():.4f}")
