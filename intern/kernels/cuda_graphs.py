"""Decoder layers as CUDA graphs: their kernels are recorded once for each shape and from then on launched together.

On short rows Python takes longer to launch the kernels of a layer than the GPU to run them. One graph holds the forward pass of all
layers but the last, another one their backward pass: two launches a step. A graph knows one shape only, so rows are filled up to one of a
few lengths; causal attention never looks at what stands behind a row, and its gradient is zero. The last layer, whose MLP computes a
changing number of positions, the embeddings and the LM head stay as they are.
"""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_LENGTHS = 8  # so many lengths at most, evenly spread up to that of the longest batch
_ALIGNED = 64  # tokens: matrix products like lengths that divide by it
_FEWEST_ROWS = 8  # packed rows are filled up to 8, 16, 32 ...

Work = Callable[[], None]
Record = Callable[[Work, Work], tuple[Work, Work]]  # of a forward and a backward pass; what repeats them


class LayerGraphs:
    """Stands in for the forward passes of all layers but the last, wherever one row (or one pack of rows) trains.

    They must be of one kind, and nothing in them may be drawn at random: a recomputed draw would be another one.

    Args:
        layers: a model's decoder layers, in their order.
        most_tokens: of a batch.
        longest_row: tokens of the longest row inside a batch.
        record: CUDA graphs, unless something else is given.
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
        self._step = math.ceil(most_tokens / _LENGTHS / _ALIGNED) * _ALIGNED
        self._most = math.ceil(most_tokens / self._step) * self._step
        self._record = record or _Recorder()
        self._shapes: dict[Any, _Shape] = {}
        self._sums = _Sums([one for layer in self.layers for one in layer.parameters() if one.requires_grad])
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd follow what the first layer returns
        self._rows: list[torch.Tensor] = []  # what goes in, what comes out, and its gradient, of any shape
        self._out: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            setattr(layer, "forward", self._forward(index, layer))  # noqa: B010 - mypy forbids the assignment

    def remove(self) -> None:
        """The layers compute by themselves again, and the graphs' memory is free."""
        for layer in self.layers:
            vars(layer).pop("forward", None)
        self._shapes.clear()
        self._rows = []

    def _forward(self, index: int, layer: GradientCheckpointingLayer) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *more: Any, **given: Any) -> Any:
            if hidden is self._out:  # the first layer has computed for all
                self._out = None if index == len(self.layers) - 1 else hidden
                return hidden
            if index or more or not self._takes(layer, hidden, given):
                return _alone(layer, hidden, *more, **given)
            out: torch.Tensor = _Replayed.apply(self._anchor, hidden, self._shape(hidden, given), given)
            self._out = out if len(self.layers) > 1 else None
            return out

        return forward

    def _takes(self, layer: torch.nn.Module, hidden: torch.Tensor, given: dict[str, Any]) -> bool:
        length = hidden.shape[1]
        return (
            layer.training
            and torch.is_grad_enabled()
            and hidden.is_leaf  # nothing before the layers wants a gradient
            and len(hidden) == 1
            and given.get("attention_mask") is None
            and given.get("past_key_values") is None
            and length <= self._most
            and (given.get("max_length_q") or length) <= self.longest_row
            and all(_is_known(name, value, length) for name, value in given.items())
            and not any(shape.is_open() for shape in self._shapes.values())
        )

    def _shape(self, hidden: torch.Tensor, given: dict[str, Any]) -> "_Shape":
        """The shape that these tensors fit into; recorded where it is new."""
        length = math.ceil(hidden.shape[1] / self._step) * self._step
        boundaries = given.get("cu_seq_lens_q")
        rows = 0 if boundaries is None else max(_FEWEST_ROWS, 1 << (len(boundaries) - 1).bit_length())
        recomputing = tuple(layer.gradient_checkpointing for layer in self.layers)
        key = (length, rows, hidden.dtype, recomputing)
        if key not in self._shapes:
            if not self._rows:
                self._rows = [hidden.new_zeros(1, self._most, hidden.shape[2]) for _ in range(3)]
            tensors = {name: _room(name, value, length, rows) for name, value in given.items() if _is_tensors(value)}
            others = {name: value for name, value in given.items() if name not in tensors}
            longest = min(length, max(self.longest_row, self._step))  # the filling is a row too
            others |= {name: longest for name in others if name.startswith("max_length_")}
            run = functools.partial(_run, self.layers, others)
            rows_of_it = [tensor[:, :length] for tensor in self._rows]
            shape = _Shape(run, rows_of_it, tensors, self._sums)
            shape.take(hidden, given)
            shape.record(self._record)
            self._shapes[key] = shape
        return self._shapes[key]


def _alone(layer: Any, hidden: torch.Tensor, *more: Any, **given: Any) -> Any:
    return type(layer).forward(layer, hidden, *more, **given)


def _run(
    layers: Sequence[GradientCheckpointingLayer],
    others: dict[str, Any],
    hidden: torch.Tensor,
    tensors: dict[str, Any],
) -> torch.Tensor:
    device = hidden.device.type
    dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    again: Any = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # reading it is no kernel
    usual = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    try:
        # A cast that autocast has kept from before would stand for the weights of that time for ever.
        with torch.autocast(device, dtype, is_on, cache_enabled=False):
            for layer in layers:
                setattr(layer, "_gradient_checkpointing_func", again)  # noqa: B010
                hidden = _alone(layer, hidden, **others, **tensors)
                if not isinstance(hidden, torch.Tensor):
                    raise RuntimeError(f"{type(layer).__name__} returns more than hidden states")
    finally:
        for layer, its in zip(layers, usual, strict=True):
            setattr(layer, "_gradient_checkpointing_func", its)  # noqa: B010
    return hidden


def _is_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple) and isinstance(value[0], torch.Tensor))


def _is_known(name: str, value: Any, length: int) -> bool:
    """Whether it is no tensor, or one about tokens, or the boundaries of rows."""
    if isinstance(value, tuple):
        return all(_is_known(name, one, length) for one in value)
    if not isinstance(value, torch.Tensor) or name.startswith("cu_seq_lens"):
        return True
    return value.ndim > 1 and value.shape[1] == length


def _room(name: str, value: Any, length: int, rows: int) -> Any:
    """Memory for a tensor about tokens (its dimension 1), or for the boundaries of rows."""
    if isinstance(value, tuple):
        return tuple(_room(name, one, length, rows) for one in value)
    if name.startswith("cu_seq_lens"):
        return value.new_full((rows + 1,), length)
    return value.new_zeros(value.shape[0], length, *value.shape[2:])


def _fill(room: Any, value: Any) -> None:
    """Copies a tensor there; what is left is zero, or, behind the boundaries of rows, one row for the filling and then empty ones."""
    if isinstance(value, tuple):
        for one_room, one in zip(room, value, strict=True):
            _fill(one_room, one)
        return
    dimension = 0 if value.ndim == 1 else 1
    used, size = value.shape[dimension], room.shape[dimension]
    room.narrow(dimension, 0, used).copy_(value)
    if used < size and dimension:
        room.narrow(dimension, used, size - used).zero_()
    elif used < size:
        room[used:] = room[-1].clone()


class _Sums:
    """Gradients of the trained parameters, at one place for ever: a recorded backward pass adds to them."""

    def __init__(self, trained: Sequence[torch.nn.Parameter]) -> None:
        self.trained = list(trained)
        self._sums = [torch.zeros_like(one) for one in self.trained]

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Adds one backward pass's."""
        torch._foreach_add_(self._sums, list(gradients))

    def attach(self) -> None:
        """Makes them the parameters' gradients, with what those are by now."""
        pairs = list(zip(self.trained, self._sums, strict=True))
        if empty := [total for parameter, total in pairs if parameter.grad is None]:
            torch._foreach_zero_(empty)
        for parameter, total in pairs:
            if parameter.grad is not None and parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total


class _Shape:
    """One shape's graphs, and the memory that they read and write."""

    def __init__(
        self,
        run: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor],
        rows: Sequence[torch.Tensor],
        tensors: dict[str, Any],
        sums: _Sums,
    ) -> None:
        self.hidden, self.out, self.gradient = rows
        self.tensors = tensors
        self.sums = sums
        self._run = run
        self._end: torch.Tensor | None = None
        self._waits: weakref.ref[_Waits] | None = None
        self.forward: Work = self._pass_forward
        self.backward: Work = self._pass_backward

    def take(self, hidden: torch.Tensor, given: dict[str, Any]) -> None:
        """Copies a batch to where the passes read it."""
        _fill(self.hidden, hidden)
        for name, room in self.tensors.items():
            _fill(room, given[name])

    def record(self, record: Record) -> None:
        """From now on the passes are replayed. Recording may run them, so a batch must be there; its gradient counts as zero."""
        self.gradient.zero_()
        self.forward, self.backward = record(self._pass_forward, self._pass_backward)

    def is_open(self) -> bool:
        """Whether a forward pass waits for its backward pass: what it has left in memory must stay."""
        return self._waits is not None and self._waits() is not None

    def open(self) -> "_Waits":
        """Whoever holds the result keeps the shape open."""
        waits = _Waits()
        self._waits = weakref.ref(waits)
        return waits

    def _pass_forward(self) -> None:
        with torch.enable_grad():
            self._end = self._run(self.hidden, self.tensors)
        self.out.copy_(self._end.detach())

    def _pass_backward(self) -> None:
        device = self.hidden.device.type
        with torch.autocast(device, enabled=False):  # a backward pass takes the dtypes of its forward pass
            assert self._end is not None
            self.sums.add(torch.autograd.grad([self._end], self.sums.trained, [self.gradient]))
        self._end = None


class _Waits:
    """A backward pass that is still to come."""


class _Replayed(torch.autograd.Function):
    """All layers at once: (1, length, hidden size) -> the same; gradients go to the parameters themselves."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, hidden: torch.Tensor, shape: _Shape, given: dict[str, Any]) -> Any:
        shape.take(hidden, given)
        shape.forward()
        ctx.shape, ctx.waits, ctx.length = shape, shape.open(), hidden.shape[1]
        return shape.out[:, : hidden.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        _fill(ctx.shape.gradient, grads[0])
        ctx.shape.sums.attach()
        ctx.shape.backward()
        ctx.waits = None
        return None, None, None, None


class _Recorder:
    """CUDA graphs that share one pool of memory: at any time only one of them has something in it that is still wanted."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._is_warm = False

    def __call__(self, forward: Work, backward: Work) -> tuple[Work, Work]:
        """Records both; the first time it runs them before, since libraries prepare themselves at a first call."""
        torch.clear_autocast_cache()  # its casts would tie the parameters to the stream of before
        if not self._is_warm:  # only the first time: this takes memory beside that of the graphs
            _stream().wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(_stream()):
                forward()
                backward()
            torch.cuda.current_stream().wait_stream(_stream())
            self._is_warm = True
        return self._recorded(forward), self._recorded(backward)

    def _recorded(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Where recording fails, torch.cuda.graph itself does not always give the stream back.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, self._pool, _stream(), capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Where everything is recorded: cuBLAS keeps a workspace for each stream that it has ever seen."""
    return torch.cuda.Stream()
