"""Attention that keeps packed rows apart on every card, registered with transformers under the name "isolated".

A packed batch is one long row of several short ones. A mask over it costs length x length memory and time; the kernels here get the
rows' boundaries instead (cu_seq_lens, made once a batch by TRL's collator) and compute only what lies inside a row:

- compute capability 8.0 and newer: torch's varlen_attn (flash attention), on Hopper cuDNN's kernel for long rows;
- older cards such as the T4 (7.5), where flash attention does not exist: the memory-efficient kernel's own form for packed rows;
- CPU: one causal call for each row.

Batches that are not packed (padded ones, generation) go through transformers' own SDPA attention with its masks.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from intern.offload import remembered, remembers

NAME = "isolated"
KNOWN = (NAME, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_LONG = 2048  # tokens of an average row from which Hopper's cuDNN kernel, a call for each row, beats flash attention (docs/benchmarks.md)
_FAULTY_CUDNN = 91500  # up to this version it reads beyond lengths that 128 does not divide (pytorch issue 169849); SDPA refuses it too
_CAUSAL_FROM_TOP_LEFT = 1  # custom_mask_type of aten::_efficient_attention_forward


def isolated_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention; inside each packed row where the batch is packed.

    Args:
        module: the attention layer (num_key_value_groups query heads share a key/value head).
        query: (batch, heads, length, head size); a packed batch has batch size 1.
        key, value: (batch, key/value heads, length, head size).
        attention_mask: what `isolated_mask` made; None for a packed batch.
        kwargs: cu_seq_lens_q (rows + 1 offsets, int32) and max_length_q of a packed batch.

    Returns:
        (batch, length, heads, head size), and no attention weights.
    """
    boundaries = kwargs.get("cu_seq_lens_q")
    groups = getattr(module, "num_key_value_groups", 1)
    if boundaries is None and attention_mask is None and not dropout and remembers() and _is_long_row(query, key):
        return _cudnn(query, key, value, [query.shape[2]], scaling), None
    if boundaries is None or attention_mask is not None:
        if attention_mask is None and query.is_cuda and not has_flash_attention(query):
            # Of the kernels that are left none shares key/value heads, and SDPA would take the one that builds the whole matrix.
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            module = torch.nn.Identity()
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # Under autocast, rotation makes these two float32 in a float32 model.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu":
        shared = repeat_kv(key, groups), repeat_kv(value, groups)
        return _row_by_row(query, *shared, boundaries.diff().tolist(), scaling), None
    longest = int(kwargs["max_length_q"])
    if has_flash_attention(query):
        if _is_for_cudnn(query, len(boundaries) - 1) and 1 not in (lengths := boundaries.diff().tolist()):
            return _cudnn(query, key, value, lengths, scaling), None
        return _flash(query, key, value, boundaries, longest, scaling, groups), None
    return _memory_efficient(
        query, repeat_kv(key, groups), repeat_kv(value, groups), boundaries, longest, scaling
    ), None


def has_flash_attention(query: torch.Tensor) -> bool:
    """Flash attention is for 16-bit numbers on compute capability 8.0 and newer."""
    return query.dtype.itemsize == 2 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _is_long_row(query: torch.Tensor, key: torch.Tensor) -> bool:
    """One whole row for which the kernel of long rows is the best."""
    is_whole = len(query) == 1 and query.shape[2] == key.shape[2] and query.dtype == key.dtype
    return is_whole and query.is_cuda and has_flash_attention(query) and _is_for_cudnn(query, 1)


def _is_for_cudnn(query: torch.Tensor, rows: int) -> bool:
    """Long rows on Hopper, with heads of the size for which its kernel was tried (docs/benchmarks.md), or smaller."""
    if torch.cuda.is_current_stream_capturing():
        return False  # a call for each row would be recorded for these rows alone
    _, _, length, head_size = query.shape
    return head_size <= 128 and not head_size % 8 and are_long(length, rows)


def are_long(tokens: int, rows: int) -> bool:
    """Whether so many tokens in so many rows are attended with the kernel of long rows, whose results can be kept."""
    if not torch.backends.cuda.cudnn_sdp_enabled() or (torch.backends.cudnn.version() or 0) <= _FAULTY_CUDNN:
        return False
    return tokens >= _LONG * rows and torch.cuda.get_device_capability()[0] == 9


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float | None
) -> torch.Tensor:
    return _each_row(lambda *row: _Cudnn.apply(*row, scaling), query, key, value, lengths)


class _Cudnn(torch.autograd.Function):
    """cuDNN's causal attention of one row; a layer that recomputes finds the result of its first run (intern/offload.py)."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        out, sums = remembered(lambda: _cudnn_forward(query, key, value, scaling))
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_cudnn_backward(ctx.scaling, grads[0], *ctx.saved_tensors), None


def _cudnn_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and for each query the logarithm of the sum that its weights are divided by."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, sums, *_ = attend(query, key, value, None, True, 0.0, True, scale=scaling)
    return out, sums


def _cudnn_backward(
    scaling: float | None,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # seed and offset of dropout
    lengths = query.shape[2], key.shape[2]
    found: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, sums, unused, unused, None, None, None, *lengths, 0.0, True, scale=scaling
    )
    return found


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float | None
) -> torch.Tensor:
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, scale=scaling)
    return _each_row(attend, query, key, value, lengths)


def _each_row(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    rows = [attend(*part) for part in parts]
    whole = rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
    return whole.transpose(1, 2).contiguous()


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    groups: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # its import registers CUDA kernels

    flat = [tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value)]
    attend: Any = varlen_attn
    out = attend(*flat, boundaries, boundaries, longest, longest, scale=scaling, window_size=(-1, 0), **_gqa(groups))
    return out.unsqueeze(0)


@functools.cache
def _gqa(groups: int) -> dict[str, Any]:
    """torch 2.11's varlen_attn shares key/value heads without being told, later ones want to be."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": groups > 1} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _memory_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    flat = [tensor.transpose(1, 2).contiguous() for tensor in (query, key, value)]
    out, *_ = torch.ops.aten._efficient_attention_forward(
        *flat,
        None,
        boundaries,
        boundaries,
        longest,
        longest,
        0.0,
        _CAUSAL_FROM_TOP_LEFT,
        query.requires_grad or key.requires_grad or value.requires_grad,
        scale=scaling,
    )
    return out


def isolated_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for a packed batch (transformers forbids the causal shortcut exactly there); SDPA's own for every other one."""
    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length and batch_size == 1:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def register() -> str:
    """Makes the implementation known to transformers; returns its name for model.attn_implementation."""
    AttentionInterface.register(NAME, isolated_attention)
    AttentionMaskInterface.register(NAME, isolated_mask)
    return NAME
