"""Frozen 4-bit weights and their LoRA adapters as one autograd node per input: what PEFT and bitsandbytes compute, in fewer kernels.

PEFT adds the adapter's product to the base's in separate operations: a copy of the base's output, a scaled copy of the adapter's, and
their sum, each as large as the layer's output, and autograd saves what each needs. Here both products go into one tensor, the weight is
dequantized once forward and once backward, and only the layer's input (tokens, in) and its product with A (tokens, rank) are saved.
Layers that read the same input (query, key and value; gate and up) share one node: their adapters read it once, and its gradient is
summed inside the matrix products instead of by additions after them. GPU memory that training leaves free can hold dequantized weights,
which otherwise each pass computes again (`unpack_weights`).
"""

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

from intern.kernels.patches import Patches
from intern.kernels.quantized_weight import QuantizedWeight

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of layers in transformers' models


class _Products(torch.autograd.Function):
    """y_i = x W_i^T + s_i (x A_i^T) B_i^T for quantized W_i; gradients for x, A_i and B_i (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    Shapes: x (..., in), W_i (out_i, in) in 4 bits, A_i (r_i, in), B_i (out_i, r_i); returns each y_i (..., out_i).
    Saves only x (tokens, in) and x A^T (tokens, sum of r_i), and nothing at all if no W_i has an adapter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: Sequence[QuantizedWeight], *adapters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        a, b = adapters[::2], adapters[1::2]  # of the weights that have an adapter, in their order
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        low = flat @ torch.cat(a).to(x.dtype).t() if a else None  # (tokens, sum of r_i)
        outs, parts = [], _columns(low, weights)
        up = iter(b)
        for weight in weights:
            dense = weight.dense(x.dtype).t()
            out = flat @ dense if weight.bias is None else torch.addmm(weight.bias.to(x.dtype), flat, dense)
            if weight.rank:
                out.addmm_(next(parts), next(up).to(x.dtype).t(), alpha=weight.scaling)
            outs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(*([flat, low, *adapters] if a else []))
        ctx.weights, ctx.shape = weights, x.shape
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights: Sequence[QuantizedWeight] = ctx.weights
        grad_outs = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # each (tokens, out_i)
        dtype = grad_outs[0].dtype
        saved: Sequence[Any] = ctx.saved_tensors or (None, None)
        flat, low, *adapters = saved
        a, b = adapters[::2], adapters[1::2]
        adapted = [(weight, grad) for weight, grad in zip(weights, grad_outs, strict=True) if weight.rank]
        grad_low = None  # (tokens, sum of r_i)
        if adapters:
            grad_low = torch.cat(
                [(grad @ one.to(dtype)).mul_(weight.scaling) for (weight, grad), one in zip(adapted, b, strict=True)], 1
            )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_outs[0] @ weights[0].dense(dtype)
            for weight, grad in zip(weights[1:], grad_outs[1:], strict=True):
                grad_x.addmm_(grad, weight.dense(dtype))
            if grad_low is not None:
                grad_x.addmm_(grad_low, torch.cat(a).to(dtype))
            grad_x = grad_x.view(ctx.shape)
        results: list[torch.Tensor | None] = [grad_x, None]
        if grad_low is not None:
            grads_a = (grad_low.t() @ flat).to(a[0].dtype).split([weight.rank for weight, _ in adapted])
            for (weight, grad), part, of_a, of_b in zip(adapted, _columns(low, weights), grads_a, b, strict=True):
                results += [of_a, ((grad.t() @ part) * weight.scaling).to(of_b.dtype)]
        return tuple(results)


def _columns(low: torch.Tensor | None, weights: Sequence[QuantizedWeight]) -> Iterator[torch.Tensor]:
    """Split x A^T (tokens, sum of r_i) into each adapter's columns (tokens, r_i)."""
    return iter(()) if low is None else iter(low.split([weight.rank for weight in weights if weight.rank], dim=1))


class _Siblings:
    """Layers that their module calls with the same input, one after the other: the first call computes for all of them."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self.layers = list(layers)
        self.weights = [_weight(layer) for layer in layers]
        self._adapters = [_adapter(layer) for layer in layers]
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}  # outputs that are computed but not yet asked for, by index

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of layer `index` for `x` (..., in)."""
        if self._input is not x or index not in self._waiting:
            indices = range(len(self.layers)) if index == 0 else [index]
            self._input, self._waiting = x, dict(zip(indices, self._products(x, indices), strict=True))
        out = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return out

    def forget(self) -> None:
        """Drop outputs that no sibling will ask for, and with them their autograd graph."""
        self._input = None
        self._waiting = {}

    def _products(self, x: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        weights = [self.weights[index] for index in indices]
        adapters = [half.weight for index in indices for half in self._adapters[index]]
        outs = _Products.apply(x.to(weights[0].dtype), weights, *adapters)
        return [out.to(x.dtype) for out in outs]


def _weight(layer: torch.nn.Module) -> QuantizedWeight:
    """Read the weight of a layer that `_is_plain` accepts."""
    base: Any = _base(layer)
    scaling, rank = 0.0, 0
    if isinstance(layer, LoraLinear4bit):
        [name] = layer.lora_A
        scaling, rank = layer.scaling[name], layer.r[name]
    packed, state = base.weight.detach().as_subclass(torch.Tensor), base.weight.quant_state
    return QuantizedWeight(packed, state, base.bias, scaling, rank, base.compute_dtype or state.dtype)


def _adapter(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Return A and B, or nothing for a layer without an adapter."""
    if not isinstance(layer, LoraLinear4bit):
        return []
    [name] = layer.lora_A
    return [layer.lora_A[name], layer.lora_B[name]]


def applies(model: torch.nn.Module) -> bool:
    """Whether the model has layers with 4-bit weights."""
    return any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def fuse_adapters(model: torch.nn.Module) -> "FusedAdapters":
    """Replace the forward pass of every plain 4-bit layer, with a plain LoRA adapter or none, by the fused product.

    Layers that do more (dropout, DoRA or another variant, several adapters) keep PEFT's forward pass. So does every layer while its
    adapter is merged or disabled, and while nothing is trained.

    Returns:
        The replaced forward passes; their number is its length.
    """
    fused = FusedAdapters()
    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, LoraLinear4bit)}
    for parent in model.modules():
        plain = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, bnb.nn.Linear4bit | LoraLinear4bit) and id(child) not in inside and _is_plain(child)
        }
        groups = [[plain.pop(name) for name in names] for names in _SAME_INPUT if plain.keys() >= set(names)]
        for group in [*groups, *([child] for child in plain.values())]:
            fused.add(_Siblings(group))
    return fused


class FusedAdapters:
    """Layers whose forward passes `fuse_adapters` replaced."""

    def __init__(self) -> None:
        self._forwards, self._groups = Patches(), Patches()

    def add(self, siblings: _Siblings) -> None:
        """Replace the forward passes of layers that read the same input."""
        for index, layer in enumerate(siblings.layers):
            self._forwards.set(layer, "forward", types.MethodType(_forward(siblings, index), layer))
            self._groups.set(_base(layer), "siblings", siblings)

    def undo(self) -> None:
        """Restore PEFT's and bitsandbytes' forward passes; dequantized weights are freed."""
        self._forwards.undo()
        self._groups.undo()

    def __len__(self) -> int:
        return len(self._forwards)


def forget_waiting(model: torch.nn.Module) -> None:
    """Free what layers hold for their siblings, after a pass that was cut short."""
    for siblings in _all_siblings(model):
        siblings.forget()


def unpack_weights(model: torch.nn.Module, room: int) -> int:
    """Store weights of fused layers dequantized as well, as many as fit into `room` bytes.

    Results do not change: every pass computes these values otherwise.

    Returns:
        The bytes that they take.
    """
    taken = 0
    for weight in _weights(model):
        size = weight.state.shape.numel() * weight.dtype.itemsize
        if taken + size <= room:
            weight.unpacked = weight.dense(weight.dtype)
            taken += size
    return taken


def pack_weights(model: torch.nn.Module) -> None:
    """Free the dequantized weights that `unpack_weights` stored."""
    for weight in _weights(model):
        weight.unpacked = None


@contextlib.contextmanager
def unpacked(module: torch.nn.Module) -> Iterator[None]:
    """Inside the block, fused 4-bit weights in `module` are dequantized once each, not at every use."""
    packed = [weight for weight in _weights(module) if weight.unpacked is None]
    try:
        for weight in packed:
            weight.unpacked = weight.dense(weight.dtype)
        yield
    finally:
        for weight in packed:
            weight.unpacked = None


def _weights(model: torch.nn.Module) -> list[QuantizedWeight]:
    return [weight for siblings in _all_siblings(model) for weight in siblings.weights]


def _all_siblings(model: torch.nn.Module) -> list[_Siblings]:
    """Return each group once, in the order of the layers."""
    found = [getattr(module, "siblings", None) for module in model.modules()]
    return list(dict.fromkeys(one for one in found if isinstance(one, _Siblings)))


def _base(layer: torch.nn.Module) -> torch.nn.Module:
    return layer.get_base_layer() if isinstance(layer, LoraLinear4bit) else layer


def _is_plain(layer: torch.nn.Module) -> bool:
    if not isinstance(layer, LoraLinear4bit):
        return True
    [*adapters] = layer.lora_A
    return (
        adapters == layer.active_adapters
        and len(adapters) == 1
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[adapters[0]], torch.nn.Identity)
        and layer.lora_A[adapters[0]].bias is None
        and layer.lora_B[adapters[0]].bias is None
    )


def _forward(siblings: _Siblings, index: int) -> Any:
    def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The first pass of a checkpointed layer has no gradients, but belongs to training.
        is_trained = torch.is_grad_enabled() or layer.training
        if not is_trained or args or kwargs or any(map(_is_off, siblings.layers)):
            return type(layer).forward(layer, x, *args, **kwargs)
        return siblings.output(index, x)

    return forward


def _is_off(layer: torch.nn.Module) -> bool:
    return isinstance(layer, LoraLinear4bit) and (layer.disable_adapters or layer.merged)
