"""conf/quant -> transformers.BitsAndBytesConfig."""

from omegaconf import DictConfig
from transformers import BitsAndBytesConfig

from intern.config.build import build, plain


def build_quant(node: DictConfig | None) -> BitsAndBytesConfig | None:
    """The quantization of the base model; None for quant=none, where an experiment may still have set a dtype for it.

    Raises:
        UserError: an unknown key or a value that bitsandbytes does not take.
    """
    values = plain(node)
    quant = build(BitsAndBytesConfig, values, "quant")
    return quant if quant.load_in_4bit or quant.load_in_8bit else None
