"""conf/lora -> peft.LoraConfig."""

from omegaconf import DictConfig
from peft import LoraConfig

from intern.config.build import build, plain


def build_lora(node: DictConfig) -> LoraConfig:
    """The adapter's shape.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that PEFT refuses.
    """
    return build(LoraConfig, plain(node), "lora")
