"""The one rule for rows that are longer than trainer.max_length.

Context tokens go first, from the end of the context. If that is not enough, the oldest turns of a conversation go, each as a whole, until
the rest fits. The last question, its answer and the system prompt stay whole: a row that is too long even so is dropped. Nothing is ever
taken off an answer that stays.
"""

from collections.abc import Sequence
from typing import NamedTuple

RULE = "context from its end, then whole turns from the oldest, then the row"  # part of the key of cached tokens
_CHARACTERS_PER_TOKEN = 256  # no tokenizer averages more on any text: bounds the tokens of a text without tokenizing it


class Cut(NamedTuple):
    """What goes so that a row fits."""

    context: int  # tokens from the end of the context
    turns: int  # whole turns from the start of the conversation


def cut_to_fit(kept: int, turns: Sequence[int], context: int, max_length: int) -> Cut | None:
    """Decide what goes so that a row has at most `max_length` tokens.

    Args:
        kept: tokens that must stay.
        turns: tokens of each earlier turn, the oldest first.
        context: tokens of the context.
        max_length: the most tokens of a row.

    Returns:
        What goes, or None if the row does not fit even without its context and earlier turns.
    """
    excess = kept + sum(turns) + context - max_length
    gone = 0
    while excess > context and gone < len(turns):
        excess -= turns[gone]
        gone += 1
    return Cut(max(excess, 0), gone) if excess <= context else None


def longest_text(max_length: int) -> int:
    """The most characters of a text that can have any part in a row: a longer one is not worth tokenizing (14 million tokens take 40 s)."""
    return _CHARACTERS_PER_TOKEN * max_length
