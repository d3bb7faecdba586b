"""Base and adapter -> the weights of one plain model, tensor by tensor, written as shards of safetensors.

PEFT's own merge of a 4-bit layer rounds the sum to 4 bits again and loses most of what was learned. Here each layer is dequantized to
float32, PEFT's merge of plain layers is applied to that one layer, and the result is rounded once, to the dtype of the files.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from intern.errors import RunError, UserError
from intern.units import GIB

SHARD = 2 * GIB  # bytes; what a merge keeps in host memory at most, next to one layer
Original = Callable[[str], torch.Tensor]
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def merged_tensors(model: Any, original: Original | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of the model with its adapter merged in, in float32 where an adapter or a quantization was.

    Args:
        model: a PeftModel with one adapter; it is not changed.
        original: returns the weight that the base was published with, by its name; None: the weights that the adapter was trained on,
            dequantized.

    Raises:
        UserError: an adapter of a kind that no plain layer can hold.
        RunError: merged weights that are NaN or infinite.
    """
    base = model.get_base_model()
    wrapped: list[str] = []
    for name, module in base.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        if isinstance(module, _WRAPPERS):
            wrapped.append(name)
        found = _merged(name, module, original) if isinstance(module, _WRAPPERS) else _plain(name, module, original)
        for key, tensor in found:
            yield f"{name}.{key}" if name else key, tensor


def write_merged(
    model: Any,
    skeleton: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    original: Original | None,
    shard: int = SHARD,
) -> bool:
    """Write the merged weights as model.safetensors, or as several files with an index, under the names of the base's own files.

    Args:
        model: a PeftModel with one adapter.
        skeleton: the base model on the meta device, which knows how its files name and split weights.
        folder: an existing folder.
        dtype: of the files.
        original: see `merged_tensors`.
        shard: bytes of a file at most, unless one tensor alone is larger.

    Returns:
        Whether input embeddings and output layer are still one tensor, if they were one in the base.
    """
    tied = bool(getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False))
    shards = _Shards(folder, shard)
    same, embedded = (_output_names(skeleton), _input_name(skeleton)) if tied else (set(), None)
    published = original if original is None else lambda name: original(embedded if name in same and embedded else name)
    embeddings: torch.Tensor | None = None
    for name, weight in merged_tensors(model, published):
        tensor = weight.detach().to("cpu", dtype if weight.is_floating_point() else weight.dtype).contiguous()
        if name == embedded:
            embeddings = tensor
        elif name in same and embeddings is not None:
            if torch.equal(tensor, embeddings):
                continue
            tied = False  # an adapter has changed one of the two
        for key, part in revert_weight_conversion(skeleton, {name: tensor}).items():
            shards.add(key, part.clone() if part.untyped_storage().nbytes() > part.nbytes else part)
    shards.close()
    return tied


class _Shards:
    """Tensors, one after another -> files of at most a given size, named when their number is known."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._open: dict[str, torch.Tensor] = {}
        self._size = self._total = 0
        self._places: dict[str, int] = {}
        self._count = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._open and self._size + tensor.nbytes > self._most:
            self._write()
        self._open[name] = tensor
        self._size += tensor.nbytes
        self._places[name] = self._count

    def close(self) -> None:
        self._write()
        if self._count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        names = [f"model-{index + 1:05d}-of-{self._count:05d}.safetensors" for index in range(self._count)]
        for index, name in enumerate(names):
            self._part(index).rename(self._folder / name)
        content = {
            "metadata": {"total_size": self._total},
            "weight_map": {key: names[shard] for key, shard in self._places.items()},
        }
        (self._folder / "model.safetensors.index.json").write_text(
            json.dumps(content, indent=2) + "\n", encoding="utf-8"
        )

    def _write(self) -> None:
        save_file(self._open, self._part(self._count), metadata={"format": "pt"})
        self._count, self._total, self._size, self._open = self._count + 1, self._total + self._size, 0, {}

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index}.safetensors"


def _plain(name: str, module: nn.Module, original: Original | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own weights, without those of modules in it."""
    for key, parameter in module.named_parameters(recurse=False):
        whole = f"{name}.{key}" if name else key
        if original is not None:
            yield key, original(whole)
        else:
            yield key, dequantize_module_weight(module).data if key == "weight" else parameter.data
    if buffers := dict(module.named_buffers(recurse=False)):
        persistent = module.state_dict()
        yield from ((key, buffer) for key, buffer in buffers.items() if key in persistent)


def _merged(name: str, module: Any, original: Original | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a module that PEFT has wrapped."""
    if isinstance(module, ModulesToSaveWrapper):
        [adapter] = module.active_adapters
        yield from module.modules_to_save[adapter].state_dict().items()
        return
    layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    if not isinstance(layer, lora.Linear | lora.Embedding | lora.LoraLayer | TrainableTokensLayer) or isinstance(
        layer, lora.ParamWrapper
    ):
        raise UserError(f"{name}: an adapter of {type(layer).__name__} cannot be merged: use format=adapter")
    plain = _plain_layer(name, layer.get_base_layer(), original)
    # A quantized layer's own merge would quantize the sum; that of a plain layer does the same sum on the plain layer.
    merge: Any = (
        lora.Linear.merge if isinstance(plain, nn.Linear) and isinstance(layer, lora.LoraLayer) else type(layer).merge
    )
    with _in_place_of(layer, plain):
        try:
            merge(layer, safe_merge=True)
        except (ValueError, RuntimeError) as error:
            raise RunError(f"{name}: cannot be merged: {' '.join(str(error).split())[:200]}") from error
        finally:
            layer.merged_adapters.clear()
    yield from plain.state_dict().items()


def _plain_layer(name: str, layer: Any, original: Original | None) -> nn.Module:
    """Return a layer of torch with the same weights in float32."""
    with torch.no_grad():
        weight = original(f"{name}.weight") if original is not None else dequantize_module_weight(layer).data
        weight = weight.to(layer.weight.device, torch.float32)
        if isinstance(layer, nn.Linear):  # bitsandbytes' layers too
            plain: Any = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.data.float().clone(), requires_grad=False)
        else:
            plain = copy.deepcopy(layer)
            for parameter in plain.parameters(recurse=False):
                parameter.data = parameter.data.float()
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return plain


@contextlib.contextmanager
def _in_place_of(layer: Any, plain: nn.Module) -> Iterator[None]:
    former = layer.base_layer
    layer.base_layer = plain
    try:
        yield
    finally:
        layer.base_layer = former


def _input_name(skeleton: PreTrainedModel) -> str:
    wanted = skeleton.get_input_embeddings()
    return next(f"{name}.weight" for name, module in skeleton.named_modules() if module is wanted)


def _output_names(skeleton: PreTrainedModel) -> set[str]:
    wanted = skeleton.get_output_embeddings()
    return {f"{name}.weight" for name, module in skeleton.named_modules() if module is wanted}
