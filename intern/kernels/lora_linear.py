"""Frozen 4-bit weights and their LoRA adapters as one autograd node for each input: what PEFT and bitsandbytes compute, in fewer kernels.

PEFT adds the adapter's product to the base's in operations of their own: a copy of the base's output, a scaled copy of the adapter's, and
their sum, each as large as the layer's output, and autograd keeps what each needs. Here both products go into one tensor, the weight is
dequantized once forward and once backward, and only the layer's input and the product with A (tokens x rank) are kept. Layers that read
the same input (query, key and value; gate and up) share one node: their adapters read it once, and its gradient is summed inside the
matrix products and not by additions after them. Memory that training leaves free holds weights in their unpacked form, which is what
each pass would make of them anew.
"""

import contextlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # the names that transformers' models use


@dataclass
class _Weight:
    """A 4-bit weight as bitsandbytes keeps it, and how strongly its adapter counts (rank 0: it has none)."""

    packed: torch.Tensor  # a plain tensor: of bitsandbytes' class every use costs Python's time
    state: Any
    bias: torch.Tensor | None
    scaling: float
    rank: int
    dtype: torch.dtype  # to compute in
    unpacked: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: torch.nn.Module) -> "_Weight":
        """A plain layer's."""
        base: Any = _base(layer)
        scaling, rank = 0.0, 0
        if isinstance(layer, LoraLinear4bit):
            [name] = layer.lora_A
            scaling, rank = layer.scaling[name], layer.r[name]
        packed, state = base.weight.detach().as_subclass(torch.Tensor), base.weight.quant_state
        return cls(packed, state, base.bias, scaling, rank, base.compute_dtype or state.dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """(outputs, inputs)."""
        if self.unpacked is not None and self.unpacked.dtype == dtype:
            return self.unpacked
        return _dequantized(self.packed, self.state).to(dtype)


def _dequantized(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """What bitsandbytes.functional.dequantize_4bit gives, on a GPU without the operators in which it wraps its kernels.

    Each of those costs more of Python's time than a small weight costs the GPU's: on short rows a fifth of a step.
    """
    if not packed.is_cuda:
        return bnb.functional.dequantize_4bit(packed, state)
    from bitsandbytes.backends.cuda import ops  # where there is no GPU, it has no kernels

    kernels: Any = ops
    absmax = state.absmax
    if state.nested:
        outer = state.state2
        absmax = torch.empty_like(state.absmax, dtype=torch.float32)
        kernels._dequantize_blockwise_impl(
            state.absmax, outer.absmax, outer.code, outer.blocksize, torch.float32, out=absmax
        )
        absmax += state.offset
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    kernels._dequantize_4bit_impl(packed, absmax, state.blocksize, state.quant_type, state.dtype, out=out)
    return out


class _Products(torch.autograd.Function):
    """y_i = x W_i^T + s_i (x A_i^T) B_i^T for quantized W_i; gradients for x, A_i and B_i (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: Sequence[_Weight], *adapters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        a, b = adapters[::2], adapters[1::2]  # of the weights that have an adapter, in their order
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ torch.cat(a).to(x.dtype).t() if a else None
        outs, parts = [], _parts(low, weights)
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
        weights: Sequence[_Weight] = ctx.weights
        over = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dtype = over[0].dtype
        saved: Sequence[Any] = ctx.saved_tensors or (None, None)
        flat, low, *adapters = saved
        a, b = adapters[::2], adapters[1::2]
        adapted = [(weight, grad) for weight, grad in zip(weights, over, strict=True) if weight.rank]
        up = None
        if adapters:
            up = torch.cat(
                [(grad @ one.to(dtype)).mul_(weight.scaling) for (weight, grad), one in zip(adapted, b, strict=True)], 1
            )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = over[0] @ weights[0].dense(dtype)
            for weight, grad in zip(weights[1:], over[1:], strict=True):
                grad_x.addmm_(grad, weight.dense(dtype))
            if up is not None:
                grad_x.addmm_(up, torch.cat(a).to(dtype))
            grad_x = grad_x.view(ctx.shape)
        given: list[torch.Tensor | None] = [grad_x, None]
        if up is not None:
            grads_a = (up.t() @ flat).to(a[0].dtype).split([weight.rank for weight, _ in adapted])
            for (weight, grad), part, of_a, of_b in zip(adapted, _parts(low, weights), grads_a, b, strict=True):
                given += [of_a, ((grad.t() @ part) * weight.scaling).to(of_b.dtype)]
        return tuple(given)


def _parts(low: torch.Tensor | None, weights: Sequence[_Weight]) -> Any:
    """The product with all A, as each adapter's own columns."""
    return iter(()) if low is None else iter(low.split([weight.rank for weight in weights if weight.rank], dim=1))


class _Siblings:
    """Layers that their module gives the same input, one after the other: the first that is asked computes for all."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self.layers = list(layers)
        self.weights = [_Weight.of(layer) for layer in layers]
        self._adapters = [_adapter(layer) for layer in layers]
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What layer `index` makes of `x`."""
        if self._input is not x or index not in self._waiting:
            asked = range(len(self.layers)) if index == 0 else [index]
            self._input, self._waiting = x, dict(zip(asked, self._products(x, asked), strict=True))
        out = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return out

    def forget(self) -> None:
        """Drops what waits for siblings that will not be asked, with the graph behind it."""
        self._input = None
        self._waiting = {}

    def _products(self, x: torch.Tensor, asked: Sequence[int]) -> list[torch.Tensor]:
        weights = [self.weights[index] for index in asked]
        adapters = [half.weight for index in asked for half in self._adapters[index]]
        outs = _Products.apply(x.to(weights[0].dtype), weights, *adapters)
        return [out.to(x.dtype) for out in outs]


def _adapter(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """A and B."""
    if not isinstance(layer, LoraLinear4bit):
        return []
    [name] = layer.lora_A
    return [layer.lora_A[name], layer.lora_B[name]]


def fuse_adapters(model: torch.nn.Module) -> int:
    """Gives every plain 4-bit layer, with a plain LoRA adapter or none, the fused product; the number of such layers.

    Layers that do more (dropout, DoRA or another variant, several adapters) keep PEFT's own way, and so does every layer where its
    adapter is merged, switched off or where nothing is trained.
    """
    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, LoraLinear4bit)}
    count = 0
    for parent in model.modules():
        plain = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, bnb.nn.Linear4bit | LoraLinear4bit) and id(child) not in inside and _is_plain(child)
        }
        groups = [[plain.pop(name) for name in names] for names in _SAME_INPUT if plain.keys() >= set(names)]
        for group in [*groups, *([child] for child in plain.values())]:
            siblings = _Siblings(group)
            for index, layer in enumerate(group):
                forward = types.MethodType(_forward(siblings, index), layer)
                setattr(layer, "forward", forward)  # noqa: B010 - mypy forbids the assignment
                setattr(_base(layer), "siblings", siblings)  # noqa: B010
            count += len(group)
    return count


def forget_waiting(model: torch.nn.Module) -> None:
    """After a pass that did not come to its end: frees what layers hold for their siblings."""
    for siblings in _all_siblings(model):
        siblings.forget()


def unpack_weights(model: torch.nn.Module, room: int) -> int:
    """Keeps weights of fused layers unpacked in addition, as many as `room` bytes hold; the bytes that they take.

    The numbers are those that every pass unpacks otherwise: nothing changes but speed.
    """
    taken = 0
    for weight in _fused(model):
        size = weight.state.shape.numel() * weight.dtype.itemsize
        if taken + size <= room:
            weight.unpacked = weight.dense(weight.dtype)
            taken += size
    return taken


def pack_weights(model: torch.nn.Module) -> None:
    """Frees what `unpack_weights` has kept."""
    for weight in _fused(model):
        weight.unpacked = None


@contextlib.contextmanager
def unpacked(module: torch.nn.Module) -> Iterator[None]:
    """For this time the 4-bit weights of fused layers inside are unpacked: once each, and not at every use."""
    packed = [weight for weight in _fused(module) if weight.unpacked is None]
    try:
        for weight in packed:
            weight.unpacked = weight.dense(weight.dtype)
        yield
    finally:
        for weight in packed:
            weight.unpacked = None


def _fused(model: torch.nn.Module) -> list[_Weight]:
    return [weight for siblings in _all_siblings(model) for weight in siblings.weights]


def _all_siblings(model: torch.nn.Module) -> list[_Siblings]:
    """Each group once, in the order of the layers."""
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
        # Without gradients a layer is fused only in training: there a checkpointed layer's first pass asks for none.
        is_trained = torch.is_grad_enabled() or layer.training
        if not is_trained or args or kwargs or any(map(_is_off, siblings.layers)):
            return type(layer).forward(layer, x, *args, **kwargs)
        return siblings.output(index, x)

    return forward


def _is_off(layer: torch.nn.Module) -> bool:
    return isinstance(layer, LoraLinear4bit) and (layer.disable_adapters or layer.merged)
