"""python -m intern.train lora.r=32 trainer.max_steps=200"""

import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from intern import processes
from intern.cli import sweep
from intern.cli.arguments import quoted, text_of
from intern.cli.command import command
from intern.cli.start import Start
from intern.errors import LostProcess, UserError
from intern.model.preload import importing
from intern.runs.directory import Run
from intern.runs.failures import discard_failed_attempt, record_failure
from intern.runs.find import find_unfinished
from intern.training.launch import processes_to_start, start_processes
from intern.training.quick_check import check_quickly

_ANNOUNCED = "arguments"  # of process 0, for the others
# Seconds that a process keeps its own error to itself: if process 0 ends with the same one, torchrun ends this process before.
_SAME_ERROR_S = 5
_OTHERS_ERROR_S = 60  # the same, if it only knows that another process has ended


def _in_place(arguments: list[str]) -> list[str]:
    """Make the run of resume=RUN_DIR Hydra's output directory; what Hydra wrote there when the run started stays.

    Of several processes, the others work in the folder that process 0 has chosen, each with a log file of its own.
    """
    here = processes.place()
    if here.size > 1 and {"-m", "--multirun"} & set(arguments):
        raise UserError(
            "torchrun starts one run: for a sweep, leave out torchrun and give num_processes and hydra/launcher=process"
        )
    if not processes.is_main():
        kept = [text for text in arguments if not text.startswith(("resume=", "hydra.run.dir="))]
        place = processes.announced(_ANNOUNCED)
        return [
            *kept,
            *(quoted(key, value) for key, value in place.items()),
            *_own_log(place["hydra.run.dir"], here.rank),
        ]
    asked = [text_of(text) for text in arguments if text.startswith("resume=")]
    if not asked or asked[-1] == "null":
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(f"resume={asked[-1]}: resumes one run; leave out --multirun")
    run = find_unfinished(asked[-1])
    kept = [text for text in arguments if not text.startswith("resume=")]
    return [*kept, quoted("resume", str(run.path)), quoted("hydra.run.dir", str(run.path))]


def _own_log(folder: str, rank: int) -> list[str]:
    """Return overrides for a process other than 0: its messages go to a file of its own, and only errors to the terminal."""
    return [
        quoted("hydra.job_logging.handlers.file.filename", str(Path(folder) / f"train.rank{rank}.log")),
        "+hydra.job_logging.handlers.console.level=ERROR",
        quoted("hydra.job_logging.formatters.terminal.format", f"process {rank}: %(message)s"),
    ]


@command("train", prepare=_in_place)
def main(cfg: DictConfig) -> float:
    """Fine-tune a model on question/answer rows with QLoRA."""
    if processes.place().size == 1:
        return _main(cfg)
    try:
        return _main(cfg)
    except Exception as error:
        if isinstance(error, LostProcess) or not processes.is_main():
            time.sleep(_OTHERS_ERROR_S if isinstance(error, LostProcess) else _SAME_ERROR_S)
        raise


def _main(cfg: DictConfig) -> float:
    hydra = HydraConfig.get()
    run, folder = Run(Path(hydra.runtime.output_dir)), sweep.folder(hydra)
    start = Start(run, cfg)
    if folder is not None and processes.is_main():
        discard_failed_attempt(run)
        if not run.config.is_file():
            start()  # a job of a sweep leaves its reason, its log and its command line for the comparison of the sweep's runs
    is_read = folder is not None and hydra.mode == RunMode.RUN  # by the launcher of a sweep, in another process
    with record_failure(run, records_refusals=lambda: start.has_begun or is_read):
        if cfg.resume is None:
            check_quickly(cfg, asks_gpu=True)
        count = processes_to_start(cfg.num_processes, run, is_resumed=cfg.resume is not None)
        if count > 1 and hydra.mode == RunMode.RUN:
            start_processes(count, [*sys.argv[1:], quoted("hydra.run.dir", str(run.path))])
            return run.score()
        if processes.is_main():
            processes.announce(
                _ANNOUNCED, {"hydra.run.dir": str(run.path)} | ({"resume": cfg.resume} if cfg.resume else {})
            )
        with importing(cfg):
            from intern.training.finetune import finetune  # heavy: keeps --help fast
            from intern.training.resume import resumed_config

        if cfg.resume is not None:
            cfg = resumed_config(run, cfg, hydra.overrides.task)
        elif folder is not None and cfg.name is not None:
            cfg.name = f"{cfg.name}/{run.path.relative_to(folder)}"  # of a sweep's jobs, each has its own
        return finetune(cfg, run, folder.name if folder is not None else None, start)


if __name__ == "__main__":
    main()
