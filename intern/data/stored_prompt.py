"""prompt.json of an untrusted run -> checked arguments of a Prompt."""

from collections.abc import Collection
from typing import Any

from intern.errors import UserError


def prompt_arguments(stored: dict[str, Any], contexts: Collection[str], place: str) -> dict[str, Any]:
    """Return the keyword arguments of the Prompt that was stored.

    Args:
        stored: the content of the file, as `Prompt.to_json` writes it.
        contexts: the context modes that exist.
        place: begins each message.

    Raises:
        UserError: a key that is missing or has another type.
    """
    template, stop_ids = stored.get("template"), stored.get("stop_ids")
    if not isinstance(template, list) or len(template) != 4 or not all(map(_is_text, template)):
        raise UserError(f"{place}: template must be four pieces of text")
    if not _is_text(stored.get("system_prompt")):
        raise UserError(f"{place}: system_prompt must be text")
    if stored.get("context") not in contexts:
        raise UserError(f"{place}: context must be one of {', '.join(contexts)}")
    if (
        not isinstance(stop_ids, list)
        or not stop_ids
        or not all(type(token) is int and 0 <= token < 2**31 for token in stop_ids)
    ):
        raise UserError(f"{place}: stop_ids must be the numbers of tokens")
    for name in ("opening_alone", "next_turn", "earlier_before_answer", "answer_prefix"):
        if stored.get(name) is not None and not _is_text(stored[name]):
            raise UserError(f"{place}: {name} must be text, or null")
    if not isinstance(stored.get("template_kwargs") or {}, dict):
        raise UserError(f"{place}: template_kwargs must be names and values")
    return {
        "system_prompt": stored["system_prompt"],
        "context": stored["context"],
        "template": tuple(template),
        "stop_ids": tuple(stop_ids),
        "opening_alone": stored.get("opening_alone"),
        "next_turn": stored.get("next_turn"),
        "system_in_user": stored.get("system_in_user") is True,
        "answer_prefix": stored.get("answer_prefix") or "",
        "earlier_before_answer": stored.get("earlier_before_answer"),
        "is_joined": stored.get("is_joined") is True,
        "template_kwargs": stored.get("template_kwargs") or {},
    }


def _is_text(value: Any) -> bool:
    """Whether a value is text that a tokenizer takes: no half surrogate pairs."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
