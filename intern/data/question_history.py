"""What was said before a question -> question/answer pairs and a system message: a file of messages, or Python objects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intern.data.conversation import conversation, message_text
from intern.data.readers import columns_of, lines
from intern.errors import UserError

# How an entry of a history names its speaker and its text, as the row formats have it.
_MESSAGES = (("role", "content"), ("from", "value"))
_LISTS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class History:
    """The conversation before a question."""

    turns: Sequence[tuple[str, str]] = ()  # (question, answer)
    system: str | None = None  # instead of the system prompt of training


def read_history(given: Any) -> History:
    """Read a history.

    Args:
        given: a JSON or JSON Lines file, or a list; its entries are messages ({"role": "user", "content": ...} or {"from": "human",
            "value": ...}), pairs ({"question": ..., "answer": ...}), or in Python tuples (question, answer). None for no history.

    Raises:
        UserError: no such file, an entry that is none of these, or a conversation that does not end with an answer.
    """
    if given is None:
        return History()
    if isinstance(given, History):
        return given
    place = "history"
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"history={given}: no such file")
        place = str(path)
        entries: Sequence[Any] = [line.row for line in lines(path)]
    elif isinstance(given, Sequence):
        entries = given
    else:
        raise UserError(
            f"history={given}: must be a JSON or JSON Lines file of messages, or in Python a list of them or of (question, answer) pairs"
        )
    if len(entries) == 1 and isinstance(entries[0], Mapping):
        inner = next((entries[0][name] for name in _LISTS if isinstance(entries[0].get(name), list)), None)
        entries = inner if inner is not None else entries
    messages: list[tuple[str, str]] = []
    for index, entry in enumerate(entries, 1):
        messages += _messages_of(entry, index, place)
    if not messages:
        return History()
    found = conversation(messages, place)
    return History([(turn.question, turn.answer) for turn in found.turns], found.system)


def _messages_of(entry: Any, index: int, place: str) -> list[tuple[str, str]]:
    """The messages of one entry: one, or the two of a pair."""
    if isinstance(entry, Mapping):
        for role, content in _MESSAGES:
            if role in entry and content in entry:
                return [(str(entry[role]), message_text(entry[content], place, index))]
        if "question" in entry and "answer" in entry:
            entry = entry["question"], entry["answer"]
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return [
            (role, message_text(text, place, index)) for role, text in zip(("user", "assistant"), entry, strict=True)
        ]
    has = f"it has {columns_of(entry)}" if isinstance(entry, Mapping) else f"it is {type(entry).__name__}"
    raise UserError(f"{place}: entry {index} is neither a message (role, content) nor a pair (question, answer); {has}")
