"""Tables of other tools that are not questions and answers -> what to do with them, in one line.

Only what would be trained wrongly or refused without a helpful word is here: raw texts, preferences, tool calls, pictures, answers that
their author has marked as not to be learned.
"""

from collections.abc import Mapping
from typing import Any

from intern.errors import UserError

# Columns -> what a table with all of them is. The first match counts.
_TABLES: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"segments"}),
        "segments of rendered text: write each row as messages (role, content); the chat template and the loss on answers are added here",
    ),
    (
        frozenset({"chosen", "rejected"}),
        "preferences: answers are learned, not compared: rename the column chosen to the answer, for example with "
        "data.columns='{question: prompt, answer: chosen}', if both are texts",
    ),
    (
        frozenset({"text"}),
        "whole texts: a chat model is trained on questions and answers: give each row a question and an answer, or messages",
    ),
    (
        frozenset({"input_ids"}),
        "tokens: give the texts: they are tokenized here",
    ),
)
_VERDICTS = {
    "kto_tag": None,
    "label": "prompt_completion",
}  # true or false: is the answer a good one; the format that they belong to
_MEDIA = ("images", "image", "videos", "audios")
_TOOLS = ("tools", "functions")
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_UNLEARNED = ("weight", "train", "training")  # of a message: 0 or false for an answer without loss


def are_preferences(row: Mapping[str, Any]) -> bool:
    """Whether a row has two answers to compare."""
    return {"chosen", "rejected"} <= row.keys()


def explain_table(row: Mapping[str, Any]) -> str | None:
    """What a table is that has no format of questions and answers, with the remedy; None if it is nothing known."""
    columns = {str(name).strip().casefold() for name in row}
    return next((what for needed, what in _TABLES if needed <= columns), None)


def check_row(row: Mapping[str, Any], format_name: str, place: str) -> None:
    """Refuse a row whose meaning would be lost if only its questions and answers were trained.

    Args:
        row: as the file has it.
        format_name: the row format that reads it.
        place: the file and line, for the message.

    Raises:
        UserError: beginning with `place`.
    """
    for name, only_in in _VERDICTS.items():
        if isinstance(row.get(name), bool) and only_in in (None, format_name):
            raise UserError(
                f"{place}: field {name!r} says whether the answer is a good one, and every answer would be learned: keep the rows with true, "
                "and delete the column"
            )
    for name in _MEDIA:
        if row.get(name):
            raise UserError(f"{place}: has {name}: only text can be trained on: delete the rows with {name}")
    for name in _TOOLS:
        if row.get(name) and row[name] != "[]":
            raise UserError(
                f"{place}: has {name}: calls of tools are not trained: delete the rows with {name}, or the column if no answer needs them"
            )


def check_message(message: Mapping[str, Any], role: str, place: str, index: int) -> None:
    """Refuse a message that is a tool's, or that its author has marked as not to be learned.

    Raises:
        UserError: beginning with `place`.
    """
    calls = message.get("tool_calls") or message.get("function_call")
    if calls or role.strip().lower() in _TOOL_ROLES:
        what = "calls a tool" if calls else f"has the role {role!r}"
        raise UserError(
            f"{place}: message {index} {what}: calls of tools and their results are not trained: delete the row, or write the conversation "
            "as user and assistant only"
        )
    for name in _UNLEARNED:
        value = message.get(name)
        if (
            value is not None
            and str(value).lower() in ("0", "false", "0.0")
            and role.strip().lower() in ("assistant", "gpt")
        ):
            raise UserError(
                f"{place}: message {index} has {name}={str(value).lower()}: which answers are learned is set for all rows alike: delete the field, "
                "and set data.loss_on=last to learn only the last answer of each row"
            )
