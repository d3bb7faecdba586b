"""A config node -> a validated object of the library class whose keyword arguments it holds."""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pydantic import TypeAdapter, ValidationError

from intern.config.suggestions import unknown
from intern.errors import UserError

T = TypeVar("T")


def literal_text(text: str) -> str:
    """The text as OmegaConf must have it to mean these characters: what would be an interpolation is escaped."""
    # Two backslashes before ${ mean one: those that are there are doubled, and one more makes ${ text.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def literal(value: Any) -> Any:
    """A value of built-in types whose texts OmegaConf takes for these characters."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return literal_text(value) if isinstance(value, str) else value


def plain(node: DictConfig | None) -> dict[str, Any]:
    """Return the node as built-in types with interpolations resolved: libraries cannot write a ListConfig to JSON.

    Raises:
        UserError: an interpolation of a key that is not there.
    """
    try:
        values = OmegaConf.to_container(node, resolve=True) if node is not None else {}
    except InterpolationResolutionError as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}: give a value instead") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def build(cls: type[T], values: dict[str, Any], group: str) -> T:
    """Return `cls(**values)` after checking names and types.

    Args:
        cls: a library's class, or a dataclass of our own.
        values: its keyword arguments.
        group: the configuration group, for messages.

    Raises:
        UserError: a key that `cls` does not have, a value of the wrong type, or one that `cls` rejects; names the group and key.
    """
    check_names(values, _parameters(cls), group)
    try:
        built = TypeAdapter(cls).validate_python(values) if _is_plain_dataclass(cls) else cls(**values)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        fault = faults[0]
        key = ".".join([group, *(str(part) for part in fault["loc"][:1])])
        value = f"={fault['input']!r}" if fault["loc"] and fault["type"] != "missing" else ""
        # A key that takes several kinds has a fault for each of them.
        kinds = dict.fromkeys(_complaint(one) for one in faults if one["loc"][:1] == fault["loc"][:1])
        raise UserError(f"{key}{value}: {', or '.join(kinds)}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{group}: {' '.join(str(error).split())}") from error
    for (
        key,
        value,
    ) in values.items():  # "no" in quotes is text, which everything that reads the raw value would take as true
        if isinstance(value, str) and isinstance(getattr(built, key, None), bool | int | float):
            raise UserError(
                f"{group}.{key}={value!r}: is text, but a number, true or false is expected: remove the quotes"
            )
        if isinstance(value, bool) and type(getattr(built, key, None)) in (int, float):
            raise UserError(f"{group}.{key}={str(value).lower()}: must be a number, not true or false")
    return built


def _complaint(fault: Mapping[str, Any]) -> str:
    """Return pydantic's finding in our words."""
    kind = str(fault["type"]).split("_")[0]
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list"}
    if fault["type"] == "finite_number":
        return "must be a finite number"
    if fault["type"] in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind in words:
        return f"must be {words[kind]}"
    if kind == "missing":
        return "is missing"
    text = " ".join(str(fault["msg"]).removeprefix("Value error, ").split())
    for theirs, ours in _RANGES:
        text = text.replace(theirs, ours)
    return text


_RANGES = (
    ("Input should be", "must be"),
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("greater than", "above"),
    ("less than", "below"),
)


def check_names(values: Iterable[str], known: Iterable[str], group: str = "") -> None:
    """Raise UserError for the first unknown key, with the most similar known one."""
    for key in values:
        if key not in known:
            raise UserError(unknown(key, known, group))


def _is_plain_dataclass(cls: type) -> bool:
    """Return whether the class has a dataclass's own constructor: some libraries decorate classes that define another one."""
    return dataclasses.is_dataclass(cls) and [
        field.name for field in dataclasses.fields(cls) if field.init
    ] == _parameters(cls)


def _parameters(cls: type) -> list[str]:
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [name for name, parameter in inspect.signature(cls).parameters.items() if parameter.kind in named]
