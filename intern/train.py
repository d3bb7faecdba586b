"""python -m intern.train lora.r=32 trainer.max_steps=200"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from intern.cli import command
from intern.run import Run


@command("train")
def main(cfg: DictConfig) -> float:
    """Fine-tunes a model on question/answer rows with QLoRA."""
    from intern.finetune import finetune  # heavy: keeps --help fast

    hydra = HydraConfig.get()
    sweep = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else None
    return finetune(cfg, Run(Path(hydra.runtime.output_dir)), sweep)


if __name__ == "__main__":
    main()
