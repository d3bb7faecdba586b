"""conf/model -> tokenizer and base model, quantized while it loads."""

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from intern.config.build import check_names, plain
from intern.errors import UserError
from intern.kernels.isolated_attention import KNOWN, NAME, register
from intern.model.attention import choose_attention
from intern.model.precision import Precision
from intern.model.quantized_cache import QuantizedCache, used
from intern.paths import find
from intern.units import GIB

log = logging.getLogger(__name__)

_KEYS = [
    "pretrained_model_name_or_path",
    "revision",
    "attn_implementation",
    "quantized_cache",
    "quantized_cache_gib",
]
_MOST_PARAMETERS_ON_CPU = 500_000_000  # beyond this one optimizer step on a CPU takes minutes


class Base:
    """A base model by name: its files are found and its configuration is read at once, its weights only on `load`."""

    def __init__(self, node: DictConfig) -> None:
        """Raises UserError where the model is not there, is gated, or the keys are wrong."""
        self._arguments = plain(node)
        check_names(self._arguments, _KEYS, "model")
        if not isinstance(self._arguments.get("pretrained_model_name_or_path"), str):
            raise UserError("model.pretrained_model_name_or_path: give a folder or a model's name on the hub")
        name = self._arguments.pop("pretrained_model_name_or_path")
        attention, revision = self._arguments.get("attn_implementation"), self._arguments.get("revision")
        if (
            attention is not None and attention not in KNOWN
        ):  # a name with a slash would fetch a kernel, that is code, from the hub
            raise UserError(f"model.attn_implementation={attention}: must be one of {', '.join(KNOWN)}")
        if revision is not None and not isinstance(revision, str):
            raise UserError(f"model.revision={revision}: must be a branch, a tag or a commit, as text")
        self._cache = _cache(
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
        self.config: PreTrainedConfig = self._fetch(AutoConfig)
        self.longest: int | None = None  # tokens of the longest training row

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token that is never the end of a turn where the vocabulary has one to spare."""
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
            UserError: a configuration that makes no causal language model.
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
        ) as error:  # of any model's code
            raise UserError(
                f"model.pretrained_model_name_or_path={self.name}: its config.json makes no language model "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        return skeleton

    def parameters(self) -> int:
        """The number of weights, counted without loading them."""
        return self.skeleton.num_parameters()

    def check_fit(self, quant: BitsAndBytesConfig | None, precision: Precision) -> None:
        """Raises UserError where the weights alone are too large for this machine."""
        count = self.parameters()
        if precision.device == "cpu":
            if count > _MOST_PARAMETERS_ON_CPU:
                raise UserError(
                    f"{self.name} has {count / 1e9:.1f} billion parameters: it needs a CUDA GPU; experiment=tiny_cpu runs here"
                )
            return
        need = self.weight_bytes(quant, precision.dtype)
        if need is None:
            return
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = min(torch.cuda.mem_get_info()[0] + cached, _process_cap() - torch.cuda.memory_allocated())
        if need > free:
            remedy = "take a smaller model" if self._is_4bit(quant) else "take quant=nf4_fp16"
            raise UserError(
                f"{self.name} needs {need / GIB:.1f} GiB for its weights, {free / GIB:.1f} GiB of GPU memory are free: {remedy}"
            )

    def weight_bytes(self, quant: BitsAndBytesConfig | None, dtype: torch.dtype) -> float | None:
        """What the weights take on their device; None where the model was quantized in a way whose size is not known here."""
        if getattr(self.config, "quantization_config", None) and not self._is_4bit(quant):
            return None
        count = self.parameters()
        text = self.config.get_text_config()
        embeddings = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
        plain = torch.empty(0, dtype=dtype).element_size()
        # NF4 with double quantization: 4 bits a weight and 0.127 bits of scales (QLoRA, arXiv:2305.14314, section 3).
        weight = 4.127 / 8 if self._is_4bit(quant) else plain
        return embeddings * plain + (count - embeddings) * weight

    def _is_4bit(self, quant: BitsAndBytesConfig | None) -> bool:
        stored = getattr(self.config, "quantization_config", None) or {}
        return bool((quant is not None and quant.load_in_4bit) or stored.get("load_in_4bit"))

    def load(self, quant: BitsAndBytesConfig | None, precision: Precision) -> PreTrainedModel:
        """The model on its device, each weight quantized as it arrives: neither host nor GPU ever holds the whole of it unquantized."""
        stored = getattr(self.config, "quantization_config", None)
        if stored is not None and quant is not None:
            log.info(
                "%s is quantized already: its own quantization stands, quant/ only sets the compute dtype", self.name
            )
        arguments = {
            "dtype": precision.dtype,
            "device_map": {"": 0 if precision.device == "cuda" else "cpu"},
            "attn_implementation": self._attention(),
            "use_safetensors": True,
        }
        entry = None
        if self._cache is not None and quant is not None and quant.load_in_4bit and stored is None:
            entry = self._cache.entry(self.name, self.config, quant, precision.dtype)
        model = self._from_cache(entry, arguments)
        if model is None:
            model = self._fetch(
                AutoModelForCausalLM, quantization_config=None if stored is not None else quant, **arguments
            )
            if self._cache is not None and entry is not None:
                self._cache.store(model, entry, self.name)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype = precision.dtype
                module.compute_type_is_set = True
                weight: Any = module.weight
                if weight.quant_state is not None:  # a stored quantization may name another dtype to unpack to
                    weight.quant_state.dtype = precision.dtype
                # On CPUs with AVX512-BF16 the first evaluation repacks the weight in place, and gradients are wrong from then on.
                module.support_avx512bf16_for_cpu = False
        model.config.use_cache = True
        return model

    def _from_cache(self, entry: Path | None, arguments: dict[str, Any]) -> PreTrainedModel | None:
        if entry is None or not entry.is_dir():
            return None
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                entry, trust_remote_code=False, local_files_only=True, **arguments
            )
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("%s cannot be read (%s): quantizing anew", entry, " ".join(str(error).split())[:200])
            shutil.rmtree(entry, ignore_errors=True)
            return None
        used(entry)
        log.info("quantized base read from %s", entry)
        model.name_or_path = model.config._name_or_path = self.name  # what an adapter names as its base
        return model

    def _attention(self) -> str | None:
        name = choose_attention(self.config, self._arguments.get("attn_implementation"), self.longest).name
        return register() if name == NAME else name

    def _fetch(self, loader: Any, **arguments: Any) -> Any:
        if self._revision is not None and not Path(self.name).is_dir():
            arguments["revision"] = self._revision
        key = f"model.pretrained_model_name_or_path={self.name}"
        try:
            # Code that a model brings along is never run, and nobody is asked whether it may be.
            return loader.from_pretrained(self.name, trust_remote_code=False, **arguments)
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise UserError(f"{key}: {_explain(error, self._revision)}") from error


def _cache(folder: Any, gib: Any) -> QuantizedCache | None:
    if folder is None:
        return None
    if not isinstance(folder, str) or not folder:
        raise UserError(f"model.quantized_cache={folder}: must be a folder, or null for none")
    if isinstance(gib, bool) or not isinstance(gib, int | float):
        raise UserError(f"model.quantized_cache_gib={gib}: must be a number of GiB")
    return QuantizedCache(Path(folder).expanduser(), int(gib * GIB))


def _process_cap() -> int:
    """Bytes of GPU memory that this process may take (torch.cuda.set_per_process_memory_fraction)."""
    fraction = torch.cuda.get_per_process_memory_fraction()
    return int(torch.cuda.get_device_properties(0).total_memory * fraction)


def _explain(error: BaseException, revision: str | None) -> str:
    """The reason why a model could not be had, and the remedy, from the chain of errors that the libraries raised."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    kinds = tuple(type(one) for one in chain)

    def raised(kind: type[BaseException]) -> bool:
        return any(issubclass(one, kind) for one in kinds)

    if any("trust_remote_code" in str(one) for one in chain):
        return "brings code of its own, which is never run here: take a model that transformers itself knows"
    if raised(GatedRepoError):
        return "gated: accept its licence on its page, then `hf auth login`; model=llama3_8b_nf4 needs no account"
    if raised(RepositoryNotFoundError):
        return "not on the hub, or private: check the name, or `hf auth login`"
    if any(raised(kind) for kind in (OfflineModeIsEnabled, ConnectionError, LocalEntryNotFoundError)):
        return "not in the local cache, and the hub cannot be reached: check the network, or give a folder"
    if raised(EntryNotFoundError):
        return f"a file is missing there (revision {revision}): check the name and model.revision"
    return " ".join(str(error).split())[:300]
