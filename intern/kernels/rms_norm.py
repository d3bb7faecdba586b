"""The norms before attention and MLP, with weights that are not trained: RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

What a norm reads is also added again after attention or MLP, so its gradient has two parts. Autograd would add them in a pass of its own
over all numbers; here the norm's backward kernel adds the other part to what it has in hand.
"""

import functools
import types
from typing import Any

import torch

from intern.kernels.decoder_layers import decoder_layers, only_adds_its_mlp

_NORMS = ("input_layernorm", "post_attention_layernorm")  # of a layer whose parts are known
_CLOSE = 2e-2  # numbers of about one, rounded to 16 bits now and then


def fuse_norms(model: torch.nn.Module) -> int:
    """Gives frozen RMSNorms of decoder layers this form; the number of norms that have it now.

    A norm that computes anything else (another offset, a bias), and one of a layer with parts that are not known, stays as it is.
    """
    count = 0
    for layer in decoder_layers(model):
        for name in _NORMS if only_adds_its_mlp(layer) else ():
            norm = getattr(layer, name)
            if _is_this(norm):
                forward = types.MethodType(_forward(layer, name), norm)
                setattr(norm, "forward", forward)  # noqa: B010 - mypy forbids the assignment
                count += 1
    return count


def _is_this(norm: Any) -> bool:
    """Whether it is frozen and, tried on this device, gives the values and gradients that this module gives."""
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
    return all(torch.allclose(mine, other, rtol=_CLOSE, atol=_CLOSE) for mine, other in pairs)


def _forward(layer: Any, name: str) -> Any:
    theirs = getattr(layer, name).forward  # Liger's, where it was put there

    def forward(norm: Any, x: torch.Tensor) -> Any:
        if not norm.training or x.dtype != norm.weight.dtype or not x.is_contiguous():
            return theirs(x)
        # Of a sum autograd keeps nothing, so it may be told that this one has changed: from then on both gradients come to one node.
        # A layer that runs again keeps its own input, though.
        is_sum = torch.is_grad_enabled() and x.grad_fn is not None and x.grad_fn.name() == "AddBackward0"
        is_kept = name == "input_layernorm" and layer.gradient_checkpointing
        given = x, norm.weight, norm.variance_epsilon
        return _SumAndNorm.apply(*given)[1] if is_sum and not is_kept else _Norm.apply(*given)

    return forward


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = normalized(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient(grads[0], None, *ctx.saved_tensors), None, None


class _SumAndNorm(torch.autograd.Function):
    """x, unchanged, and its norm."""

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
    """x (..., size) over the root of its mean square, times weight (size); and one over that root, float32 (..., 1)."""
    if x.is_cuda and (kernels := _kernels()) is not None:
        return kernels.normalized(x, weight, eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def gradient(
    grad: torch.Tensor, other: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """That of x: what comes through `normalized` from `grad`, which may be overwritten, and `other`, what comes to x past it."""
    grad = grad.contiguous()
    if x.is_cuda and (kernels := _kernels()) is not None:
        return kernels.gradient(grad, other, x, weight, scale)
    wide, over = x.float(), grad.float() * weight.float()
    found = scale * (over - wide * (scale.square() * (over * wide).mean(-1, keepdim=True)))
    return (found if other is None else found.add_(other)).to(x.dtype)


@functools.cache
def _kernels() -> Any:
    """Triton's; None where it is not installed."""
    try:
        from intern.kernels import rms_norm_triton
    except ImportError:
        return None
    return rms_norm_triton
