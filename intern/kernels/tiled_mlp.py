"""MLPs computed in chunks of tokens, so that only one chunk's intermediate activations (tokens, intermediate) exist at a time.

Related: liger_kernel.ops.tiled_mlp and DeepSpeed's TiledMLP (arXiv:2506.13996). Theirs compute a checkpointed layer's MLP three times;
here it is computed twice, as without tiling.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.modeling_layers import GradientCheckpointingLayer

from intern.kernels.decoder_layers import only_adds_its_mlp
from intern.kernels.lora_linear import unpacked
from intern.kernels.patches import Patches
from intern.kernels.recompute import is_recomputing

_Mlp = Callable[[torch.Tensor], torch.Tensor]  # (batch, tokens, hidden) -> the same


def tile_mlps(layers: list[GradientCheckpointingLayer], tokens: int, preserve_rng_state: bool = False) -> Patches:
    """Make the MLPs of layers compute rows in chunks.

    A chunk is computed once in the forward pass and once more in its own backward pass. While the layer recomputes, the MLP's output is
    left out, unless a part of the layer (a norm after the MLP) reads it or random numbers must be drawn as before. Weights are dequantized
    once for all chunks.

    Args:
        layers: decoder layers that `offload_inputs` was given.
        tokens: length of a chunk.
        preserve_rng_state: whether something in the layers is drawn at random (dropout); the backward pass must then draw the same.

    Returns:
        The replaced forward passes of the MLPs.
    """
    patches = Patches()
    for layer in layers:
        mlp: Any = layer.mlp
        is_read = preserve_rng_state or not only_adds_its_mlp(layer)
        patches.set(mlp, "forward", _tiled(mlp, mlp.forward, tokens, is_read, preserve_rng_state))
    return patches


def _tiled(mlp: torch.nn.Module, whole: _Mlp, tokens: int, is_read: bool, preserve_rng_state: bool) -> _Mlp:
    def chunked(hidden: torch.Tensor) -> torch.Tensor:
        # Evaluation does not use the fused layers, nor their dequantized weights.
        with unpacked(mlp) if mlp.training else contextlib.nullcontext():
            return torch.cat([whole(chunk) for chunk in hidden.split(tokens, dim=1)], dim=1)

    def forward(hidden: torch.Tensor) -> torch.Tensor:  # (batch, tokens, hidden)
        if is_recomputing():
            first = chunked if is_read else torch.zeros_like
            return _TiledBackward.apply(hidden, mlp, whole, tokens, first, preserve_rng_state)
        return chunked(hidden) if hidden.shape[1] > tokens else whole(hidden)

    return forward


class _TiledBackward(torch.autograd.Function):
    """hidden (batch, tokens, hidden) -> `first(hidden)`; its backward pass computes the MLP and its gradient chunk by chunk.

    Args of `apply`:
        hidden: the MLP's input.
        mlp: the module, for its weights.
        whole: its forward pass for one chunk.
        tokens: length of a chunk.
        first: the output in the forward pass; zeros if nothing reads it.
        preserve_rng_state: whether the backward pass must draw what `first` draws.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        mlp: torch.nn.Module,
        whole: _Mlp,
        tokens: int,
        first: _Mlp,
        preserve_rng_state: bool,
    ) -> torch.Tensor:
        device = hidden.device.type
        ctx.autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        ctx.save_for_backward(hidden)
        ctx.mlp, ctx.whole, ctx.tokens = mlp, whole, tokens
        ctx.random_state = (torch.get_rng_state(), *get_device_states(hidden)) if preserve_rng_state else None
        return first(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [hidden], [grad] = ctx.saved_tensors, grads
        grad_hidden = torch.empty_like(hidden)
        chunks = zip(*(tensor.split(ctx.tokens, dim=1) for tensor in (hidden, grad, grad_hidden)), strict=True)
        with unpacked(ctx.mlp), _random_state(ctx.random_state, hidden.device.type):
            for chunk, grad_out, grad_in in chunks:
                leaf = chunk.detach().requires_grad_()
                with torch.enable_grad(), ctx.autocast:
                    out = ctx.whole(leaf)
                torch.autograd.backward(out, grad_out)
                assert leaf.grad is not None
                grad_in.copy_(leaf.grad)
        return grad_hidden, None, None, None, None, None


@contextlib.contextmanager
def _random_state(state: tuple[torch.Tensor, list[int], list[torch.Tensor]] | None, device_type: str) -> Iterator[None]:
    """Inside the block, draw what was drawn from `state` on (of the CPU and of devices); None leaves the generators alone."""
    if state is None:
        yield
        return
    on_cpu, devices, on_devices = state
    with torch.random.fork_rng(devices, device_type=device_type if devices else "cuda"):
        torch.set_rng_state(on_cpu)
        if devices:
            set_device_states(devices, on_devices, device_type=device_type)
        yield
