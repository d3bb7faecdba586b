"""conf/lora -> peft.LoraConfig."""

from omegaconf import DictConfig
from peft import LoraConfig

from intern.config import build, plain
from intern.errors import UserError


def build_lora(node: DictConfig) -> LoraConfig:
    """The adapter's shape.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that PEFT refuses.
    """
    lora = build(LoraConfig, plain(node), "lora")
    for name in ("r", "lora_alpha"):
        if getattr(lora, name) < 1:
            raise UserError(f"lora.{name}={getattr(lora, name)}: must be at least 1, or nothing is trained")
    return lora
