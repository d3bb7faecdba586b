"""A GGUF file in 16 bits -> the same in llama.cpp's Q4_K_M, tensor by tensor.

The recipe is that of llama.cpp's own quantizer for dense models: most matrices in Q4_K (4.5 bits per weight), those to which answers are
most sensitive in Q6_K (6.6 bits), vectors as they are. Both types need rows of a multiple of 256 weights; others take the next larger type.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 256  # weights
_LAYER = re.compile(r"blk\.(\d+)\.")


def quantize(source: Path, target: Path) -> None:
    """Write `target` with the metadata of `source` and quantized weights.

    Args:
        source: a GGUF file in F16, BF16 or F32.
        target: must not exist.
    """
    import gguf
    import libgguf

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    has_output = any(tensor.name == "output.weight" for tensor in reader.tensors)
    kinds = {tensor.name: kind_of(tensor, layers, has_output) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value = gguf.LlamaFileType.MOSTLY_Q4_K_M.value if field.name == "general.file_type" else field.contents()
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        kind = kinds[tensor.name]
        shape = [int(size) for size in reversed(tensor.shape)]
        if kind is not None:
            shape[-1] = libgguf.row_size(kind, shape[-1])
        raw = np.uint8 if kind is not None else tensor.data.dtype
        size = int(np.prod(shape)) * np.dtype(raw).itemsize
        writer.add_tensor_info(tensor.name, shape, np.dtype(raw), size, raw_dtype=kind or tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        kind = kinds[tensor.name]
        if kind is None:
            writer.write_tensor_data(tensor.data)
            continue
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        flat = rows.reshape(-1, rows.shape[-1])
        writer.write_tensor_data(np.ascontiguousarray(libgguf.quantize_rows(flat, kind)))
    writer.close()


def kind_of(tensor: Any, layers: int, has_output: bool) -> Any:
    """Return the type of a tensor in Q4_K_M; None: it stays as it is.

    Args:
        tensor: of gguf's reader; its shape begins with the length of a row.
        layers: of the model.
        has_output: whether the output layer is a tensor of its own, not the embeddings.
    """
    from gguf import GGMLQuantizationType as Kind

    if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or "norm" in tensor.name:
        return None
    found = _LAYER.match(tensor.name)
    layer = int(found[1]) if found else 0
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    is_output = tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and not has_output)
    is_sensitive = is_output or (more and tensor.name.endswith((".attn_v.weight", ".ffn_down.weight")))
    if int(tensor.shape[0]) % _BLOCK == 0:
        return Kind.Q6_K if is_sensitive else Kind.Q4_K
    if int(tensor.shape[0]) % 32 == 0:
        return Kind.Q8_0 if is_sensitive else Kind.Q5_0
    return None
