"""Row formats: a row of somebody's table -> a conversation.

One entry in `FORMATS` per format: the columns that it reads, by which it is also recognized, and a function that makes the conversation.
Adding a format means adding an entry here (`register` does it from outside the package) and naming it in conf/data/train_jsonl.yaml.

A little over 300 lines: what a format is, how it is recognized and the formats themselves are read together by whoever adds one.
"""

import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from intern.data.conversation import Conversation, Turn, checked_text, conversation, kind_of, message_text
from intern.data.readers import columns_of
from intern.data.unsupported_tables import are_preferences, check_message, check_row, explain_table
from intern.errors import UserError

AUTO = "auto"
# Columns that every format reads if they are there: slot -> names, the first of which messages use.
SHARED: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "context": ("chunk_text", "context"),
    "document": ("chunk_id", "document", "document_id", "doc_id"),
    "topic": ("topic",),
    "seen_chunk": ("seen_chunk",),
}
_STRICT = {
    "chunk_text",
    "chunk_id",
    "topic",
}  # our own names: another type than text is a mistake, not another's column


class Fields:
    """A row's values by slot, whatever its columns are called; a value of the wrong kind is named with its place."""

    def __init__(self, row: Mapping[str, Any], names: Mapping[str, str], shown: Mapping[str, str], place: str) -> None:
        self._row, self._names, self._shown, self.place = row, names, shown, place

    @property
    def renamed(self) -> set[str]:
        """The slots that data.columns names."""
        return set(self._shown)

    def value(self, slot: str) -> Any:
        """The raw value, or None if the row has none."""
        return self._row.get(self._names.get(slot, ""))

    def text(self, slot: str, reason: str = "") -> str:
        """A text that must be there.

        Args:
            slot: the slot, such as "question".
            reason: why it must be there, for the message.

        Raises:
            UserError: it is missing, empty or not text.
        """
        text = self.optional(slot)
        if text is None:
            raise UserError(f"{self.place}: field {self.name(slot)!r} is missing{reason}")
        if not text.strip():
            raise UserError(f"{self.place}: field {self.name(slot)!r} is empty")
        return text

    def optional(self, slot: str) -> str | None:
        """A text, None if the row has none; a number is taken as its text."""
        return checked_text(self.value(slot), f"{self.place}: field {self.name(slot)!r}")

    def lenient(self, slot: str) -> str | None:
        """Like `optional`, but None for another type in a column that was only guessed to be this slot."""
        value = self.value(slot)
        guessed = self._names.get(slot) not in _STRICT and slot not in self._shown
        return None if guessed and not isinstance(value, str | int | float) else self.optional(slot)

    def name(self, slot: str) -> str:
        """The column's name as the user knows it."""
        return self._names.get(slot) or self._shown.get(slot) or SHARED.get(slot, (slot,))[0]

    def item(self, item: Any, slot: str, index: int) -> Any:
        """A field of the object at a place of a list, such as a message's role."""
        if not isinstance(item, Mapping):
            raise UserError(f"{self.place}: entry {index} is {kind_of(item)}, not an object with {self.name(slot)}")
        name = self._shown.get(slot, slot)
        if name not in item:
            raise UserError(f"{self.place}: entry {index} has no {name!r}; it has {columns_of(item)}")
        return item[name]


@dataclass(frozen=True)
class RowFormat:
    """How rows of one format are recognized and read.

    Attributes:
        slots: what it reads beyond `SHARED`, each with the column names that it takes by itself; `data.columns` renames any of them.
        required: the slots whose columns tell that a table has this format.
        read: makes the conversation of one row.
        inside: names inside list entries, such as role and content, which `data.columns` renames too.
    """

    name: str
    slots: Mapping[str, tuple[str, ...]]
    required: tuple[str, ...]
    read: Callable[[Fields], Conversation]
    inside: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """What makes cached rows stale: the code that reads them, by content."""
        module = inspect.getmodule(self.read)
        source = inspect.getsource(module) if module is not None else repr(self.read.__code__.co_code)
        return hashlib.sha256(source.encode()).hexdigest()


@dataclass(frozen=True)
class RowSettings:
    """The part of conf/data that says how a row is read."""

    format: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)  # slot -> the user's column name
    needs_context: bool = False  # data.context is always or mixed: each row must have a context


@dataclass(frozen=True)
class Layout:
    """The format of a table, and which of its columns fill which slot."""

    format: RowFormat
    settings: RowSettings
    _known: dict[tuple[str, ...], Mapping[str, str]] = field(default_factory=dict, compare=False)  # by a row's columns

    def names(self, row: Mapping[str, Any]) -> Mapping[str, str]:
        """Slot -> the column of a row that fills it."""
        columns = tuple(row)
        if columns not in self._known:
            self._known[columns] = _names(self.format, self.settings, columns)
        return self._known[columns]

    def fields(self, row: Mapping[str, Any], place: str) -> Fields:
        """The values of a row by slot."""
        return Fields(row, self.names(row), self.settings.columns, place)

    def describe(self, row: Mapping[str, Any]) -> str:
        """ "qa (question: Frage, answer: Antwort)", for a person."""
        names = self.names(row)
        slots = [slot for slot in (*self.format.slots, *SHARED) if slot in names]
        parts = [f"{slot}: {names[slot]}" if slot != names[slot] else slot for slot in slots]
        return f"{self.format.name} ({', '.join(parts)})"


def conversation_row(layout: Layout, row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Read one row as the dataset of rows holds it: the last turn, the turns before it, and what belongs to the row.

    Raises:
        UserError: beginning with `place`, if something is missing, empty or of the wrong type.
    """
    check_row(row, layout.format.name, place)
    fields = layout.fields(row, place)
    conversation = layout.format.read(fields)
    context: str | None
    if layout.settings.needs_context:
        context = fields.text("context", " (data.context shows it; data.context=never does without)")
    else:
        context = fields.lenient("context")
    seen = fields.value("seen_chunk")
    if not isinstance(seen or False, bool):
        if not isinstance(seen, str) or seen.lower() not in ("true", "false"):  # a CSV file has only text
            raise UserError(f"{place}: field {fields.name('seen_chunk')!r} is {kind_of(seen)}, not true or false")
        seen = seen.lower() == "true"
    system = conversation.system if conversation.system is not None else fields.lenient("system")
    return {
        "system": system if system and system.strip() else None,
        "history": [turn._asdict() for turn in conversation.turns[:-1]] or None,
        "question": conversation.turns[-1].question,
        "answer": conversation.turns[-1].answer,
        "chunk_text": context,
        "chunk_id": fields.lenient("document"),
        "topic": fields.lenient("topic"),
        "seen_chunk": seen,
    }


def detect(row: Mapping[str, Any], settings: RowSettings, place: str) -> Layout:
    """Choose the format of a table: the given one, or the first whose required columns its first row has.

    Raises:
        UserError: no such format, no format that fits, or `data.columns` names what no format reads.
    """
    if settings.format != AUTO and settings.format not in FORMATS:
        near = difflib.get_close_matches(settings.format, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"must be {AUTO}, {', '.join(FORMATS)}"
        raise UserError(f"data.format={settings.format}: {hint}")
    candidates = list(FORMATS.values()) if settings.format == AUTO else [FORMATS[settings.format]]
    _check_columns(settings, candidates)
    what = explain_table(row)
    if what is not None and are_preferences(row) and "chosen" not in settings.columns.values():
        raise UserError(f"{place}: columns {columns_of(row)} are of {what}")
    for one in candidates:
        known = _slots(one) | set(one.inside)
        if settings.format != AUTO or (
            set(settings.columns) <= known and set(one.required) <= _names(one, settings, tuple(row)).keys()
        ):
            return Layout(one, settings)
    folded = {str(name).strip().casefold() for name in row}
    for slot, name in settings.columns.items():
        if any(slot in _slots(one) for one in candidates) and name.strip().casefold() not in folded:
            raise UserError(f"data.columns: {place} has no column {name!r}; it has {columns_of(row)}")
    is_half = bool(set(row) & {name for names in FORMATS["qa"].slots.values() for name in names})
    if what is not None and not (is_half and "text" in row):
        raise UserError(f"{place}: columns {columns_of(row)} are of {what}")
    if is_half:
        return Layout(FORMATS["qa"], settings)  # half a row: reading it says which column is missing
    raise UserError(
        f"{place}: columns {columns_of(row)} are of no known row format: name the question and the answer with "
        "data.columns='{question: NAME, answer: NAME}', or give data.format "
        f"({', '.join(FORMATS)})"
    )


def _check_columns(settings: RowSettings, candidates: Iterable[RowFormat]) -> None:
    known = {slot for one in candidates for slot in (*_slots(one), *one.inside)}
    for slot in settings.columns:
        if slot not in known:
            near = difflib.get_close_matches(slot, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise UserError(f"data.columns: {slot} is nothing that a row has; {hint}")


def _slots(one: RowFormat) -> set[str]:
    return {*one.slots, *SHARED}


def _names(one: RowFormat, settings: RowSettings, columns: tuple[str, ...]) -> dict[str, str]:
    """Slot -> the column that fills it: the user's name, else a name of the slot; exactly, else in other capitals."""
    folded = {name.strip().casefold(): name for name in reversed(columns)}
    found: dict[str, str] = {}
    given = settings.columns
    for slot, names in (SHARED | dict(one.slots)).items():
        for name in (given[slot],) if slot in given else names:
            if (column := name if name in columns else folded.get(name.strip().casefold())) is not None:
                if slot in given or column not in given.values():
                    found[slot] = column
                break
    return found


# --- The formats ---


def _qa(fields: Fields) -> Conversation:
    return Conversation([Turn(fields.text("question"), fields.text("answer"))])


def _alpaca(fields: Fields) -> Conversation:
    instruction, more = fields.text("instruction"), fields.optional("input")
    question = f"{instruction.strip()}\n\n{more.strip()}" if more and more.strip() else instruction
    history = []
    for index, pair in enumerate(fields.value("history") or [], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"{fields.place}: {fields.name('history')} {index} is not a pair of instruction and output")
        texts = [message_text(text, fields.place, index) for text in pair]
        history.append(Turn(texts[0], texts[1]))
    return Conversation([*history, Turn(question, fields.text("output"))])


def _messages(fields: Fields) -> Conversation:
    return conversation(_entries(fields, fields.value("messages"), "messages", "role", "content"), fields.place)


def _sharegpt(fields: Fields) -> Conversation:
    entries = _entries(fields, fields.value("conversations"), "conversations", "from", "value")
    return conversation(entries, fields.place)


_INSIDE = (("role", "content"), ("from", "value"))  # what lists of messages call speaker and text


def _prompt_completion(fields: Fields) -> Conversation:
    prompt, completion = fields.value("prompt"), fields.value("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        both = [_entries(fields, part, name, "role", "content") for part, name in ((prompt, "prompt"), (completion, "completion"))]  # fmt: skip
        return conversation([*both[0], *both[1]], fields.place)
    return Conversation([Turn(fields.text("prompt"), fields.text("completion"))])


def _entries(fields: Fields, entries: Any, slot: str, role: str, content: str) -> list[tuple[str, str]]:
    if isinstance(entries, Mapping) and entries and all(isinstance(column, list) for column in entries.values()):
        entries = [dict(zip(entries, values, strict=False)) for values in zip(*entries.values(), strict=False)]
    if not isinstance(entries, list):
        raise UserError(f"{fields.place}: field {fields.name(slot)!r} is {kind_of(entries)}, not a list of messages")
    first = entries[0] if entries and isinstance(entries[0], Mapping) else {}
    if not {role, content} & fields.renamed and role not in first:
        role, content = next((pair for pair in _INSIDE if set(pair) <= set(first)), (role, content))
    found = []
    for index, entry in enumerate(entries, 1):
        name = fields.item(entry, role, index)
        check_message(entry, str(name), fields.place, index)
        text = fields.item(entry, content, index)
        found.append((str(name), message_text(text, fields.place, index)))
    return found


FORMATS: dict[str, RowFormat] = {}


def register(one: RowFormat) -> None:
    """Add a format, or replace the one of the same name; `data.format=NAME` and auto-detection know it from then on."""
    FORMATS[one.name] = one


for _one in (
    RowFormat("qa", {"question": ("question",), "answer": ("answer", "response")}, ("question", "answer"), _qa),
    RowFormat("messages", {"messages": ("messages",)}, ("messages",), _messages, ("role", "content")),
    RowFormat("sharegpt", {"conversations": ("conversations", "conversation")}, ("conversations",), _sharegpt, ("from", "value")),
    RowFormat(
        "alpaca",
        {"instruction": ("instruction",), "input": ("input",), "output": ("output", "response"), "history": ("history",)},
        ("instruction", "output"),
        _alpaca,
    ),
    RowFormat(
        "prompt_completion",
        {"prompt": ("prompt",), "completion": ("completion", "response")},
        ("prompt", "completion"),
        _prompt_completion,
        ("role", "content"),
    ),
):  # fmt: skip
    register(_one)
