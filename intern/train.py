"""python -m intern.train lora.r=32 trainer.max_steps=200"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from intern.cli import sweep
from intern.cli.arguments import quoted, text_of
from intern.cli.command import command
from intern.cli.start import Start
from intern.errors import UserError
from intern.model.preload import importing
from intern.runs.directory import Run
from intern.runs.failures import discard_failed_attempt, record_failure
from intern.runs.find import find_unfinished
from intern.training.quick_check import check_quickly


def _in_place(arguments: list[str]) -> list[str]:
    """Make the run of resume=RUN_DIR Hydra's output directory; what Hydra wrote there when the run started stays."""
    asked = [text_of(text) for text in arguments if text.startswith("resume=")]
    if not asked or asked[-1] == "null":
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(f"resume={asked[-1]}: resumes one run; leave out --multirun")
    run = find_unfinished(asked[-1])
    kept = [text for text in arguments if not text.startswith("resume=")]
    return [*kept, quoted("resume", str(run.path)), quoted("hydra.run.dir", str(run.path))]


@command("train", prepare=_in_place)
def main(cfg: DictConfig) -> float:
    """Fine-tune a model on question/answer rows with QLoRA."""
    hydra = HydraConfig.get()
    run, folder = Run(Path(hydra.runtime.output_dir)), sweep.folder(hydra)
    start = Start(run, cfg)
    if folder is not None:
        discard_failed_attempt(run)
        if not run.config.is_file():
            start()  # a job of a sweep leaves its reason, its log and its command line for the comparison of the sweep's runs
    is_read = folder is not None and hydra.mode == RunMode.RUN  # by the launcher of a sweep, in another process
    with record_failure(run, records_refusals=lambda: start.has_begun or is_read):
        if cfg.resume is None:
            check_quickly(cfg, asks_gpu=True)
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
