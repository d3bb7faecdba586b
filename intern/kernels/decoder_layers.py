"""A model's decoder layers, and what kernels need to know about them."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

# Parts of a layer that only adds its MLP's output, by transformers' names (Llama, Qwen, Mistral, Granite, Phi-3 ...).
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "resid_attn_dropout", "resid_mlp_dropout"}


def decoder_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers in their order, whatever wraps the model: the modules that transformers can checkpoint."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def draws_at_random(model: torch.nn.Module) -> bool:
    """Whether training draws random numbers in the model (dropout, a router's noise), by its modules and its configuration."""
    if any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()):
        return True
    config: Any = model.config
    chances = config.get_text_config().to_dict().items()
    return any(isinstance(value, float) and value > 0 for name, value in chances if "drop" in name or "jitter" in name)


def are_one_kind(model: torch.nn.Module, layers: list[GradientCheckpointingLayer]) -> bool:
    """Whether every layer receives the same arguments (rotary embeddings, mask)."""
    config: Any = model.config
    types = getattr(config.get_text_config(), "layer_types", None) or [None]
    return (
        len(set(types)) == 1 and len({(type(layer), getattr(layer, "attention_type", None)) for layer in layers}) == 1
    )


def only_adds_its_mlp(layer: torch.nn.Module) -> bool:
    """Whether the output of the layer's MLP is only added; False if the layer has unknown parts."""
    return {name for name, _ in layer.named_children()} <= _PARTS


def mlp_is_by_position(layer: torch.nn.Module) -> bool:
    """Whether what follows the layer's MLP also treats each position separately: an addition or a norm."""
    return all(name in _PARTS or name.endswith("norm") for name, _ in layer.named_children())
