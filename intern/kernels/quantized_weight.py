"""A frozen 4-bit weight of bitsandbytes -> the dense weight that a pass multiplies with."""

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch


@dataclass
class QuantizedWeight:
    """A 4-bit weight as bitsandbytes stores it, with the scaling and rank of its adapter (rank 0: no adapter)."""

    packed: torch.Tensor  # a plain tensor: every use of bitsandbytes' class costs time in Python
    state: Any  # bitsandbytes' QuantState
    bias: torch.Tensor | None
    scaling: float
    rank: int
    dtype: torch.dtype  # of the computation
    unpacked: torch.Tensor | None = None  # (out, in), while dequantized weights are stored

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight, (out, in), in `dtype`."""
        if self.unpacked is not None and self.unpacked.dtype == dtype:
            return self.unpacked
        return _dequantized(self.packed, self.state).to(dtype)


def _dequantized(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return what bitsandbytes.functional.dequantize_4bit returns, (out, in).

    On a GPU the kernels are called directly: the torch operators around them cost more time in Python than a small weight costs the
    GPU, a fifth of a step on short rows.
    """
    if not packed.is_cuda:
        return bnb.functional.dequantize_4bit(packed, state)
    from bitsandbytes.backends.cuda import ops  # it has no kernels on machines without a GPU

    kernels: Any = ops
    absmax = state.absmax
    if state.nested:
        outer = state.state2
        absmax = torch.empty_like(state.absmax, dtype=torch.float32)
        kernels._dequantize_blockwise_impl(
            state.absmax, outer.absmax, outer.code, outer.blocksize, torch.float32, out=absmax
        )
        absmax += state.offset
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    kernels._dequantize_4bit_impl(packed, absmax, state.blocksize, state.quant_type, state.dtype, out=out)
    return out
