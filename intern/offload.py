"""How checkpointed layers run again, and what makes long rows fit besides: their inputs in host memory, and MLPs in pieces."""

import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from intern.linear import unpacked

Keeping = Callable[[], contextlib.AbstractContextManager[Any]]  # around a layer's run: what becomes of its inputs

_recomputing = contextvars.ContextVar("recomputing", default=False)  # whether a layer runs again for its backward pass


def recompute(layers: list[GradientCheckpointingLayer], preserve_rng_state: bool) -> None:
    """Checkpointed layers keep only their inputs.

    This is checkpointing's reentrant form, which costs Python a fifth less than the other one: that passes every tensor of the second run
    through hooks.

    Args:
        layers: the decoder layers.
        preserve_rng_state: something in them is drawn at random, and must be drawn the same again.
    """
    _checkpoint_with(layers, contextlib.nullcontext, preserve_rng_state)


def offload_inputs(layers: list[GradientCheckpointingLayer], preserve_rng_state: bool) -> None:
    """The same, with the inputs in pinned host memory: batch x length x hidden size numbers less on the GPU for each layer.

    Copies run on a stream of their own beside the computation: to the host while the layer itself computes, and back while the backward
    pass is at the layer after.
    """
    host = _Host()
    keeping = functools.partial(torch.autograd.graph.saved_tensors_hooks, host.keep, host.bring_back)
    _checkpoint_with(layers, keeping, preserve_rng_state)


def _checkpoint_with(layers: list[GradientCheckpointingLayer], keeping: Keeping, preserve_rng_state: bool) -> None:
    run = functools.partial(_checkpoint, keeping, preserve_rng_state)
    for layer in layers:
        setattr(layer, "_gradient_checkpointing_func", run)  # noqa: B010 - mypy forbids the assignment


def _checkpoint(keeping: Keeping, preserve_rng_state: bool, run: Callable[..., Any], *inputs: Any) -> Any:
    # The reentrant form saves its inputs through autograd, where hooks see them; it passes gradients on only where one of its inputs
    # needs them, which the input of the first layer does not.
    anchor = torch.zeros((), requires_grad=True)

    def watched(_: torch.Tensor, *given: Any) -> Any:
        again = torch.is_grad_enabled()  # the first pass of the reentrant form runs without
        token = _recomputing.set(again)
        try:
            out = run(*given)
        finally:
            _recomputing.reset(token)
        if again:
            _forget(out)
        return out

    with keeping():
        return checkpoint(watched, anchor, *inputs, use_reentrant=True, preserve_rng_state=preserve_rng_state)


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


class _Host:
    """Keeps tensors in host memory. All GPU memory belongs to the main stream, and each stream waits for the other's part of a copy."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._leaving: tuple[torch.Tensor, torch.cuda.Event] | None = None  # must not be freed before its copy is done
        self._last: weakref.ref[_Kept] | None = None

    def keep(self, tensor: torch.Tensor) -> _Kept:
        """Starts the copy to the host."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        kept = _Kept(host, tensor.device, self._last)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return kept
        self._let_leave()
        with torch.cuda.stream(self._beside()):
            host.copy_(tensor, non_blocking=True)
            self._leaving = tensor, torch.cuda.current_stream().record_event()
        self._last = weakref.ref(kept)
        return kept

    def bring_back(self, kept: _Kept) -> torch.Tensor:
        """The tensor on its device again; the one that is wanted next is started on its way."""
        if kept.device.type != "cuda":
            return kept.host
        self._let_leave()
        self._fetch(kept)
        assert kept.back is not None and kept.is_back is not None
        torch.cuda.current_stream().wait_event(kept.is_back)
        tensor, kept.back = kept.back, None
        if kept.before is not None and (before := kept.before()) is not None:
            self._fetch(before)
        return tensor

    def _let_leave(self) -> None:
        if self._leaving is not None:
            torch.cuda.current_stream().wait_event(self._leaving[1])
            self._leaving = None

    def _fetch(self, kept: _Kept) -> None:
        if kept.back is None:
            kept.back = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
            with torch.cuda.stream(self._beside()):
                kept.back.copy_(kept.host, non_blocking=True)
                kept.is_back = torch.cuda.current_stream().record_event()

    def _beside(self) -> torch.cuda.Stream:
        """The stream for copies, after all that the main stream has been given so far."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream


def tile_mlps(layers: list[GradientCheckpointingLayer], tokens: int) -> None:
    """MLPs of layers that `offload_inputs` was given take rows in pieces of so many tokens: one piece's intermediates are there at a time.

    A piece is computed once forward and once more in its own backward pass, as often as without pieces: while the layer recomputes, the
    MLP's output, which nothing needs then, is left out. Its weights are unpacked once for all pieces.
    """
    for layer in layers:
        mlp: Any = layer.mlp
        mlp.forward = _in_pieces(mlp, mlp.forward, tokens)


def _in_pieces(
    mlp: torch.nn.Module, whole: Callable[[torch.Tensor], torch.Tensor], tokens: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if _recomputing.get():
            return _LaterInPieces.apply(hidden, mlp, whole, tokens)
        if hidden.shape[1] <= tokens:
            return whole(hidden)
        with unpacked(mlp):
            return torch.cat([whole(piece) for piece in hidden.split(tokens, dim=1)], dim=1)

    return forward


class _LaterInPieces(torch.autograd.Function):
    """No output worth reading; gradients piece by piece, each piece computed when its gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        mlp: torch.nn.Module,
        whole: Callable[[torch.Tensor], torch.Tensor],
        tokens: int,
    ) -> torch.Tensor:
        device = hidden.device.type
        ctx.autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        ctx.save_for_backward(hidden)
        ctx.mlp, ctx.whole, ctx.tokens = mlp, whole, tokens
        return torch.zeros_like(hidden)

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
        return grad_hidden, None, None, None
