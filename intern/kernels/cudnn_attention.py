"""Attention over packed rows with cuDNN's kernels on Hopper: what flash attention computes, in as little as six tenths of the time.

torch's own operator for these kernels cannot be used: it is slow, and wrong for packed rows with shared key/value heads
(docs/benchmarks.md).
"""

import collections
import weakref
from typing import Any

import torch

from intern.kernels.cudnn_graphs import AttentionSizes, backward_graph, forward_graph, has_cudnn_frontend, is_built
from intern.kernels.recompute import save_for_recompute

_LARGEST_HEAD = 128  # head size up to which the backward kernel was tested
_BUILD_S = 3.0  # seconds that the first builds take in a process (docs/benchmarks.md)
# Seconds saved over flash attention, forward and backward, in a layer whose queries have 4,096 elements per token: for each token, and
# for each token and token of its row.
_SAVED_S_PER_TOKEN, _SAVED_S_PER_PAIR, _MEASURED_WIDTH = 25e-9, 32e-12, 4096


def is_possible(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether cuDNN may be used for these heads, (..., head size), on this GPU, as installed and allowed."""
    size = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype
        and size <= _LARGEST_HEAD
        and size % 8 == 0
        and not torch.cuda.is_current_stream_capturing()  # a CUDA graph must not contain the sizes of one batch
        and has_cudnn_frontend()
    )


def pays(tokens: int, rows: int, layers: int, width: int) -> bool:
    """Whether cuDNN saves more time in a run than building its kernels takes.

    Args:
        tokens, rows: of all batches together.
        layers: decoder layers.
        width: elements of all queries of a token.
    """
    saved = _SAVED_S_PER_TOKEN + _SAVED_S_PER_PAIR * tokens / rows
    return tokens * layers * width / _MEASURED_WIDTH * saved > _BUILD_S


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor | None:
    """Compute causal attention inside each row.

    In a layer that recomputes, the result of its first forward is reused (`save_for_recompute`).

    Args:
        query: (tokens, heads, head size), all rows one after the other.
        key, value: (tokens, key/value heads, head size).
        boundaries: (rows + 1) offsets of the rows, int32, on the GPU.
        longest: tokens of the longest row.
        scaling: of query-key products; 1 / sqrt(head size) if None.

    Returns:
        (tokens, heads, head size), or None if cuDNN has no kernel for these sizes.
    """
    sizes = AttentionSizes.of(query, key, len(boundaries) - 1, longest, scaling)
    if not is_built(sizes):
        return None
    out: torch.Tensor = _Attention.apply(query.contiguous(), key.contiguous(), value.contiguous(), boundaries, sizes)
    return out


class _Attention(torch.autograd.Function):
    """Causal attention inside each row; shapes as in `attend`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: torch.Tensor,
        sizes: AttentionSizes,
    ) -> torch.Tensor:
        out, sums = save_for_recompute(lambda: _forward(query, key, value, boundaries, sizes))
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.boundaries, ctx.sizes = boundaries, sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        given = {"query": query, "key": key, "value": value, "out": out, "grad": grads[0].contiguous(), "sums": sums}
        results = dict(zip(("grad_query", "grad_key", "grad_value"), found, strict=True))
        part = ctx.sizes.backward_turn()
        graph, offsets = backward_graph(part), _offsets(ctx.boundaries, part)
        for turn in range(ctx.sizes.key_heads // part.key_heads):
            # cuDNN addresses everything that strides span, so the heads of a turn must be contiguous.
            parts = {name: _heads(name, tensor, turn, part).contiguous() for name, tensor in (given | results).items()}
            graph.run(parts | offsets)
            for name, tensor in results.items():
                if (whole := _heads(name, tensor, turn, part)).data_ptr() != parts[name].data_ptr():
                    whole.copy_(parts[name])
        return *found, None, None


def _heads(name: str, tensor: torch.Tensor, turn: int, part: AttentionSizes) -> torch.Tensor:
    """Return the heads (dimension 1) of a tensor that a turn of the backward pass computes."""
    count = part.key_heads if name.endswith(("key", "value")) else part.heads
    return tensor.narrow(1, turn * count, count)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, sizes: AttentionSizes
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(query)
    sums = torch.empty(sizes.statistics(len(query)), dtype=torch.float32, device=query.device)
    forward_graph(sizes).run(
        {"query": query, "key": key, "value": value, "out": out, "sums": sums} | _offsets(boundaries, sizes)
    )
    return out, sums


_Offsets = tuple["weakref.ref[torch.Tensor]", AttentionSizes, dict[str, torch.Tensor]]
_last_offsets: collections.deque[_Offsets] = collections.deque(maxlen=2)  # of a pass: forward and backward kernels


def _offsets(boundaries: torch.Tensor, sizes: AttentionSizes) -> dict[str, torch.Tensor]:
    """Return the rows' lengths (rows) int32, and the offsets (rows + 1) int64 at which each begins in queries, keys and statistics.

    Rows that only fill up the kernel's number have no tokens. All layers of a pass receive the same boundaries, so the offsets are
    computed once for its forward and its backward kernels.
    """
    for last_boundaries, last_sizes, offsets in _last_offsets:
        if last_boundaries() is boundaries and last_sizes == sizes:
            return offsets
    ends = boundaries[-1:].expand(sizes.rows + 1 - len(boundaries))
    filled = torch.cat([boundaries, ends])
    begins = filled.long()
    offsets = {
        "lengths": filled.diff(),
        "query_begins": begins * sizes.heads * sizes.head_size,
        "key_begins": begins * sizes.key_heads * sizes.head_size,
        "sum_begins": begins * sizes.heads,
    }
    _last_offsets.append((weakref.ref(boundaries), sizes, offsets))
    return offsets


def forget_offsets() -> None:
    """Free the GPU memory of the offsets of the last batch."""
    _last_offsets.clear()
