"""adapter/ of an untrusted run -> its LoRA configuration, once its files are known to be an adapter and nothing else.

An adapter is exactly the tensors that its configuration adds to the base model, of the right shapes, floating and finite. Anything that
would change the base itself is refused: "base" in every table is the untouched base model.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from intern.errors import UserError
from intern.runs.adapter_tensors import LARGEST, implied_tensors, with_adapter, wrapped_by
from intern.runs.files import check_file, check_folder
from intern.runs.patterns import PLAIN_NAME, check_patterns, without_patterns
from intern.runs.untrusted import json_object
from intern.units import MIB

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_JSON, _TOKENIZER = 16 * MIB, 128 * MIB  # bytes
# What training writes into adapter/, and the size in bytes beyond which each is refused (weights: see `check_tensors`).
FILES = {
    _WEIGHTS: None,
    _CONFIG: MIB,
    "tokenizer.json": _TOKENIZER,
    "tokenizer_config.json": _JSON,
    "special_tokens_map.json": _JSON,
    "added_tokens.json": _JSON,
    "chat_template.jinja": MIB,
    "vocab.json": _JSON,
    "vocab.txt": _JSON,
    "merges.txt": _JSON,
    "tokenizer.model": _JSON,
}
# Keys of PEFT's configuration that import modules, read other models, or change the base: none is needed to answer.
_ACTING = (
    "auto_mapping",
    "megatron_config",
    "layer_replication",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "arrow_config",
    "kasa_config",
)
_MADE_BY = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config", *_ACTING)
HARMLESS_INITS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
    "mica",
)  # PEFT's others subtract something from the base's weights
_PLAIN_NAMES = (
    "modules_to_save",
    "layers_pattern",
    "target_parameters",
    "trainable_token_indices",
)  # PEFT would match them by re
_FLOATING = ("F16", "BF16", "F32", "F64")  # safetensors' names


def check_adapter(folder: Path, root: Path) -> "LoraConfig":
    """Return the LoRA configuration of adapter/ after checking its files. No weights are read; `check_tensors` does that.

    Args:
        folder: adapter/ of the run.
        root: the run directory.

    Raises:
        UserError: names the file.
    """
    try:
        names = check_folder(folder, root)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({type(error).__name__}): is {root} a finished run?") from error
    if _WEIGHTS not in names:
        raise UserError(f"{folder / _WEIGHTS}: is missing, and weights in no other form are loaded")
    for name in names:
        file = folder / name
        if name not in FILES:
            raise UserError(f"{file}: not a file that training writes there: refused; remove it if you trust the rest")
        most, size = FILES[name], check_file(file, root)
        if most is not None and size > most:
            raise UserError(f"{file}: larger than {most / MIB:g} MiB: refused")
    _check_tokenizer(folder, root)
    return _lora(folder, root)


def check_readable(lora: "LoraConfig", skeleton: "PreTrainedModel") -> None:
    """Check before training that a run with this adapter can be asked: its stored configuration passes what loading it checks.

    Args:
        lora: conf/lora, for this model.
        skeleton: the base model on the meta device; it is not changed.

    Raises:
        UserError: names the key of conf/lora.
    """
    from peft import LoraConfig

    stored = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
    place = Path("lora")
    try:
        read = read_lora(json.loads(json.dumps(stored)), place)
        modules, parameters = names_of(skeleton, read)
        read = without_patterns(read, modules, place, parameters)
        implied_tensors(read, skeleton, place)
        head = with_adapter(read, skeleton, place).get_output_embeddings()
        if type(head) is not type(skeleton.get_output_embeddings()):
            raise UserError(
                f"{wrapped_by(head)}: reaches the model's output layer, from whose own weights the loss is computed: leave it out"
                + (
                    " (the embeddings are the same tensor)"
                    if skeleton.config.get_text_config().tie_word_embeddings
                    else ""
                )
            )
    except UserError as error:
        message = str(error).removeprefix(f"{place}: ")
        key = re.match(r"\w*", message)
        names_key = key is not None and key[0] in {field.name for field in dataclasses.fields(LoraConfig)}
        raise UserError(f"lora.{message}" if names_key else f"lora: {message}") from error


def names_of(skeleton: "PreTrainedModel", lora: "LoraConfig") -> tuple[list[str], list[str]]:
    """Return the names of a model's modules, and of its parameters if parameters have adapters of their own, as experts do."""
    modules = [name for name, _ in skeleton.named_modules()]
    return modules, [name for name, _ in skeleton.named_parameters()] if lora.target_parameters else []


def check_tensors(lora: "LoraConfig", skeleton: "PreTrainedModel", folder: Path) -> "LoraConfig":
    """Check that the adapter's weights are exactly the tensors that its configuration adds to this base model.

    Args:
        lora: from `check_adapter`.
        skeleton: the base model on the meta device; it is not changed.
        folder: adapter/ of the run.

    Returns:
        The configuration with the names of modules in place of regular expressions, which PEFT would match without a time limit.

    Raises:
        UserError: names the file, and the first tensor that is missing, additional, of another shape, integer, or not finite.
    """
    modules, parameters = names_of(skeleton, lora)
    lora = without_patterns(lora, modules, folder / _CONFIG, parameters)
    wanted = implied_tensors(lora, skeleton, folder / _CONFIG)
    weights = folder / _WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is not a dictionary
            if missing := sorted(wanted.keys() - found):
                raise UserError(
                    f"{weights}: lacks {_some(missing)}, which {folder / _CONFIG} implies for this base model"
                )
            if more := sorted(found.keys() - wanted.keys()):
                raise UserError(
                    f"{weights}: has {_some(more)}, which {folder / _CONFIG} does not imply: not a tensor of the adapter"
                )
            for name, shape in wanted.items():
                if list(found[name].get_shape()) != shape:
                    raise UserError(
                        f"{weights}: {name} has shape {list(found[name].get_shape())}; {folder / _CONFIG} and the base imply {shape}"
                    )
                if found[name].get_dtype() not in _FLOATING:
                    raise UserError(
                        f"{weights}: {name} has type {found[name].get_dtype()}: adapters are floating point"
                    )
            for name in wanted:
                if not float(file.get_tensor(name).abs().amax()) <= LARGEST:  # also false for NaN
                    raise UserError(
                        f"{weights}: {name} has values that are NaN, infinite or larger than {LARGEST:,.0f}"
                    )
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    return lora


def changes_base(lora: "LoraConfig") -> str | None:
    """Return the key and value with which an adapter changes the base's own weights; None if it leaves them alone."""
    init = lora.init_lora_weights
    if not any(init is harmless or (isinstance(init, str) and init == harmless) for harmless in HARMLESS_INITS):
        return f"init_lora_weights={init}"
    if lora.bias != "none":  # trains the base's biases, which stay changed when the adapter is disabled
        return f"bias={lora.bias}"
    return next((key for key in ("kasa_config", "loftq_config") if getattr(lora, key, None)), None)


def _lora(folder: Path, root: Path) -> "LoraConfig":
    file = folder / _CONFIG
    return read_lora(json_object(file, root, MIB), file)


def read_lora(values: Mapping[str, Any], file: Path) -> "LoraConfig":
    """Return the LoRA configuration that a stored one describes.

    Args:
        values: the content of adapter_config.json.
        file: named in errors.

    Raises:
        UserError: a key or value that is not needed to answer, or out of range.
    """
    from peft import LoraConfig  # heavy, and commands that load no model import this module too

    from intern.config.build import build

    if values.get("peft_type") != "LORA" or values.get("task_type") != "CAUSAL_LM":
        raise UserError(f"{file}: peft_type must be LORA and task_type CAUSAL_LM")
    for key in _ACTING:
        if values.get(key):
            raise UserError(f"{file}: {key} is set: refused")
    for key in _PLAIN_NAMES:
        for name in _texts(values.get(key)):
            if not PLAIN_NAME.fullmatch(str(name)):
                raise UserError(f"{file}: {key} holds {str(name)[:80]!r}: must be names of modules: refused")
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(LoraConfig)
    }
    # config.yaml names the base model; the keys of _MADE_BY say how and by what the adapter was made.
    chosen = {key: value for key, value in values.items() if key not in _MADE_BY}
    for key, value in chosen.items():
        if value is None and defaults.get(key) is not None:
            raise UserError(f"{file}: {key} is null: refused")
    try:
        lora = build(LoraConfig, {key: value for key, value in chosen.items() if value is not None}, "adapter_config")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if (change := changes_base(lora)) is not None:
        raise UserError(f"{file}: {change} changes the base model's own weights: refused")
    numbers = [lora.r, lora.lora_alpha, *(lora.rank_pattern or {}).values(), *(lora.alpha_pattern or {}).values()]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < 2**31 for one in numbers):
        raise UserError(f"{file}: r, lora_alpha, rank_pattern and alpha_pattern must hold numbers below 2^31")
    if min([lora.r, *(lora.rank_pattern or {}).values()]) < 1:
        raise UserError(f"{file}: r and the ranks of rank_pattern must be at least 1")
    check_patterns(lora, file)
    return lora


def _texts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    return [one for one in value if isinstance(one, str)] if isinstance(value, list | dict) else []


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _check_tokenizer(folder: Path, root: Path) -> None:
    """Check that the tokenizer is of a class of transformers that is made from tokenizer.json: no code, no file elsewhere."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    file = folder / "tokenizer_config.json"
    values = json_object(file, root)
    for key, value in values.items():
        if key == "auto_map" or (key.endswith(("_file", "_file_path")) and value):
            raise UserError(f"{file}: {key} names code or a file: refused")
    name = values.get("tokenizer_class")
    kind = tokenizer_class_from_name(name) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedTokenizerFast):
        raise UserError(f"{file}: tokenizer_class={name}: not a class that is made from tokenizer.json: refused")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder / 'tokenizer.json'}: is missing: is {root} a finished run?")
