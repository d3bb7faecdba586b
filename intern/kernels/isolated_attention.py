"""Attention that keeps packed rows apart on every GPU, registered with transformers under the name "isolated".

A packed batch is one long row made of several short ones. A mask over it costs tokens x tokens memory and time; the kernels here receive
the rows' boundaries instead (cu_seq_lens, computed once per batch by TRL's collator) and compute only what is inside a row:

- compute capability 8.0 and newer: torch's varlen_attn (flash attention); on Hopper, in runs long enough to be worth its build, cuDNN's
  kernel (cudnn_attention.py);
- older GPUs such as the T4 (7.5), which have no flash attention: the memory-efficient kernel's form for packed rows;
- CPU: one causal call per row.

Batches that are not packed (padded ones, generation) use transformers' own SDPA attention with its masks.

INTERN_DISABLE_FLASH_ATTENTION=1 in the environment makes a newer GPU use the kernels of older ones, to imitate a T4
(scripts/imitate_t4/ and scripts/bench_train.py --t4).
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from intern.kernels import cudnn_attention

NAME = "isolated"
_UNMASKED = "isolated_unmasked"  # the same, for batches that are known to need no mask
KNOWN = (NAME, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
DISABLE_FLASH_ATTENTION = "INTERN_DISABLE_FLASH_ATTENTION"  # environment variable; read in `has_flash_attention` only
_CAUSAL_FROM_TOP_LEFT = 1  # custom_mask_type of aten::_efficient_attention_forward

# Of the process, not of a context: recomputation runs forward passes in threads of autograd, which see no other thread's context.
_uses_cudnn = False


def use_cudnn(wanted: bool) -> None:
    """Choose whether packed rows use cuDNN's kernel from now on, if there is one (`cudnn_attention.pays`).

    Training must switch it off again at its end: False also frees what the kernels have kept of the last batch.
    """
    global _uses_cudnn
    _uses_cudnn = wanted
    if not wanted:
        cudnn_attention.forget_offsets()


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
    """Compute causal attention, inside each row if the batch is packed.

    Args:
        module: the attention layer; num_key_value_groups query heads share a key/value head.
        query: (batch, heads, tokens, head size); a packed batch has batch size 1.
        key, value: (batch, key/value heads, tokens, head size).
        attention_mask: from `isolated_mask`; None for a packed batch.
        dropout: probability, for batches that are not packed.
        scaling: of query-key products; 1 / sqrt(head size) if None.
        kwargs: cu_seq_lens_q, (rows + 1) offsets int32, and max_length_q, tokens of the longest row, of a packed batch.

    Returns:
        (batch, tokens, heads, head size), and None instead of attention weights.
    """
    boundaries, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    groups = getattr(module, "num_key_value_groups", 1)
    if boundaries is None and attention_mask is None and _uses_cudnn and module.training and _is_one_row(query, key):
        boundaries, longest = _one_row(query.shape[2], query.device), query.shape[2]
    if boundaries is None or attention_mask is not None:
        if attention_mask is None and query.is_cuda and not has_flash_attention(query):
            # None of the remaining kernels shares key/value heads, and SDPA would use the one that builds the whole matrix.
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            module = torch.nn.Identity()
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # Under autocast, rotary embeddings make these two float32 in a float32 model.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu":
        shared = repeat_kv(key, groups), repeat_kv(value, groups)
        return _row_by_row(query, *shared, boundaries.diff().tolist(), scaling), None
    longest = int(longest or query.shape[2])
    if has_flash_attention(query):
        flat = [tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value)]
        out = None
        if _uses_cudnn and cudnn_attention.is_possible(query, key):
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
def _one_row(length: int, device: torch.device) -> torch.Tensor:
    """Return the boundaries (2) int32 of one row; all layers of a pass receive the same tensor."""
    return torch.arange(2, dtype=torch.int32, device=device) * length


def has_flash_attention(query: torch.Tensor) -> bool:
    """Whether flash attention may be used for this tensor on a GPU: 16 bits, compute capability 8.0 or newer, not disabled."""
    return (
        query.dtype.itemsize == 2
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and os.environ.get(DISABLE_FLASH_ATTENTION) != "1"
    )


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
    """Return the argument with which varlen_attn shares key/value heads; torch 2.11 does so without one."""
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
    """Return None for a packed batch and SDPA's mask for every other one.

    transformers disallows the causal shortcut (`allow_is_causal_skip`) exactly for packed batches.
    """
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
    """Register the implementation with transformers and return its name for model.attn_implementation."""
    AttentionInterface.register(NAME, isolated_attention)
    AttentionInterface.register(_UNMASKED, isolated_attention)
    AttentionMaskInterface.register(NAME, isolated_mask)
    return NAME


@contextlib.contextmanager
def no_mask(model: torch.nn.Module, batch: dict[str, Any]) -> Iterator[None]:
    """While a packed batch goes through the model, keep transformers from looking for a mask, which would wait for the GPU."""
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
