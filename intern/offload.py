"""What makes long rows fit when every layer is checkpointed already: layer inputs that wait in host memory, and MLPs in pieces."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def offload_inputs(layers: list[GradientCheckpointingLayer]) -> None:
    """Checkpointed layers keep their inputs in pinned host memory: batch x length x hidden size numbers less on the GPU for each layer.

    The copies run beside the computation in the order of its stream, so the processor never waits for them.
    """
    for layer in layers:
        setattr(layer, "_gradient_checkpointing_func", _checkpoint_to_host)  # noqa: B010 - mypy forbids the assignment


def _checkpoint_to_host(run: Callable[..., Any], *inputs: Any) -> Any:
    # The reentrant form saves its inputs through autograd, where hooks see them; it passes gradients on only where one of its inputs
    # needs them, which the input of the first layer does not.
    anchor = torch.zeros((), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(lambda _, *given: run(*given), anchor, *inputs, use_reentrant=True)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _from_host(kept: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, host = kept
    return host.to(device, non_blocking=True)


def tile_mlps(layers: list[GradientCheckpointingLayer], tokens: int) -> None:
    """MLPs take rows in pieces of so many tokens, each recomputed in the backward pass: one piece's intermediates are there at a time."""
    for layer in layers:
        mlp: Any = layer.mlp
        mlp.forward = _in_pieces(mlp.forward, tokens)


def _in_pieces(whole: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return torch.cat([whole(piece) for piece in hidden.split(tokens, dim=1)], dim=1)
        pieces = [checkpoint(whole, piece, use_reentrant=False) for piece in hidden.split(tokens, dim=1)]
        return torch.cat(pieces, dim=1)

    return forward
