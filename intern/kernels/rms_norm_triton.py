"""RMSNorm with a frozen weight in Triton: one program per token holds all its elements, so each is read once."""

from typing import Any

import torch
import triton
import triton.language as tl

_ELEMENTS_PER_WARP = 512  # with up to 16 warps, bound by memory for 4,096 elements (docs/benchmarks.md)
_MOST_WARPS = 16


@triton.jit
def _forward(x_from, weight_from, out_to, scale_to, size, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_from + token * size + at, mask=inside, other=0.0)
    weight = tl.load(weight_from + at, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    tl.store(scale_to + token, scale)
    rounded = (wide * scale).to(x.dtype).to(tl.float32)  # as the models round
    tl.store(out_to + token * size + at, (rounded * weight).to(x.dtype), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def] # noqa: ANN202
    grad_at, other_from, x_from, weight_from, scale_from, size, HAS_OTHER: tl.constexpr, BLOCK: tl.constexpr,  # noqa: ANN001
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    grad = tl.load(grad_at + token * size + at, mask=inside, other=0.0)
    x = tl.load(x_from + token * size + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_from + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_from + token)
    over = grad.to(tl.float32) * weight
    found = scale * (over - x * (scale * scale * tl.sum(over * x) / size))
    if HAS_OTHER:
        found += tl.load(other_from + token * size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_at + token * size + at, found.to(grad.dtype), mask=inside)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the norm as `intern.kernels.rms_norm.normalized` does, for tensors on a GPU."""
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _forward[(scale.numel(),)](x, weight, out, scale, len(weight), eps, **_launch(len(weight)))
    return out, scale


def gradient(
    grad: torch.Tensor, other: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Compute the gradient as `intern.kernels.rms_norm.gradient` does, for tensors on a GPU; `grad` is overwritten and returned."""
    given = grad, other if other is None else other.contiguous(), x, weight, scale, len(weight)
    with torch.cuda.device_of(x):
        _backward[(scale.numel(),)](*given, HAS_OTHER=other is not None, **_launch(len(weight)))
    return grad


def _launch(size: int) -> dict[str, Any]:
    """Return the block size and the number of warps for `size` elements per token."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(_MOST_WARPS, max(1, block // _ELEMENTS_PER_WARP))}
