"""A frozen 4-bit weight and its LoRA adapter as one autograd node: what PEFT and bitsandbytes compute, with fewer kernels and copies.

PEFT adds the adapter's product to the base's in operations of their own: a copy of the base's output, a scaled copy of the adapter's, and
their sum, each as large as the layer's output, and autograd keeps what each needs. Here both products go into one tensor, the weight is
dequantized once forward and once backward, and only the layer's input and the product with A (tokens x rank) are kept.
"""

import types
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit


class _Product(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T for a quantized W; gradients for x, A and B (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, packed: torch.Tensor, state: Any, scaling: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.to(x.dtype).t()
        out = flat @ _weight(packed, state, x.dtype).t()
        out.addmm_(low, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, low, a, b, packed)
        ctx.state, ctx.scaling = state, scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [grad] = grads
        flat, low, a, b, packed = ctx.saved_tensors
        over = grad.reshape(-1, grad.shape[-1])
        up = over @ b.to(over.dtype)
        up *= ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = over @ _weight(packed, ctx.state, over.dtype)
            grad_x.addmm_(up, a.to(over.dtype))
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        grad_a = (up.t() @ flat).to(a.dtype)
        grad_b = ((over.t() @ low) * ctx.scaling).to(b.dtype)
        return grad_x, grad_a, grad_b, None, None, None


def _weight(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(packed, state).to(dtype)


def fuse_adapters(model: torch.nn.Module) -> int:
    """Gives every plain LoRA layer over a 4-bit weight the fused product; the number of such layers.

    Layers that do more (dropout, DoRA or another variant, several adapters, a bias) keep PEFT's own way, and so does every layer where
    its adapter is merged, switched off or where nothing is trained.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear4bit) and _is_plain(module)]
    for layer in layers:
        setattr(layer, "forward", types.MethodType(_forward, layer))  # noqa: B010 - mypy forbids the assignment
    return len(layers)


def _is_plain(layer: LoraLinear4bit) -> bool:
    [*adapters] = layer.lora_A
    return (
        adapters == layer.active_adapters
        and len(adapters) == 1
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[adapters[0]], torch.nn.Identity)
        and layer.lora_A[adapters[0]].bias is None
        and layer.lora_B[adapters[0]].bias is None
        and layer.get_base_layer().bias is None
    )


def _forward(layer: LoraLinear4bit, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not torch.is_grad_enabled() or layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    [name] = layer.lora_A
    base: Any = layer.get_base_layer()
    dtype = base.compute_dtype or x.dtype
    weight = base.weight
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    out: Any = _Product.apply(x.to(dtype), a, b, weight, weight.quant_state, layer.scaling[name])
    return out.to(x.dtype)
