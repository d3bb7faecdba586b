"""conf/quant -> a Quantization: how the base's linear layers are stored in fewer bits.

To add one, write a class below, or register one from outside in QUANTIZATIONS, and give it a file in conf/quant.
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from omegaconf import DictConfig
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from intern.config.build import build, plain

_NF4_BLOCK, _SCALE_BLOCK = 64, 256  # weights that share a scale; scales that share a scale


class Quantization(ABC):
    """One way to quantize: what loading, the size estimate and the doctor need to know of it.

    Attributes:
        key: the key of conf/quant that selects it if true.
        config_class: the class of transformers whose keyword arguments conf/quant holds.
        layer_class: what the base's linear layers become.
        is_smallest: whether no other quantization here takes less memory.
        is_cached: whether a base that was quantized so is kept in model.quantized_cache.
    """

    key: ClassVar[str]
    config_class: ClassVar[type[Any]] = BitsAndBytesConfig
    layer_class: ClassVar[type[torch.nn.Module]]
    is_smallest: ClassVar[bool] = False
    is_cached: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        """Args: config: an object of `config_class`."""
        self.config = config

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of matmuls that the configuration chooses; None if they compute in the dtype of their inputs."""
        return None

    @abstractmethod
    def layer_bytes(self, layer: Any) -> int:
        """Return the bytes of a quantized layer's weight with its scales, from its shape alone."""

    @abstractmethod
    def stored_shape(self, layer: Any) -> tuple[int, ...]:
        """Return the shape of the weight that a loaded layer holds, whatever its module was made for: (out_features, in_features)."""

    @abstractmethod
    def finish(self, layer: Any, dtype: torch.dtype) -> None:
        """Prepare a loaded layer for computing in `dtype`."""

    @abstractmethod
    def self_test(self, device: str) -> float:
        """Quantize a matrix of values from -1 to 1 on `device` and restore it; return the mean absolute error."""

    def converted(self, skeleton: PreTrainedModel) -> PreTrainedModel:
        """Return a copy of a model on the meta device with the layers replaced that loading will replace, by transformers' own rules."""
        model = copy.deepcopy(skeleton)
        AutoHfQuantizer.from_config(self.config, pre_quantized=False).preprocess_model(model, device_map=None)
        return model

    def layers(self, model: torch.nn.Module) -> list[Any]:
        """Return the quantized layers of a model."""
        return [module for module in model.modules() if isinstance(module, self.layer_class)]


class FourBit(Quantization):
    """bitsandbytes' 4-bit data types: NF4 of QLoRA (arXiv:2305.14314), or FP4."""

    key = "load_in_4bit"
    layer_class = bnb.nn.Linear4bit
    is_smallest = True
    is_cached = True

    @property
    def name(self) -> str:
        return str(self.config.bnb_4bit_quant_type)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.config.bnb_4bit_compute_dtype

    def layer_bytes(self, layer: Any) -> int:
        """4 bits per weight, and 0.127 bits of scales with double quantization (section 3 of the paper), 0.5 without."""
        count = layer.in_features * layer.out_features
        scales = math.ceil(count / _NF4_BLOCK)
        tables = 16 * 4  # the 16 values of the data type
        if not self.config.bnb_4bit_use_double_quant:
            return math.ceil(count / 2) + scales * 4 + tables
        return math.ceil(count / 2) + scales + math.ceil(scales / _SCALE_BLOCK) * 4 + 4 + tables

    def stored_shape(self, layer: Any) -> tuple[int, ...]:
        return tuple(layer.weight.shape if layer.weight.quant_state is None else layer.weight.quant_state.shape)

    def finish(self, layer: Any, dtype: torch.dtype) -> None:
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True
        if layer.weight.quant_state is not None:
            layer.weight.quant_state.dtype = dtype  # a stored quantization may name another dtype to dequantize to
        # On CPUs with AVX512-BF16 the first evaluation would repack the weight in place, and later gradients would be wrong.
        layer.support_avx512bf16_for_cpu = False

    def self_test(self, device: str) -> float:
        matrix = _test_matrix(device)
        packed, state = bnb.functional.quantize_4bit(
            matrix, quant_type=self.name, compress_statistics=self.config.bnb_4bit_use_double_quant
        )
        return float((bnb.functional.dequantize_4bit(packed, state) - matrix).abs().mean())


class EightBit(Quantization):
    """LLM.int8() (arXiv:2208.07339): one byte per weight and a scale per row; activations are quantized while they are multiplied."""

    key = "load_in_8bit"
    layer_class = bnb.nn.Linear8bitLt
    name = "int8"

    def layer_bytes(self, layer: Any) -> int:
        return layer.in_features * layer.out_features + layer.out_features * 4

    def stored_shape(self, layer: Any) -> tuple[int, ...]:
        return tuple(layer.weight.shape)

    def finish(self, layer: Any, dtype: torch.dtype) -> None:
        """Nothing to do: it computes in the dtype of its inputs."""

    def self_test(self, device: str) -> float:
        matrix = _test_matrix(device)
        packed, scales, _ = bnb.functional.int8_vectorwise_quant(matrix.half())
        return float((bnb.functional.int8_vectorwise_dequant(packed, scales) - matrix).abs().mean())


QUANTIZATIONS: list[type[Quantization]] = [FourBit, EightBit]


def build_quant(node: DictConfig | None) -> Quantization | None:
    """Return the quantization of the base model; None for quant=none, to which an experiment may still have added keys.

    Raises:
        UserError: an unknown key, or a value that the library refuses.
    """
    values = plain(node)
    kind = next((kind for kind in QUANTIZATIONS if values.get(kind.key)), None)
    config = build(kind.config_class if kind is not None else BitsAndBytesConfig, values, "quant")
    return kind(config) if kind is not None else None


def stored_quantization(config: PreTrainedConfig) -> Quantization | None:
    """Return the quantization of a model that was published quantized; None if it is not, or in a way that is not known here."""
    stored = getattr(config, "quantization_config", None) or {}
    values = stored if isinstance(stored, dict) else stored.to_dict()
    kind = next((kind for kind in QUANTIZATIONS if values.get(kind.key)), None)
    return kind(kind.config_class.from_dict(values)) if kind is not None else None


def _test_matrix(device: str) -> torch.Tensor:
    return torch.linspace(-1, 1, 128 * 128, device=device).reshape(128, 128)
