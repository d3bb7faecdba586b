"""Activation checkpointing of decoder layers: reentrant, with each layer's input on the GPU or in pinned host memory.

Related: torch.utils.checkpoint, TRL's activation offloading, Unsloth's checkpointing with offloaded inputs.
"""

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

from intern.kernels.patches import Patches

_COPIES_IN_FLIGHT = 3  # tensors on their way to the host: the input and the results of one layer


def recompute(layers: list[GradientCheckpointingLayer], preserve_rng_state: bool) -> Patches:
    """Make checkpointed layers save only their inputs.

    This is checkpointing's reentrant form. It costs a fifth less Python time than the other one, which passes every tensor of the
    recomputation through hooks.

    Args:
        layers: the decoder layers.
        preserve_rng_state: whether something in them is drawn at random (dropout); the recomputation must then draw the same.

    Returns:
        The replaced checkpointing functions.
    """
    return _checkpoint_with(layers, functools.partial(_checkpoint, None, False, preserve_rng_state))


def offload_inputs(
    layers: list[GradientCheckpointingLayer], preserve_rng_state: bool, keeps_results: bool = False
) -> Patches:
    """Like `recompute`, with the inputs in pinned host memory: saves (batch, tokens, hidden) elements per layer on the GPU.

    Copies run on their own stream, concurrently with the computation: to the host while the next layer computes, and back while the
    backward pass is at the layer above.

    Args:
        layers: the decoder layers.
        preserve_rng_state: as in `recompute`.
        keeps_results: whether results passed to `save_for_recompute` are stored there too, and computed only once.

    Returns:
        The replaced checkpointing functions.
    """
    return _checkpoint_with(layers, functools.partial(_checkpoint, _Host(), keeps_results, preserve_rng_state))


def save_for_recompute(compute: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    """Run `compute()` in a checkpointed layer's first forward and return its stored outputs in the recomputation.

    For expensive results. Outputs are kept in pinned host memory, and only by layers that keep results (`offload_inputs`); in every other
    layer `compute()` simply runs. Calls must occur in the same order in both passes.

    Args:
        compute: returns tensors of any shape, without gradients.
    """
    run = _run.get()
    if run is None or run.results is None:
        return compute()
    if run.is_second:
        return run.results.bring_back()
    results = compute()
    run.results.keep(results)
    return results


def is_recomputing() -> bool:
    """Whether a checkpointed layer is running its second forward pass, the one in the backward pass."""
    run = _run.get()
    return run is not None and run.is_second


def _checkpoint_with(layers: list[GradientCheckpointingLayer], form: Callable[..., Any]) -> Patches:
    patches = Patches()
    for layer in layers:
        patches.set(layer, "_gradient_checkpointing_func", form)
    return patches


def _checkpoint(
    host: "_Host | None", keeps_results: bool, preserve_rng_state: bool, run: Callable[..., Any], *inputs: Any
) -> Any:
    # The first forward of the reentrant form has no gradients: what layers pass each other next to their inputs needs the other form.
    if not all(map(_is_plain, getattr(run, "keywords", {}).values())):
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    # The reentrant form saves its inputs through autograd, where hooks see them. It passes gradients on only if one of its inputs
    # requires them, which the input of the first layer does not.
    anchor = torch.zeros((), requires_grad=True)
    results = _Results(host) if host is not None and keeps_results else None

    def watched(_: torch.Tensor, *args: Any) -> Any:
        is_second = torch.is_grad_enabled()  # the first forward of the reentrant form has no gradients
        token = _run.set(_Run(is_second, results))
        try:
            out = run(*args)
        finally:
            _run.reset(token)
        if is_second:
            _free_unread_sum(out)
        return out

    hooks: Any = contextlib.nullcontext()
    if host is not None:
        hooks = torch.autograd.graph.saved_tensors_hooks(host.keep, host.bring_back)
    with hooks:
        return checkpoint(watched, anchor, *inputs, use_reentrant=True, preserve_rng_state=preserve_rng_state)


def _is_plain(value: Any) -> bool:
    """Whether an argument needs no gradient, and is no container in which a layer leaves states for later ones (Gemma 3n)."""
    if isinstance(value, torch.Tensor):
        return not value.requires_grad
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _free_unread_sum(out: Any) -> None:
    """Free the elements of a recomputed layer's output (batch, tokens, hidden), a sum that only starts a backward pass.

    Nothing reads it: autograd saves no output of an addition.
    """
    if isinstance(out, torch.Tensor) and out.grad_fn is not None and out.grad_fn.name() == "AddBackward0":
        out.untyped_storage().resize_(0)


@dataclass(frozen=True)
class _Run:
    """One of the two forward passes of a checkpointed layer."""

    is_second: bool
    results: "_Results | None"  # where the layer keeps results


# Of the layer that is running. The recomputation may run in a thread of autograd, but sets its own value there.
_run: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("run", default=None)


class _Stored:
    """A tensor in host memory, and its copy on the way back."""

    def __init__(self, host: torch.Tensor, device: torch.device, before: "weakref.ref[_Stored] | None") -> None:
        self.host = host
        self.device = device
        self.before = before  # stored before this one: the backward pass needs it next
        self.back: torch.Tensor | None = None
        self.is_back: torch.cuda.Event | None = None


class _Host:
    """Stores tensors in host memory.

    All GPU memory belongs to the main stream; each stream waits for the other's part of a copy.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        # Tensors whose copy to the host is under way: they must not be freed before it is done.
        self._leaving: collections.deque[tuple[torch.Tensor, torch.cuda.Event]] = collections.deque()
        self._last: weakref.ref[_Stored] | None = None

    def keep(self, tensor: torch.Tensor) -> _Stored:
        """Start the copy of a tensor to the host."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)  # same strides: kernels rely on them
        stored = _Stored(host, tensor.device, self._last)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return stored
        self._wait_for_copies(but=_COPIES_IN_FLIGHT - 1)
        with torch.cuda.stream(self._copy_stream()):
            host.copy_(tensor, non_blocking=True)
            self._leaving.append((tensor, torch.cuda.current_stream().record_event()))
        self._last = weakref.ref(stored)
        return stored

    def bring_back(self, stored: _Stored) -> torch.Tensor:
        """Return the tensor on its device, and start the copy of the one that is needed next."""
        if stored.device.type != "cuda":
            return stored.host
        self._wait_for_copies(but=0)
        self._fetch(stored)
        assert stored.back is not None and stored.is_back is not None
        torch.cuda.current_stream().wait_event(stored.is_back)
        tensor, stored.back = stored.back, None
        if stored.before is not None and (before := stored.before()) is not None:
            self._fetch(before)
        return tensor

    def _wait_for_copies(self, but: int) -> None:
        """Make the main stream wait for all copies to the host, except the last `but` ones."""
        while len(self._leaving) > but:
            _, is_there = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(is_there)

    def _fetch(self, stored: _Stored) -> None:
        if stored.back is None:
            stored.back = torch.empty_like(stored.host, device=stored.device)
            with torch.cuda.stream(self._copy_stream()):
                stored.back.copy_(stored.host, non_blocking=True)
                stored.is_back = torch.cuda.current_stream().record_event()

    def _copy_stream(self) -> torch.cuda.Stream:
        """Return the stream for copies, ordered after everything submitted to the main stream so far."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream


class _Results:
    """Results of `save_for_recompute` in a layer's first forward, in the order of the calls."""

    def __init__(self, host: _Host) -> None:
        self._host = host
        self._stored: collections.deque[list[_Stored]] = collections.deque()

    def keep(self, results: Sequence[torch.Tensor]) -> None:
        """Store the results of one call."""
        stored = [self._host.keep(tensor) for tensor in reversed(results)]  # the one stored last comes back first
        self._stored.append(stored[::-1])

    def bring_back(self) -> list[torch.Tensor]:
        """Return the results of the next call."""
        return [self._host.bring_back(stored) for stored in self._stored.popleft()]
