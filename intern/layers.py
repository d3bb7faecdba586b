"""A model's decoder layers."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """In their order, whatever is wrapped around them; they are what transformers knows to recompute."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
