"""A model's decoder layers, and whether they draw random numbers."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """In their order, whatever is wrapped around them; they are what transformers knows to recompute."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def draws_at_random(model: torch.nn.Module) -> bool:
    """Whether training draws random numbers in it (dropout, a router's noise), as its modules or its configuration say."""
    if any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()):
        return True
    config: Any = model.config
    chances = config.get_text_config().to_dict().items()
    return any(isinstance(value, float) and value > 0 for name, value in chances if "drop" in name or "jitter" in name)
