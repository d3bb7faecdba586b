"""A model's configuration -> the attention implementation that it can be trained and asked with, found out without its weights."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    masking_utils,
)

from intern.kernels.isolated_attention import NAME as ISOLATED

_PROBE = "intern_probe"  # the name under which `_probe` is known to transformers
# What isolated attention (intern/kernels/isolated_attention.py) is passed and uses or need not use. Anything else that is not None
# changes the result: capped scores (softcap), attention sinks (s_aux), biases.
_UNDERSTOOD = {
    "dropout",
    "scaling",
    "is_causal",
    "sliding_window",
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}
# Layer types that carry a state along a row, from one packed row into the next.
_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent", "rwkv", "ssm")


@dataclass(frozen=True)
class Attention:
    """How a model attends.

    Attributes:
        name: the value for `attn_implementation`; None for the library's own choice.
        packs: whether rows that share a batch can be kept apart.
        instead: why it is not what was asked for; None if it is.
    """

    name: str | None
    packs: bool
    instead: str | None = None


@functools.lru_cache(maxsize=8)
def _observed(serialized: "_Config") -> "_Observed":
    return _observe(serialized.config)


class _Config:
    """A configuration as a key of a cache: equal if its content is."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self._content = config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and other._content == self._content

    def __hash__(self) -> int:
        return hash(self._content)


@dataclass(frozen=True)
class _Observed:
    """What the attention layers of a model were passed in one packed forward pass on the meta device."""

    is_interchangeable: bool  # attention goes through transformers' interface
    gets_boundaries: bool  # every call got the rows' boundaries
    extras: tuple[str, ...]  # arguments beyond those of ordinary attention
    makes_masks: bool  # positions reach the function of transformers that finds packed rows, for the mask of SDPA or eager attention
    is_recurrent: bool


def choose_attention(config: PreTrainedConfig, wanted: str | None, longest: int | None = None) -> Attention:
    """The attention for a model.

    Isolated attention is taken if the model passes it everything that it needs and nothing that it ignores; otherwise SDPA with a mask
    that transformers makes, or eager attention, which alone knows capped scores and sinks.

    Args:
        config: the model's configuration.
        wanted: `model.attn_implementation`.
        longest: tokens of the longest training row, None for a model that only answers. Isolated attention has no sliding window, so
            rows must not be longer than the model's.

    Returns:
        The choice. It never raises: a model that cannot be built without weights keeps what was asked for.
    """
    seen = _observed(_Config(config))
    packs = seen.makes_masks and not seen.is_recurrent
    if wanted != ISOLATED:
        return Attention(wanted, packs)
    kind = config.model_type
    if seen.extras:
        return Attention("eager", packs, f"{kind} attends with {', '.join(seen.extras)}")
    if seen.is_recurrent:
        return Attention(ISOLATED, False)
    if not seen.is_interchangeable:
        return Attention(None, packs, f"{kind} has an attention of its own")
    if not seen.gets_boundaries:
        return Attention("sdpa", packs, f"{kind} does not pass its attention where rows begin")
    text: Any = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if window and longest is not None and window < longest:
        return Attention("sdpa", packs, f"rows of {longest:,} tokens are longer than {kind}'s window of {window:,}")
    return Attention(ISOLATED, True)


def _observe(config: PreTrainedConfig) -> _Observed:
    text: Any = config.get_text_config()
    kinds = [str(kind) for kind in getattr(text, "layer_types", None) or ()]
    is_recurrent = any(word in kind for kind in kinds for word in _RECURRENT)
    with _probing() as notes:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(  # which notes the implementation in the configuration
                    copy.deepcopy(config), trust_remote_code=False, attn_implementation=_PROBE, dtype=torch.bfloat16
                ).train()
        except (KeyError, ValueError, ImportError):  # classes of its own for each implementation
            return _Observed(False, False, (), False, is_recurrent)
        boundaries = torch.zeros(3, dtype=torch.int32, device="meta")
        rows = torch.zeros(1, 8, dtype=torch.long, device="meta")
        positions = {"position_ids": rows} if "position_ids" in inspect.signature(model.forward).parameters else {}
        packed = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 4, "max_length_k": 4}
        # A model that reads a tensor's values cannot run on the meta device: what was noted until then counts.
        with (
            contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError),
            torch.device("meta"),
        ):
            model(input_ids=rows, **positions, **packed, use_cache=False)
    extras = {name for call in notes.calls for name, value in call.items() if value is not None} - _UNDERSTOOD
    gets_boundaries = bool(notes.calls) and all(call.get("cu_seq_lens_q") is not None for call in notes.calls)
    return _Observed(bool(notes.calls), gets_boundaries, tuple(sorted(extras)), notes.found_rows, is_recurrent)


class _Notes:
    """What a probed model passes on."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []  # the named arguments of each attention
        self.found_rows = False  # whether positions reached the search for packed rows

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        """query: (batch, heads, tokens, head size); returns (batch, tokens, heads, head size) and no weights."""
        self.calls.append(more)
        return value.new_empty(len(query), query.shape[2], query.shape[1], value.shape[-1]), None

    def find_rows(self, position_ids: torch.Tensor) -> None:
        """In place of transformers' search, which reads values."""
        self.found_rows = True


@contextlib.contextmanager
def _probing() -> Iterator[_Notes]:
    notes, find = _Notes(), masking_utils.find_packed_sequence_indices
    AttentionInterface.register(_PROBE, notes.attend)
    AttentionMaskInterface.register(_PROBE, lambda *arguments, **more: None)
    setattr(masking_utils, "find_packed_sequence_indices", notes.find_rows)  # noqa: B010 - mypy forbids the assignment
    try:
        yield notes
    finally:
        setattr(masking_utils, "find_packed_sequence_indices", find)  # noqa: B010
        AttentionInterface._global_mapping.pop(_PROBE, None)
        AttentionMaskInterface._global_mapping.pop(_PROBE, None)
