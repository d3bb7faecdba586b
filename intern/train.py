"""python -m intern.train lora.r=32 trainer.max_steps=200"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from intern import sweep
from intern.cli import command
from intern.run import Run


@command("train")
def main(cfg: DictConfig) -> float:
    """Fine-tunes a model on question/answer rows with QLoRA."""
    hydra = HydraConfig.get()
    run, folder = Run(Path(hydra.runtime.output_dir)), sweep.folder(hydra)
    if folder is not None:
        run.discard_failed_attempt()
    with run.noting_failure():
        from intern.finetune import finetune  # heavy: keeps --help fast

        return finetune(cfg, run, folder.name if folder is not None else None)


if __name__ == "__main__":
    main()
