"""Files of a run directory that may come from a stranger -> data, or one line that names the file.

A run is data and nothing in it may act: no code is imported or unpickled, no interpolation is looked up, no link leads out of the run,
nothing is read beyond a size that training would ever write. One thing a run does decide is which base model it needs
(config.yaml, model.pretrained_model_name_or_path); whoever asks a run that was trained elsewhere is told its name.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from intern.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

_MIB = 2**20
_JSON, _YAML, _TOKENIZER = 16 * _MIB, _MIB // 4, 128 * _MIB  # the largest files that are read, in bytes
_DEEPEST = 32  # levels of a YAML file
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # if PyYAML was built with libyaml: a tenth of the time
# What training writes into adapter/, and the most bytes of each that are read (weights are as large as they are).
_ADAPTER_FILES = {
    "adapter_model.safetensors": None,
    "adapter_config.json": _MIB,
    "tokenizer.json": _TOKENIZER,
    "tokenizer_config.json": _JSON,
    "special_tokens_map.json": _JSON,
    "added_tokens.json": _JSON,
    "chat_template.jinja": _MIB,
    "vocab.json": _JSON,
    "vocab.txt": _JSON,
    "merges.txt": _JSON,
    "tokenizer.model": _JSON,
}
# Keys of PEFT's configuration that import modules, replace layers or read other models: none is needed to answer.
_ACTING = (
    "auto_mapping",
    "megatron_config",
    "layer_replication",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "arrow_config",
)
_REGEXES = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
_QUANTIFIED_GROUP = re.compile(r"\)[*+{]")  # can take time without end on an unlucky name


def read_text(path: Path, root: Path, most: int) -> str:
    """The text of a file of a run.

    Args:
        root: the run's folder: the file, links followed, must lie in it.
        most: bytes beyond which the file is refused.

    Raises:
        UserError: it is not there, no regular file, outside, too large, or not UTF-8.
    """
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path}: leads out of {root}: refused")
        if not path.is_file():
            reason = "no regular file" if path.exists() else "FileNotFoundError"
            raise UserError(f"{path}: cannot be read ({reason}): is {root} a finished run?")
        if (size := path.stat().st_size) > most:
            raise UserError(
                f"{path}: {size / _MIB:,.0f} MiB, and nothing that training writes there is larger than {most / _MIB:g} MiB: refused"
            )
        return path.read_bytes().decode("utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: a ring of links
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): is {root} a finished run?") from error


def json_object(path: Path, root: Path, most: int = _JSON) -> dict[str, Any]:
    """A file that holds one JSON object with finite numbers; UserError otherwise."""
    text = read_text(path, root, most)
    try:
        content = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): is {root} a finished run?") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object: is {root} a finished run?")
    return content


def yaml_mapping(path: Path, root: Path) -> dict[str, Any]:
    """A YAML file of plain values with every "${...}" escaped: OmegaConf then gives it back as it stands instead of looking it up.

    Raises:
        UserError: no mapping, tags, references (which can multiply without end), more than 32 levels, or a value left open ("???").
    """
    text = read_text(path, root, _YAML)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path}: holds YAML references (*name): refused")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise UserError(f"{path}: is nested deeper than {_DEEPEST} levels: refused")
        content = yaml.load(text, Loader=_LOADER) or {}
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): is {root} a run directory?") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: holds no configuration: is {root} a run directory?")
    escaped: dict[str, Any] = _escaped(content, path)
    return escaped


def check_adapter(folder: Path, root: Path) -> "LoraConfig":
    """The LoRA configuration of adapter/, once all its files are known to be harmless; no weights are read, only their shapes.

    Raises:
        UserError: names the file.
    """
    if not folder.is_dir() or not folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder}: no folder inside {root}: is it a finished run?")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder / 'adapter_model.safetensors'}: is not there, and no other form of weights is loaded")
    for file in sorted(folder.iterdir()):
        if file.name not in _ADAPTER_FILES:
            raise UserError(f"{file}: not a file that training writes there: refused; remove it if you trust the rest")
        if not file.is_file() or not file.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{file}: no regular file inside {root}: refused")
        most = _ADAPTER_FILES[file.name]
        if most is not None and file.stat().st_size > most:
            raise UserError(f"{file}: larger than {most / _MIB:g} MiB: refused")
    _check_tokenizer(folder, root)
    return _lora(folder, root)


def _lora(folder: Path, root: Path) -> "LoraConfig":
    from peft import LoraConfig  # heavy: the rest of this module serves commands that load no model

    from intern.config.build import build

    file = folder / "adapter_config.json"
    values = json_object(file, root, _MIB)
    if values.get("peft_type") != "LORA" or values.get("task_type") != "CAUSAL_LM":
        raise UserError(f"{file}: peft_type must be LORA and task_type CAUSAL_LM")
    for key in _ACTING:
        if values.get(key):
            raise UserError(f"{file}: {key} is set: refused")
    for key in _REGEXES:
        patterns = values.get(key) or ()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str) or len(pattern) > 1000 or _QUANTIFIED_GROUP.search(pattern):
                raise UserError(f"{file}: {key} holds an expression that could take for ever: refused")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{file}: {key}={pattern}: no regular expression ({error})") from error
    # Who the base model is stands in config.yaml; the other keys say how and by what the adapter was made.
    kept = {key: value for key, value in values.items() if value is not None and key not in _MADE_BY}
    try:
        lora = build(LoraConfig, kept, "adapter_config")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    ranks = [
        shape[0]
        for name, shape in shapes(folder / "adapter_model.safetensors")
        if "lora_A" in name or "lora_embedding_A" in name
    ]
    if not ranks:
        raise UserError(f"{folder / 'adapter_model.safetensors'}: holds no LoRA weights")
    asked = max([lora.r, *(rank for rank in (lora.rank_pattern or {}).values())])
    if lora.r < 1 or asked > max(ranks):
        raise UserError(f"{file}: rank {asked}, and the weights have {max(ranks)}: they do not belong together")
    return lora


_MADE_BY = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config", *_ACTING)


def shapes(weights: Path) -> Iterator[tuple[str, list[int]]]:
    """The name and shape of each tensor of a safetensors file; UserError where its header does not fit its length."""
    try:
        with safe_open(weights, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dictionary
                yield name, file.get_slice(name).get_shape()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error


def _check_tokenizer(folder: Path, root: Path) -> None:
    """A tokenizer of transformers' own, made from tokenizer.json: no code, no file of another place."""
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
        raise UserError(f"{file}: tokenizer_class={name}: not one that is made from tokenizer.json: refused")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder / 'tokenizer.json'}: is not there: is {root} a finished run?")


def _escaped(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner, path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner, path) for inner in value]
    if value == "???":
        raise UserError(f"{path}: a value is left open (???)")
    if value is not None and not isinstance(value, str | int | float | bool):
        raise UserError(
            f"{path}: holds a {type(value).__name__}: only text, numbers, true, false and null belong there"
        )
    # Backslashes right before an interpolation are halved when it is read.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
