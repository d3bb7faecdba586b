"""How checkpointed layers run again, and what makes long rows fit besides: their inputs in host memory, and MLPs in pieces."""

import collections
import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from intern.kernels.decoder_layers import only_adds_its_mlp
from intern.kernels.lora_linear import unpacked

_LEAVING = 3  # tensors that may be on their way to the host: the input and the results of one layer


def recompute(layers: list[GradientCheckpointingLayer], preserve_rng_state: bool) -> None:
    """Checkpointed layers keep only their inputs.

    This is checkpointing's reentrant form, which costs Python a fifth less than the other one: that passes every tensor of the second run
    through hooks.

    Args:
        layers: the decoder layers.
        preserve_rng_state: something in them is drawn at random, and must be drawn the same again.
    """
    _checkpoint_with(layers, functools.partial(_checkpoint, None, False, preserve_rng_state))


def offload_inputs(
    layers: list[GradientCheckpointingLayer], preserve_rng_state: bool, keeps_results: bool = False
) -> None:
    """The same, with the inputs in pinned host memory: batch x length x hidden size numbers less on the GPU for each layer.

    Copies run on a stream of their own beside the computation: to the host while the next layer computes, and back while the backward
    pass is at the layer after.

    Args:
        layers: the decoder layers.
        preserve_rng_state: as above.
        keeps_results: what `remembered` is asked for waits there too, and is computed once.
    """
    _checkpoint_with(layers, functools.partial(_checkpoint, _Host(), keeps_results, preserve_rng_state))


def remembered(compute: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    """What `compute` gives, in a layer that runs again too.

    For results that take long: a layer that keeps results computes them in its first run, and finds them in host memory in its second,
    the calls of which must be the same.
    """
    run = _run.get()
    if run is None or run.results is None:
        return compute()
    if run.is_second:
        return run.results.bring_back()
    results = compute()
    run.results.keep(results)
    return results


def remembers() -> bool:
    """Whether a layer that keeps results runs."""
    run = _run.get()
    return run is not None and run.results is not None


def _checkpoint_with(layers: list[GradientCheckpointingLayer], form: Callable[..., Any]) -> None:
    for layer in layers:
        setattr(layer, "_gradient_checkpointing_func", form)  # noqa: B010 - mypy forbids the assignment


def _checkpoint(
    host: "_Host | None", keeps_results: bool, preserve_rng_state: bool, run: Callable[..., Any], *inputs: Any
) -> Any:
    # The first run of the reentrant form has no gradients: what layers hand each other beside their inputs needs the other form.
    if not all(map(_is_plain, getattr(run, "keywords", {}).values())):
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    # The reentrant form saves its inputs through autograd, where hooks see them; it passes gradients on only where one of its inputs
    # needs them, which the input of the first layer does not.
    anchor = torch.zeros((), requires_grad=True)
    results = _Results(host) if host is not None and keeps_results else None

    def watched(_: torch.Tensor, *given: Any) -> Any:
        again = torch.is_grad_enabled()  # the first run of the reentrant form is without
        token = _run.set(_Run(again, results))
        try:
            out = run(*given)
        finally:
            _run.reset(token)
        if again:
            _forget(out)
        return out

    hooks: Any = contextlib.nullcontext()
    if host is not None:
        hooks = torch.autograd.graph.saved_tensors_hooks(host.keep, host.bring_back)
    with hooks:
        return checkpoint(watched, anchor, *inputs, use_reentrant=True, preserve_rng_state=preserve_rng_state)


def _is_plain(value: Any) -> bool:
    """Whether it wants no gradient, and is no place where a layer leaves states for later ones (Gemma 3n's keys and values)."""
    if isinstance(value, torch.Tensor):
        return not value.requires_grad
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _forget(out: Any) -> None:
    """Frees the numbers of a sum that only starts a backward pass: a recomputed layer's output, which nothing reads."""
    if isinstance(out, torch.Tensor) and out.grad_fn is not None and out.grad_fn.name() == "AddBackward0":
        out.untyped_storage().resize_(0)


class _Kept:
    """A tensor in host memory, and its copy on the way back."""

    def __init__(self, host: torch.Tensor, device: torch.device, before: "weakref.ref[_Kept] | None") -> None:
        self.host = host
        self.device = device
        self.before = before  # what was kept before this: the backward pass wants it next
        self.back: torch.Tensor | None = None
        self.is_back: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Run:
    """One of the two runs of a checkpointed layer."""

    is_second: bool
    results: "_Results | None"  # where they are kept


_run: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("run", default=None)


class _Host:
    """Keeps tensors in host memory. All GPU memory belongs to the main stream, and each stream waits for the other's part of a copy."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        # They must not be freed before their copies are done.
        self._leaving: collections.deque[tuple[torch.Tensor, torch.cuda.Event]] = collections.deque()
        self._last: weakref.ref[_Kept] | None = None

    def keep(self, tensor: torch.Tensor) -> _Kept:
        """Starts the copy to the host."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)  # kernels count on its strides
        kept = _Kept(host, tensor.device, self._last)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return kept
        self._let_leave(_LEAVING - 1)
        with torch.cuda.stream(self._beside()):
            host.copy_(tensor, non_blocking=True)
            self._leaving.append((tensor, torch.cuda.current_stream().record_event()))
        self._last = weakref.ref(kept)
        return kept

    def bring_back(self, kept: _Kept) -> torch.Tensor:
        """The tensor on its device again; the one that is wanted next is started on its way."""
        if kept.device.type != "cuda":
            return kept.host
        self._let_leave(0)
        self._fetch(kept)
        assert kept.back is not None and kept.is_back is not None
        torch.cuda.current_stream().wait_event(kept.is_back)
        tensor, kept.back = kept.back, None
        if kept.before is not None and (before := kept.before()) is not None:
            self._fetch(before)
        return tensor

    def _let_leave(self, but: int) -> None:
        """Waits for the copies to the host, but for so many of the last ones."""
        while len(self._leaving) > but:
            _, is_there = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(is_there)

    def _fetch(self, kept: _Kept) -> None:
        if kept.back is None:
            kept.back = torch.empty_like(kept.host, device=kept.device)
            with torch.cuda.stream(self._beside()):
                kept.back.copy_(kept.host, non_blocking=True)
                kept.is_back = torch.cuda.current_stream().record_event()

    def _beside(self) -> torch.cuda.Stream:
        """The stream for copies, after all that the main stream has been given so far."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream


class _Results:
    """What `remembered` was asked for in a layer's first run, in the order of its calls."""

    def __init__(self, host: _Host) -> None:
        self._host = host
        self._kept: collections.deque[list[_Kept]] = collections.deque()

    def keep(self, results: Sequence[torch.Tensor]) -> None:
        """One call's."""
        kept = [self._host.keep(tensor) for tensor in reversed(results)]  # what is kept last comes back first
        self._kept.append(kept[::-1])

    def bring_back(self) -> list[torch.Tensor]:
        """The next call's."""
        return [self._host.bring_back(kept) for kept in self._kept.popleft()]


def tile_mlps(layers: list[GradientCheckpointingLayer], tokens: int) -> None:
    """MLPs of layers that `offload_inputs` was given take rows in pieces of so many tokens: one piece's intermediates are there at a time.

    A piece is computed once forward and once more in its own backward pass, as often as without pieces: while the layer recomputes, the
    MLP's output is left out, unless a part of the layer (a norm behind the MLP) reads it. Its weights are unpacked once for all pieces.
    """
    for layer in layers:
        mlp: Any = layer.mlp
        mlp.forward = _in_pieces(mlp, mlp.forward, tokens, is_read=not only_adds_its_mlp(layer))


def _in_pieces(
    mlp: torch.nn.Module, whole: Callable[[torch.Tensor], torch.Tensor], tokens: int, is_read: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    def together(hidden: torch.Tensor) -> torch.Tensor:
        # An evaluation's layers do not use unpacked weights.
        with unpacked(mlp) if mlp.training else contextlib.nullcontext():
            return torch.cat([whole(piece) for piece in hidden.split(tokens, dim=1)], dim=1)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if (run := _run.get()) is not None and run.is_second:
            return _LaterInPieces.apply(hidden, mlp, whole, tokens, together if is_read else torch.zeros_like)
        return together(hidden) if hidden.shape[1] > tokens else whole(hidden)

    return forward


class _LaterInPieces(torch.autograd.Function):
    """The output that `first` gives, none worth reading perhaps; gradients piece by piece, each computed when its gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        mlp: torch.nn.Module,
        whole: Callable[[torch.Tensor], torch.Tensor],
        tokens: int,
        first: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        device = hidden.device.type
        ctx.autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        ctx.save_for_backward(hidden)
        ctx.mlp, ctx.whole, ctx.tokens = mlp, whole, tokens
        return first(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [hidden], [grad] = ctx.saved_tensors, grads
        grad_hidden = torch.empty_like(hidden)
        parts = zip(*(tensor.split(ctx.tokens, dim=1) for tensor in (hidden, grad, grad_hidden)), strict=True)
        with unpacked(ctx.mlp):
            for given, wanted, found in parts:
                piece = given.detach().requires_grad_()
                with torch.enable_grad(), ctx.autocast:
                    out = ctx.whole(piece)
                torch.autograd.backward(out, wanted)
                assert piece.grad is not None
                found.copy_(piece.grad)
        return grad_hidden, None, None, None, None
