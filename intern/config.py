"""A config node -> a validated object of the library class whose keyword arguments it holds."""

import dataclasses
import difflib
import inspect
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from intern.errors import UserError

T = TypeVar("T")


def plain(node: DictConfig | None) -> dict[str, Any]:
    """The node as built-in types, interpolations resolved: a leftover ListConfig breaks what libraries write to JSON."""
    values = OmegaConf.to_container(node, resolve=True) if node is not None else {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def build(cls: type[T], values: dict[str, Any], group: str) -> T:
    """`cls(**values)`, its names and types checked first.

    Raises:
        UserError: a key that `cls` does not take, a value of the wrong type, or one that `cls` refuses; names the group and key.
    """
    check_names(values, _parameters(cls), group)
    try:
        if _is_plain_dataclass(cls):
            return TypeAdapter(cls).validate_python(values)
        return cls(**values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join([group, *(str(part) for part in fault["loc"][:1])])
        value = f"={fault['input']!r}" if fault["loc"] else ""
        raise UserError(f"{key}{value}: {fault['msg']}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{group}: {error}") from error


def check_names(values: dict[str, Any], known: list[str], group: str) -> None:
    """Raises UserError for the first key that is not known, with the nearest right name."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {group}.{near[0]}?" if near else "see the comments in its group file"
            raise UserError(f"{group}.{key}: unknown key; {hint}")


def _is_plain_dataclass(cls: type) -> bool:
    """Whether the class has a dataclass's own constructor: some libraries decorate classes that then write their own."""
    return dataclasses.is_dataclass(cls) and [
        field.name for field in dataclasses.fields(cls) if field.init
    ] == _parameters(cls)


def _parameters(cls: type) -> list[str]:
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [name for name, parameter in inspect.signature(cls).parameters.items() if parameter.kind in named]
