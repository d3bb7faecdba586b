"""A list of messages -> a conversation: who may speak in which order, and what counts as text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from intern.data.readers import Number
from intern.errors import UserError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


class Turn(NamedTuple):
    """What a user asks and what the assistant answers."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """The conversation of a row. Every answer may carry loss; the context belongs to the last question."""

    turns: Sequence[Turn]  # at least one
    system: str | None = None  # instead of data.system_prompt


def checked_text(value: Any, what: str) -> str | None:
    """A text, None for a missing one; UserError, beginning with `what`, for anything else."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{what} is {kind_of(value)}, not text")
    if value and ("\x00" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        raise UserError(f"{what} has a character that is no text (NUL or half a surrogate pair)")
    return value


def kind_of(value: Any) -> str:
    """What a value is, for messages: "a number", "list"."""
    if isinstance(value, Number):
        return "a number"
    return "missing" if value is None else type(value).__name__


def message_text(value: Any, place: str, index: int) -> str:
    """A message's text, whole or as a list of its text parts."""
    if isinstance(value, list):
        found = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        parts = [part for part in found if isinstance(part, str)]
        if len(parts) < len(found):
            raise UserError(f"{place}: message {index} has parts that are not text: only text can be trained on")
        value = "".join(parts)
    text = checked_text(value, f"{place}: message {index}")
    if text is None or not text.strip():
        raise UserError(f"{place}: message {index} is {'missing' if text is None else 'empty'}")
    return text


def conversation(messages: Sequence[tuple[str, str]], place: str) -> Conversation:
    """A list of (role, text) -> a conversation: a system message or none, then user and assistant in turn.

    Raises:
        UserError: beginning with `place`: an unknown role, or messages in another order.
    """
    system = None
    rest: list[tuple[str, str]] = []
    for index, (name, text) in enumerate(messages, 1):
        role = _ROLES.get(name.strip().lower())
        if role is None:
            raise UserError(
                f"{place}: message {index} has the role {name!r}: only system, user and assistant are known"
            )
        if role == "system":
            if index > 1:
                raise UserError(f"{place}: message {index} is a system message: only the first may be")
            system = text
            continue
        wanted = "assistant" if len(rest) % 2 else "user"
        if role != wanted:
            raise UserError(f"{place}: message {index} is of {role}, where one of {wanted} belongs")
        rest.append((role, text))
    if not rest or len(rest) % 2:
        ends = "ends with a question that has no answer" if rest else "has no messages of user and assistant"
        raise UserError(f"{place}: {ends}: delete the last message, or the row")
    texts = [text for _, text in rest]
    return Conversation([Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)], system)
