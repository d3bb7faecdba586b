"""conf/model -> a base model: its files are located, its configuration and tokenizer read, its weights loaded, quantized on the way."""

import functools
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HfHubHTTPError
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from intern.config.build import check_names, plain
from intern.errors import UserError
from intern.kernels.isolated_attention import KNOWN, NAME, register
from intern.model.attention import choose_attention
from intern.model.hub_errors import explain
from intern.model.precision import Precision
from intern.model.quant import Quantization, stored_quantization
from intern.model.quantized_cache import build_cache
from intern.paths import find

log = logging.getLogger(__name__)

_KEYS = [
    "pretrained_model_name_or_path",
    "revision",
    "attn_implementation",
    "quantized_cache",
    "quantized_cache_gib",
]


class Base:
    """A base model by name. Its configuration is read at once, its weights only by `load`.

    Attributes:
        name: a folder, or a name on the hub.
        config: transformers' configuration.
    """

    def __init__(self, node: DictConfig, config: PreTrainedConfig | None = None) -> None:
        """Locate the model.

        Args:
            node: conf/model.
            config: of a model whose files are not here; None reads its config.json.

        Raises:
            UserError: the model is missing or gated, or a key is wrong.
        """
        self._arguments = plain(node)
        check_names(self._arguments, _KEYS, "model")
        if not isinstance(self._arguments.get("pretrained_model_name_or_path"), str):
            raise UserError("model.pretrained_model_name_or_path: give a folder or a model's name on the hub")
        name = self._arguments.pop("pretrained_model_name_or_path")
        attention, revision = self._arguments.get("attn_implementation"), self._arguments.get("revision")
        if attention is not None and attention not in KNOWN:  # a name with a slash would fetch a kernel, which is code
            raise UserError(f"model.attn_implementation={attention}: must be one of {', '.join(KNOWN)}")
        if revision is not None and not isinstance(revision, str):
            raise UserError(f"model.revision={revision}: must be a branch, a tag or a commit, as text")
        self._cache = build_cache(
            self._arguments.pop("quantized_cache", None), self._arguments.pop("quantized_cache_gib", None)
        )
        folder = find(name)
        self.name = str(folder) if folder is not None and folder.is_dir() else name
        if folder is None and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise UserError(f"model.pretrained_model_name_or_path={name}: no such folder")
        self._revision = self._arguments.get("revision")
        if (Path(self.name) / "adapter_config.json").exists():  # transformers would load whatever base that file names
            raise UserError(
                f"model.pretrained_model_name_or_path={name}: is an adapter's folder: give the base model's"
            )
        self.config: PreTrainedConfig = config if config is not None else self._fetch(AutoConfig)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Its padding token is never the end of a turn if the vocabulary has an unused one."""
        tokenizer: PreTrainedTokenizerBase = self._fetch(AutoTokenizer)
        if tokenizer.pad_token is None:
            vocabulary = tokenizer.get_vocab()
            spare = [
                token
                for token in ("<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<unk>")
                if token in vocabulary
            ]
            # Labels and attention masks are explicit, so even a shared padding token cannot hide an end of turn from the loss.
            tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
        return tokenizer

    @functools.cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights: its modules on the meta device, which takes no memory.

        Raises:
            UserError: the configuration is not that of a causal language model.
        """
        try:
            with torch.device("meta"):
                skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except (
            ValueError,
            TypeError,
            ZeroDivisionError,
            RuntimeError,
            KeyError,
            AttributeError,
        ) as error:  # by any model
            raise UserError(
                f"model.pretrained_model_name_or_path={self.name}: its config.json makes no language model "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        return skeleton

    @property
    def embeddings(self) -> int:
        """How many tokens the model has embeddings for; its tokenizer may have fewer."""
        return cast(nn.Embedding, self.skeleton.get_input_embeddings()).num_embeddings

    def parameters(self) -> int:
        """Return the number of weights, counted without loading them."""
        return self.skeleton.num_parameters()

    def load(self, quant: Quantization | None, precision: Precision, longest: int | None = None) -> PreTrainedModel:
        """Return the model on its device. Each weight is quantized as it arrives: no memory ever holds the whole model unquantized.

        Args:
            quant: conf/quant; the quantization that a model was published with takes its place.
            precision: the device, and the dtype of weights that are not quantized.
            longest: tokens of the longest training row, which decides the attention; None for a model that only answers.

        Raises:
            UserError: the weights cannot be had or read.
        """
        published = getattr(self.config, "quantization_config", None) is not None
        if published and quant is not None:
            log.info("%s is published quantized: quant/ only sets the compute dtype", self.name)
        arguments = {
            "dtype": precision.dtype,
            "device_map": {"": torch.cuda.current_device() if precision.device == "cuda" else "cpu"},
            "attn_implementation": self._attention(longest),
            "use_safetensors": True,
        }
        chosen = None if published else quant

        def quantize() -> PreTrainedModel:
            # The keyword must not be None: transformers would take that for "not quantized", whatever the model's own configuration says.
            quantization = {"quantization_config": chosen.config} if chosen is not None else {}
            model: PreTrainedModel
            model, report = self._fetch(AutoModelForCausalLM, output_loading_info=True, **quantization, **arguments)
            self._check_complete(model, report["missing_keys"], stored_quantization(self.config) or chosen)
            return model

        if self._cache is not None and chosen is not None and chosen.is_cached:
            model = self._cache.load_or_store(self.name, self.config, chosen.config, arguments, quantize)
        else:
            model = quantize()
        if (used := stored_quantization(self.config) or chosen) is not None:
            for layer in used.layers(model):
                used.finish(layer, precision.dtype)
        model.config.use_cache = True
        # Answers depend on conf/generation alone: generate() would take every key that is not given from the model's own file.
        model.generation_config = GenerationConfig()
        return model

    def _check_complete(self, model: PreTrainedModel, missing: Collection[str], quant: Quantization | None) -> None:
        """Raise UserError for weights that the files lack, which the library makes up, and for 4-bit weights of another shape."""
        if missing:
            first = sorted(missing)[0]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"model.pretrained_model_name_or_path={self.name}: its files lack {first}{more}, which its config.json implies"
            )
        if quant is None:
            return
        for name, layer in model.named_modules():
            if not isinstance(layer, quant.layer_class):
                continue
            found, wanted = quant.stored_shape(layer), (layer.out_features, layer.in_features)
            if found != wanted:
                raise UserError(
                    f"model.pretrained_model_name_or_path={self.name}: {name} has shape {list(found)} in its files, and its config.json "
                    f"implies {list(wanted)}"
                )

    def _attention(self, longest: int | None) -> str | None:
        name = choose_attention(self.config, self._arguments.get("attn_implementation"), longest).name
        return register() if name == NAME else name

    def _fetch(self, loader: Any, **arguments: Any) -> Any:
        if self._revision is not None and not Path(self.name).is_dir():
            arguments["revision"] = self._revision
        try:
            # Code that a model brings along is never run, and the user is not asked to allow it either.
            return loader.from_pretrained(self.name, trust_remote_code=False, **arguments)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, HfHubHTTPError, SafetensorError) as error:
            reason = explain(error, self._revision)
            raise UserError(f"model.pretrained_model_name_or_path={self.name}: {reason}") from error
