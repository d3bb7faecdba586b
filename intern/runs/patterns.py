"""Regular expressions in an adapter's configuration -> the modules of the base that they match, in bounded time and memory."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intern.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

PLAIN_NAME = re.compile(r"[\w.]{1,200}")
_LONGEST_PATTERN = 1000  # characters
_MOST_REPEATS = 1000  # {n} in a pattern, multiplied: compiling takes memory for each
_MATCHING_S = 2.0  # seconds for all patterns together


def check_patterns(lora: "LoraConfig", file: Path) -> None:
    """Raise UserError naming `file` if an expression cannot be compiled or would take too much memory."""
    for pattern in _patterns(lora):
        _matcher(pattern, file)


def _patterns(lora: "LoraConfig") -> Iterator[str]:
    """Yield the expressions that PEFT would match against names of modules."""
    for value in (lora.target_modules, lora.exclude_modules):
        if isinstance(value, str):
            yield value
    for ranks in (lora.rank_pattern, lora.alpha_pattern):
        yield from ranks or {}


def _matcher(pattern: str, file: Path, start: str = "", end: str = "") -> Callable[[str, float], bool]:
    """Return a function of a name and a number of seconds: whether the pattern matches the whole name.

    Raises:
        UserError: the pattern is no regular expression, or one that takes too much memory. The function: it takes longer.
    """
    import regex  # re has no time limit

    repeats = math.prod(
        int(most or least or 1) or 1 for least, most in re.findall(r"\{(\d{0,9}),?(\d{0,9})\}", pattern)
    )
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\{[\d, ]{10}", pattern):
        raise UserError(f"{file}: the pattern {pattern[:80]}... could take too long: refused")
    try:
        compiled = regex.compile(f"{start}{pattern}{end}")
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"{file}: {pattern}: not a regular expression ({error})") from error

    def matches(name: str, seconds: float) -> bool:
        try:
            return compiled.fullmatch(name, timeout=max(seconds, 0.001)) is not None
        except TimeoutError as error:
            raise UserError(f"{file}: the pattern {pattern[:80]} takes too long to match: refused") from error

    return matches


def matching(pattern: str, names: list[str]) -> list[str]:
    """Return the names that a regular expression matches as a whole.

    Raises:
        regex.error: it is none.
        TimeoutError: it takes too long for all of them together.
    """
    import regex

    end, compiled = time.monotonic() + _MATCHING_S, regex.compile(pattern)
    return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 0.001))]


def without_patterns(lora: "LoraConfig", names: list[str], file: Path, parameters: Iterable[str] = ()) -> "LoraConfig":
    """Return the configuration with names of modules in place of regular expressions, which PEFT would match without a time limit.

    Args:
        lora: the configuration.
        names: of all modules of the base model.
        file: named in errors.
        parameters: names of the parameters that have an adapter of their own (target_parameters), which ranks may be given for too.

    Raises:
        UserError: an expression that takes too long, or matches nothing.
    """
    from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

    end = time.monotonic() + _MATCHING_S
    changes: dict[str, Any] = {}

    def chosen(value: Any) -> set[str]:
        if isinstance(value, str):
            matches = _matcher(value, file)
            return {name for name in names if matches(name, end - time.monotonic())}
        listed = set(value or ())
        return {name for name in names if name in listed or any(name.endswith(f".{one}") for one in listed)}

    targets = lora.target_modules
    is_shorthand = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if isinstance(lora.exclude_modules, str):
        changes["exclude_modules"] = sorted(chosen(lora.exclude_modules)) or None
    if isinstance(targets, str) and not is_shorthand:
        changes["target_modules"] = chosen(targets) - chosen(changes.get("exclude_modules", lora.exclude_modules))
        if not changes["target_modules"]:
            raise UserError(f"{file}: target_modules={targets[:80]} matches no module of the base model")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(lora, key) or {}
        if all(PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
            continue
        matchers = [(_matcher(pattern, file, r"(.*\.)?(", ")"), value) for pattern, value in patterns.items()]
        changes[key] = {
            re.escape(name): value
            for name in (*names, *parameters)
            for value in _first(value for matches, value in matchers if matches(name, end - time.monotonic()))
        }
    return dataclasses.replace(lora, **changes) if changes else lora


def _first(values: Iterable[Any]) -> list[Any]:
    return [value for value, _ in zip(values, range(1), strict=False)]
