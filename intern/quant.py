"""conf/quant -> transformers.BitsAndBytesConfig."""

from omegaconf import DictConfig
from transformers import BitsAndBytesConfig

from intern.config import build, plain


def build_quant(node: DictConfig | None) -> BitsAndBytesConfig | None:
    """The quantization of the base model; None for quant=none.

    Raises:
        UserError: an unknown key or a value that bitsandbytes does not take.
    """
    values = plain(node)
    return build(BitsAndBytesConfig, values, "quant") if values else None
