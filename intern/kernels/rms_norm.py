"""Frozen RMSNorms before attention and MLP (Zhang and Sennrich 2019, arXiv:1910.07467), with one backward kernel for both gradients.

A norm's input is also added again after attention or MLP, so its gradient has two parts. Autograd would add them in a separate pass over
all elements; here the norm's backward kernel adds the other part to the values that it holds.
"""

import functools
import types
from typing import Any

import torch

from intern.kernels.decoder_layers import decoder_layers, only_adds_its_mlp
from intern.kernels.patches import Patches

_NORMS = ("input_layernorm", "post_attention_layernorm")  # of a layer without unknown parts
_TOLERANCE = 2e-2  # for values of about 1 that are rounded to 16 bits a few times


def applies(model: torch.nn.Module) -> bool:
    """Whether some decoder layer has no unknown parts; `fuse_norms` then looks at each of its norms."""
    return any(map(only_adds_its_mlp, decoder_layers(model)))


def fuse_norms(model: torch.nn.Module) -> Patches:
    """Replace the forward pass of frozen RMSNorms in decoder layers.

    Must run after Liger has replaced it: the forward pass that is there by then serves evaluation and other dtypes.
    A norm that computes anything else (another offset, a bias) is left alone, and so are those of layers with unknown parts.

    Returns:
        The replaced forward passes, one per norm.
    """
    patches = Patches()
    for layer in decoder_layers(model):
        for name in _NORMS if only_adds_its_mlp(layer) else ():
            norm = getattr(layer, name, None)  # Cohere's layers have one norm for attention and MLP
            if norm is not None and _is_frozen_rms_norm(norm):
                patches.set(norm, "forward", types.MethodType(_forward(layer, name), norm))
    return patches


def _is_frozen_rms_norm(norm: Any) -> bool:
    """Whether the norm is frozen and, tried on its device, has the values and gradients of this module."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or eps is None or weight.requires_grad or not weight.is_floating_point():
        return False
    x = torch.linspace(-2, 3, len(weight), device=weight.device).to(weight.dtype)[None].requires_grad_()
    with torch.enable_grad():
        theirs = norm(x)
        [their_gradient] = torch.autograd.grad(theirs, x, x.detach().cos())
    x = x.detach()
    ours, scale = normalized(x, weight, eps)
    pairs = (ours, theirs), (gradient(x.cos(), None, x, weight, scale), their_gradient)
    return all(torch.allclose(mine, other, rtol=_TOLERANCE, atol=_TOLERANCE) for mine, other in pairs)


def _forward(layer: Any, name: str) -> Any:
    theirs = getattr(layer, name).forward  # Liger's if it is in use

    def forward(norm: Any, x: torch.Tensor) -> Any:  # (batch, tokens, hidden)
        if not norm.training or x.dtype != norm.weight.dtype or not x.is_contiguous():
            return theirs(x)
        # Autograd saves nothing of a sum, so the sum may be marked as modified: from then on both gradients reach one node.
        # A checkpointed layer saves its own input, though.
        is_sum = torch.is_grad_enabled() and x.grad_fn is not None and x.grad_fn.name() == "AddBackward0"
        is_saved = name == "input_layernorm" and layer.gradient_checkpointing
        args = x, norm.weight, norm.variance_epsilon
        return _SumAndNorm.apply(*args)[1] if is_sum and not is_saved else _Norm.apply(*args)

    return forward


class _Norm(torch.autograd.Function):
    """x (..., hidden) -> its norm, of the same shape."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = normalized(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient(grads[0], None, *ctx.saved_tensors), None, None


class _SumAndNorm(torch.autograd.Function):
    """x (..., hidden) -> x itself, unchanged, and its norm."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, scale = normalized(x, weight, eps)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, scale)
        return x, out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient(grads[1], grads[0], *ctx.saved_tensors), None, None


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: (..., hidden).
        weight: (hidden).
        eps: added to the mean square.

    Returns:
        The norm, like x, and 1 / sqrt(mean(x^2) + eps), (..., 1) float32.
    """
    if x.is_cuda and (kernels := _triton_kernels()) is not None:
        return kernels.normalized(x, weight, eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def gradient(
    grad: torch.Tensor, other: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Compute the gradient of x.

    Args:
        grad: gradient of the norm, (..., hidden); it may be overwritten.
        other: gradient that reaches x past the norm, (..., hidden), or None.
        x, weight, scale: as in `normalized`.

    Returns:
        (..., hidden), in the dtype of x.
    """
    grad = grad.contiguous()
    if x.is_cuda and (kernels := _triton_kernels()) is not None:
        return kernels.gradient(grad, other, x, weight, scale)
    wide, weighted = x.float(), grad.float() * weight.float()
    found = scale * (weighted - wide * (scale.square() * (weighted * wide).mean(-1, keepdim=True)))
    return (found if other is None else found.add_(other)).to(x.dtype)


@functools.cache
def _triton_kernels() -> Any:
    """Return the module of Triton kernels, or None if Triton is not installed."""
    try:
        from intern.kernels import rms_norm_triton
    except ImportError:
        return None
    return rms_norm_triton
