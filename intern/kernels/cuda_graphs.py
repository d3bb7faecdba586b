"""Decoder layers as CUDA graphs: their kernels are recorded once per input shape and then launched together.

On short rows Python takes longer to launch a layer's kernels than the GPU takes to run them. One graph holds the forward pass of all
layers but the last, another one their backward pass: two launches per step. A graph has one shape, so rows are padded to one of a few
lengths; causal attention never reads the padding after a row, and its gradient is zero. The last layer, whose MLP computes a changing
number of positions, the embeddings and the LM head are not recorded.
"""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from intern.kernels.graph_recorder import CudaGraphRecorder, Record, Work
from intern.kernels.patches import Patches

_MOST_LENGTHS = 8  # padded lengths, evenly spread up to that of the longest batch
_ALIGNED = 64  # tokens; matrix products are fastest for multiples of it
_FEWEST_ROWS = 8  # the number of packed rows is rounded up to 8, 16, 32 ...


class LayerGraphs:
    """Replaces the forward passes of all layers but the last while one row, or one pack of rows, is trained.

    The layers must be of one kind, and must not draw random numbers: a replay would repeat the recorded draw.

    Args:
        layers: a model's decoder layers, in their order.
        most_tokens: tokens of the largest batch.
        longest_row: tokens of the longest row inside a batch.
        record: records a forward and a backward pass; CUDA graphs by default.
    """

    def __init__(
        self,
        layers: Sequence[GradientCheckpointingLayer],
        most_tokens: int,
        longest_row: int,
        record: Record | None = None,
    ) -> None:
        self.layers = list(layers)[:-1]
        self.longest_row = longest_row
        self._step = math.ceil(most_tokens / _MOST_LENGTHS / _ALIGNED) * _ALIGNED
        self._most = math.ceil(most_tokens / self._step) * self._step
        self._record = record or CudaGraphRecorder()
        self._recordings: dict[GraphKey, _Recording] = {}
        self._sums = _GradientSums([one for layer in self.layers for one in layer.parameters() if one.requires_grad])
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd track the first layer's output
        # Input, output and gradient of the layers, (1, most tokens, hidden) each: all recordings use a part of them.
        self._rows: list[torch.Tensor] = []
        self._out: torch.Tensor | None = None
        self._patches = Patches()
        for index, layer in enumerate(self.layers):
            self._patches.set(layer, "forward", self._forward(index, layer))

    def undo(self) -> None:
        """Restore the layers' own forward passes and free the graphs' memory."""
        self._patches.undo()
        self._recordings.clear()
        self._rows = []

    def _forward(self, index: int, layer: GradientCheckpointingLayer) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # (1, tokens, hidden)
            if hidden is self._out:  # the first layer has computed for all of them
                self._out = None if index == len(self.layers) - 1 else hidden
                return hidden
            if index or args or not self._can_replay(layer, hidden, kwargs):
                return _plain_forward(layer, hidden, *args, **kwargs)
            out: torch.Tensor = _Replayed.apply(self._anchor, hidden, self._recording(hidden, kwargs), kwargs)
            self._out = out if len(self.layers) > 1 else None
            return out

        return forward

    def _can_replay(self, layer: torch.nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        length = hidden.shape[1]
        return (
            layer.training
            and torch.is_grad_enabled()
            and hidden.is_leaf  # nothing before the layers needs a gradient
            and len(hidden) == 1
            and kwargs.get("attention_mask") is None
            and kwargs.get("past_key_values") is None
            and length <= self._most
            and (kwargs.get("max_length_q") or length) <= self.longest_row
            and all(_is_known(name, value, length) for name, value in kwargs.items())
            and not any(recording.is_open() for recording in self._recordings.values())
        )

    def _recording(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> "_Recording":
        """Return the recording that these arguments fit into, and make it if it is new."""
        length = math.ceil(hidden.shape[1] / self._step) * self._step
        boundaries = kwargs.get("cu_seq_lens_q")
        rows = 0 if boundaries is None else max(_FEWEST_ROWS, 1 << (len(boundaries) - 1).bit_length())
        key = GraphKey(length, rows, hidden.dtype, tuple(layer.gradient_checkpointing for layer in self.layers))
        if key not in self._recordings:
            if not self._rows:
                self._rows = [hidden.new_zeros(1, self._most, hidden.shape[2]) for _ in range(3)]
            tensors = {name: _buffer(name, value, length, rows) for name, value in kwargs.items() if _is_tensors(value)}
            others = {name: value for name, value in kwargs.items() if name not in tensors}
            longest = min(length, max(self.longest_row, self._step))  # the padding is a row too
            others |= {name: longest for name in others if name.startswith("max_length_")}
            run = functools.partial(_run_layers, self.layers, others)
            recording = _Recording(run, [tensor[:, :length] for tensor in self._rows], tensors, self._sums)
            recording.load(hidden, kwargs)
            recording.record(self._record)
            self._recordings[key] = recording
        return self._recordings[key]


class GraphKey(NamedTuple):
    """What distinguishes one recording from another."""

    length: int  # tokens, padding included
    rows: int  # of a pack, rounded up; 0 if the batch is not packed
    dtype: torch.dtype
    checkpointed: tuple[bool, ...]  # for each layer


def _plain_forward(layer: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, hidden, *args, **kwargs)


def _run_layers(
    layers: Sequence[GradientCheckpointingLayer],
    others: dict[str, Any],
    hidden: torch.Tensor,
    tensors: dict[str, Any],
) -> torch.Tensor:
    """Run the layers one after the other: hidden (1, tokens, hidden) -> the same."""
    device = hidden.device.type
    dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    # Reading the random state is no kernel and cannot be recorded.
    recordable: Any = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    usual = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    try:
        # A cast that autocast has cached before would freeze the weights of that time in the graph.
        with torch.autocast(device, dtype, is_on, cache_enabled=False):
            for layer in layers:
                setattr(layer, "_gradient_checkpointing_func", recordable)  # noqa: B010
                hidden = _plain_forward(layer, hidden, **others, **tensors)
                if not isinstance(hidden, torch.Tensor):
                    raise RuntimeError(f"{type(layer).__name__} returns more than hidden states")
    finally:
        for layer, its in zip(layers, usual, strict=True):
            setattr(layer, "_gradient_checkpointing_func", its)  # noqa: B010
    return hidden


def _is_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple) and isinstance(value[0], torch.Tensor))


def _is_known(name: str, value: Any, length: int) -> bool:
    """Whether an argument is no tensor, or one with a dimension of tokens, or the boundaries of rows."""
    if isinstance(value, tuple):
        return all(_is_known(name, one, length) for one in value)
    if not isinstance(value, torch.Tensor) or name.startswith("cu_seq_lens"):
        return True
    return value.ndim > 1 and value.shape[1] == length


def _buffer(name: str, value: Any, length: int, rows: int) -> Any:
    """Return memory for a tensor whose dimension 1 is tokens, or for the boundaries of rows (rows + 1)."""
    if isinstance(value, tuple):
        return tuple(_buffer(name, one, length, rows) for one in value)
    if name.startswith("cu_seq_lens"):
        return value.new_full((rows + 1,), length)
    return value.new_zeros(value.shape[0], length, *value.shape[2:])


def _fill(buffer: Any, value: Any) -> None:
    """Copy a tensor into its buffer.

    The rest becomes zero, or, after the boundaries of rows, one row for the padding and then empty rows.
    """
    if isinstance(value, tuple):
        for one_buffer, one in zip(buffer, value, strict=True):
            _fill(one_buffer, one)
        return
    dimension = 0 if value.ndim == 1 else 1
    used, size = value.shape[dimension], buffer.shape[dimension]
    buffer.narrow(dimension, 0, used).copy_(value)
    if used < size and dimension:
        buffer.narrow(dimension, used, size - used).zero_()
    elif used < size:
        buffer[used:] = buffer[-1].clone()


class _GradientSums:
    """Gradients of the trained parameters at fixed addresses: a recorded backward pass adds to them."""

    def __init__(self, trained: Sequence[torch.nn.Parameter]) -> None:
        self.trained = list(trained)
        self._sums = [torch.zeros_like(one) for one in self.trained]

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add the gradients of one backward pass."""
        torch._foreach_add_(self._sums, list(gradients))

    def attach(self) -> None:
        """Make the sums the parameters' gradients, starting from what those are now."""
        pairs = list(zip(self.trained, self._sums, strict=True))
        if empty := [total for parameter, total in pairs if parameter.grad is None]:
            torch._foreach_zero_(empty)
        for parameter, total in pairs:
            if parameter.grad is not None and parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total


class _Recording:
    """The graphs of one shape, and the memory that they read and write."""

    def __init__(
        self,
        run: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor],
        rows: Sequence[torch.Tensor],
        tensors: dict[str, Any],
        sums: _GradientSums,
    ) -> None:
        self.hidden, self.out, self.gradient = rows
        self.tensors = tensors
        self.sums = sums
        self._run = run
        self._end: torch.Tensor | None = None
        self._pending: weakref.ref[_PendingBackward] | None = None
        self.forward: Work = self._pass_forward
        self.backward: Work = self._pass_backward

    def load(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Copy a batch to where the passes read it."""
        _fill(self.hidden, hidden)
        for name, buffer in self.tensors.items():
            _fill(buffer, kwargs[name])

    def record(self, record: Record) -> None:
        """Replay the passes from now on.

        Recording may run them, so a batch must be loaded; its gradient counts as zero.
        """
        self.gradient.zero_()
        self.forward, self.backward = record(self._pass_forward, self._pass_backward)

    def is_open(self) -> bool:
        """Whether a backward pass is still to come: what its forward pass left in memory must stay."""
        return self._pending is not None and self._pending() is not None

    def open(self) -> "_PendingBackward":
        """Keep the recording open for as long as the caller holds the result."""
        pending = _PendingBackward()
        self._pending = weakref.ref(pending)
        return pending

    def _pass_forward(self) -> None:
        with torch.enable_grad():
            self._end = self._run(self.hidden, self.tensors)
        self.out.copy_(self._end.detach())

    def _pass_backward(self) -> None:
        device = self.hidden.device.type
        with torch.autocast(device, enabled=False):  # a backward pass uses the dtypes of its forward pass
            assert self._end is not None
            self.sums.add(torch.autograd.grad([self._end], self.sums.trained, [self.gradient]))
        self._end = None


class _PendingBackward:
    """A backward pass that is still to come."""


class _Replayed(torch.autograd.Function):
    """All layers at once: (1, tokens, hidden) -> the same. Gradients go to the parameters directly."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, hidden: torch.Tensor, recording: _Recording, kwargs: dict[str, Any]
    ) -> Any:
        recording.load(hidden, kwargs)
        recording.forward()
        ctx.recording, ctx.pending, ctx.length = recording, recording.open(), hidden.shape[1]
        return recording.out[:, : hidden.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        _fill(ctx.recording.gradient, grads[0])
        ctx.recording.sums.attach()
        ctx.recording.backward()
        ctx.pending = None
        return None, None, None, None
