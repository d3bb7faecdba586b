"""Text files of an untrusted run directory -> data, or one line that names the file.

Nothing in a run may act: no code is imported or unpickled, no interpolation is resolved, no link is followed, and nothing is read beyond
the size that training would ever write. One thing that a run decides is which base model it needs (config.yaml,
model.pretrained_model_name_or_path); a user who queries a run that was trained elsewhere is shown its name.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from intern.errors import UserError
from intern.runs.files import read_bytes
from intern.units import MIB

_JSON, _YAML = 16 * MIB, MIB // 4  # the largest files that are read, in bytes
_DEEPEST = 32  # levels of a YAML file
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # if PyYAML was built with libyaml: a tenth of the time


def read_text(path: Path, root: Path, most: int) -> str:
    """Return the text of a file of a run.

    Args:
        path: the file, below `root`.
        root: the run directory.
        most: size in bytes beyond which the file is refused.

    Raises:
        UserError: it is missing, a link, no regular file, outside of the run, too large, or not UTF-8.
    """
    try:
        return read_bytes(path, root, most).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): is {root} a finished run?") from error


def json_object(path: Path, root: Path, most: int = _JSON) -> dict[str, Any]:
    """Return the JSON object with finite numbers that a file of a run holds.

    Raises:
        UserError: what `read_text` refuses, or other content.
    """
    text = read_text(path, root, most)
    try:
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): is {root} a finished run?") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object: is {root} a finished run?")
    return content


def yaml_mapping(path: Path, root: Path) -> dict[str, Any]:
    """Return a YAML file of plain values with every "${...}" escaped, so that OmegaConf returns it as it is instead of resolving it.

    Raises:
        UserError: no mapping, tags, aliases (which can multiply without bound), more than 32 levels, or a value left open ("???").
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


def _escaped(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner, path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner, path) for inner in value]
    if value == "???":
        raise UserError(f"{path}: a value is left open (???)")
    if value is not None and not isinstance(value, str | int | float | bool):
        raise UserError(f"{path}: holds a {type(value).__name__}: only text, numbers, true, false and null are allowed")
    # Backslashes right before an interpolation are halved when OmegaConf reads it.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError("a number that is too large")
    return number
