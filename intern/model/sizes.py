"""How much memory a base's weights take, counted before they are loaded."""

import torch

from intern.errors import UserError
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import Quantization, stored_quantization
from intern.units import GIB

_MOST_PARAMETERS_ON_CPU = 500_000_000  # beyond this one optimizer step on a CPU takes minutes


def weight_bytes(base: Base, quant: Quantization | None, dtype: torch.dtype) -> int | None:
    """Return the bytes that the weights take on their device.

    Only the layers that transformers replaces are quantized. Embeddings, the head, norms, and experts that a mixture of experts stores as
    one three-dimensional tensor stay in `dtype`.

    Args:
        base: the model; its weights are not loaded.
        quant: conf/quant; a quantization that the model was published with takes its place.
        dtype: of weights that are not quantized.

    Returns:
        None if the model was published in a quantization whose size is not known here.
    """
    if getattr(base.config, "quantization_config", None):
        quant = stored_quantization(base.config)
        if quant is None:
            return None
    model = quant.converted(base.skeleton) if quant is not None else base.skeleton
    layers = quant.layers(model) if quant is not None else []
    quantized = {id(layer.weight) for layer in layers}
    full = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in quantized)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return full * dtype.itemsize + buffers + sum(quant.layer_bytes(layer) for layer in layers if quant is not None)


def check_fit(base: Base, quant: Quantization | None, precision: Precision) -> None:
    """Raise UserError if the weights alone are too large for this machine."""
    if precision.device == "cpu":
        if (count := base.parameters()) > _MOST_PARAMETERS_ON_CPU:
            raise UserError(
                f"{base.name} has {count / 1e9:.1f} billion parameters: it needs a CUDA GPU; experiment=tiny_cpu runs here"
            )
        return
    need = weight_bytes(base, quant, precision.dtype)
    if need is None:
        return
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = min(torch.cuda.mem_get_info()[0] + cached, _process_cap() - torch.cuda.memory_allocated())
    if need > free:
        chosen = stored_quantization(base.config) or quant
        remedy = "choose a smaller model" if chosen is not None and chosen.is_smallest else "use quant=nf4_fp16"
        raise UserError(
            f"{base.name} needs {need / GIB:.1f} GiB for its weights, {free / GIB:.1f} GiB of GPU memory are free: {remedy}"
        )


def _process_cap() -> int:
    """Return the bytes of GPU memory that this process may use (torch.cuda.set_per_process_memory_fraction)."""
    fraction = torch.cuda.get_per_process_memory_fraction()
    return int(torch.cuda.get_device_properties(0).total_memory * fraction)
