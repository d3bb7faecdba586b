"""Attention that keeps packed rows apart on every card, registered with transformers under the name "isolated".

A packed batch is one long row of several short ones. A mask over it costs length x length memory and time; the kernels here get the
rows' boundaries instead (cu_seq_lens, made once a batch by TRL's collator) and compute only what lies inside a row:

- compute capability 8.0 and newer: torch's varlen_attn (flash attention), on Hopper cuDNN's kernel (intern/kernels/cudnn_attention.py) in runs long
  enough to be worth its build;
- older cards such as the T4 (7.5), where flash attention does not exist: the memory-efficient kernel's own form for packed rows;
- CPU: one causal call for each row.

Batches that are not packed (padded ones, generation) go through transformers' own SDPA attention with its masks.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from intern.kernels import cudnn_attention

NAME = "isolated"
_UNMASKED = "isolated_unmasked"  # the same for batches that are known to need no mask
KNOWN = (NAME, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_CAUSAL_FROM_TOP_LEFT = 1  # custom_mask_type of aten::_efficient_attention_forward

_takes_cudnn = False  # where it can be taken


def take_cudnn(wanted: bool) -> None:
    """Whether packed rows are attended with cuDNN's kernel from now on, where there is one (`cudnn_attention.pays`)."""
    global _takes_cudnn
    _takes_cudnn = wanted


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
    boundaries, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    groups = getattr(module, "num_key_value_groups", 1)
    if boundaries is None and attention_mask is None and _takes_cudnn and module.training and _is_one_row(query, key):
        boundaries, longest = _whole(query.shape[2], query.device), query.shape[2]
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
    longest = int(longest or query.shape[2])
    if has_flash_attention(query):
        flat = [tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value)]
        out = None
        if _takes_cudnn and cudnn_attention.is_possible(query, key):
            out = cudnn_attention.attend(flat[0], flat[1], flat[2], boundaries, longest, scaling)
        if out is None:
            out = _flash(flat, boundaries, longest, scaling, groups)
        return out.unsqueeze(0), None
    return _memory_efficient(
        query, repeat_kv(key, groups), repeat_kv(value, groups), boundaries, longest, scaling
    ), None


def _is_one_row(query: torch.Tensor, key: torch.Tensor) -> bool:
    return len(query) == 1 and query.shape[2] == key.shape[2] and query.is_cuda and has_flash_attention(query)


@functools.lru_cache(maxsize=1)
def _whole(length: int, device: torch.device) -> torch.Tensor:
    """The boundaries of one row; all layers of a pass are given the same ones."""
    return torch.arange(2, dtype=torch.int32, device=device) * length


def has_flash_attention(query: torch.Tensor) -> bool:
    """Flash attention is for 16-bit numbers on compute capability 8.0 and newer."""
    return query.dtype.itemsize == 2 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float | None
) -> torch.Tensor:
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, scale=scaling)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    rows = [attend(*part) for part in parts]
    whole = rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
    return whole.transpose(1, 2).contiguous()


def _flash(
    flat: list[torch.Tensor], boundaries: torch.Tensor, longest: int, scaling: float | None, groups: int
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # its import registers CUDA kernels

    attend: Any = varlen_attn
    out: torch.Tensor = attend(
        *flat, boundaries, boundaries, longest, longest, scale=scaling, window_size=(-1, 0), **_gqa(groups)
    )
    return out


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
    AttentionInterface.register(_UNMASKED, isolated_attention)
    AttentionMaskInterface.register(NAME, isolated_mask)
    return NAME


@contextlib.contextmanager
def no_mask(model: torch.nn.Module, batch: dict[str, Any]) -> Iterator[None]:
    """While a packed batch goes through the model, transformers makes no mask: to find out that it needs none, it waits for the GPU."""
    whole: Any = model.config
    config = whole.get_text_config()
    is_known = config._attn_implementation == NAME and "cu_seq_lens_q" in batch and "attention_mask" not in batch
    if is_known:
        config._attn_implementation = _UNMASKED
    try:
        yield
    finally:
        if is_known:
            config._attn_implementation = NAME
