"""num_processes -> the processes of a run, started by torchrun's own engine; what they exit with is this command's exit code."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from intern import processes
from intern.errors import RunError, UserError
from intern.runs.directory import Run

log = logging.getLogger(__name__)


def processes_to_start(wanted: int | None, run: Run, is_resumed: bool) -> int:
    """Return how many processes this one must start for a run: 1 if it trains itself, also if torchrun has started it.

    Args:
        wanted: num_processes; None: as many as there are, or as a resumed run had.
        run: the run directory.
        is_resumed: whether the run resumes.
    """
    if processes.is_started_by_torchrun():
        return 1
    if wanted is None and is_resumed:
        stored = run.read_config().get("num_processes")
        wanted = stored if isinstance(stored, int) else None
    return wanted or 1


def start_processes(count: int, arguments: Sequence[str]) -> None:
    """Train with several processes on this machine, and wait for them. If one ends with an error, the others are ended.

    Args:
        count: how many.
        arguments: of python -m intern.train, as each of them gets it.

    Raises:
        RunError: one of them was killed.
        SystemExit: one of them ended with an error, which it has shown itself; with its exit code, or 128 + signal after an interruption.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(
        logging.root.manager.loggerDict
    ):  # each has a level of its own; below, one line says what happened
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "intern.train", *arguments)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        raise RunError(
            f"process {rank} of {count} was killed by {name}" + (" (host memory?)" if name == "SIGKILL" else "")
        ) from error


def check_processes(cfg: Any) -> None:
    """Check that as many processes are here as the configuration says and can share its steps, and say if GPUs are left idle.

    Args:
        cfg: the composed conf/train.yaml, or that of a resumed run.

    Raises:
        UserError: torchrun has started another number, nothing has started several, or a key of the trainer is only for one.
    """
    wanted, here = cfg.get("num_processes"), processes.place()
    if isinstance(wanted, int) and 1 <= wanted != here.size:  # anything else is refused by intern/training/rules.py
        if not processes.is_started_by_torchrun():
            raise UserError(
                f"num_processes={wanted}: the jobs of a sweep start them only with hydra/launcher=process, gpus or slurm"
            )
        raise UserError(
            f"num_processes={wanted}, but torchrun has started {here.size}: start {wanted}, or give num_processes={here.size}"
        )
    if here.size > 1:
        _check_shared(cfg.trainer)
    if not cfg.trainer.get("use_cpu") and processes.is_main():
        import torch

        if (there := torch.cuda.device_count()) > here.local_size:
            log.warning(
                "GPUs are left idle: this machine has %d, and this run uses %d; num_processes=%d uses all",
                there,
                here.local_size,
                there,
            )


def _check_shared(trainer: Any) -> None:
    """Raise UserError for keys with which several processes would lose rows, repeat them, or weigh them differently."""
    strategy = trainer.get("train_sampling_strategy")
    if strategy not in (None, "random", "sequential"):
        raise UserError(
            f"trainer.train_sampling_strategy={strategy}: its order differs from process to process: leave it out, or train with one process"
        )
    if trainer.get("accelerator_config") is not None:
        raise UserError(
            "trainer.accelerator_config: decides how processes share batches: leave it out, or train with one process"
        )
    if trainer.get("average_tokens_across_devices") is False:
        raise UserError(
            "trainer.average_tokens_across_devices=false: each process would weigh its own tokens: leave it out, or train with one process"
        )
