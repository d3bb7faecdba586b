"""Forms of a chat template beyond one system and one user turn, read off its own rendering."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Unicode private-use characters as placeholders: they are rendered alone, never together with a user's text.
SYSTEM, USER, ANSWER, NEXT = ("\ue000system\ue000", "\ue000user\ue000", "\ue000answer\ue000", "\ue000next\ue000")


def opening_alone(tokenizer: PreTrainedTokenizerBase, before_answer: str) -> str | None:
    """The text before the user turn if there is no system turn; None if the template has another form then."""
    opening, mark, rest = rendered(tokenizer, [("user", USER)]).partition(USER)
    return opening if mark and rest == before_answer else None


def next_turn(tokenizer: PreTrainedTokenizerBase, template: tuple[str, str, str, str]) -> str | None:
    """The text between an end of turn and the next question; None if the template renders earlier turns in another way."""
    opening, middle, before_answer, end_of_turn = template
    whole = rendered(tokenizer, [("system", SYSTEM), ("user", USER), ("assistant", ANSWER), ("user", NEXT)])
    start = opening + SYSTEM + middle + USER + before_answer + ANSWER + end_of_turn
    end = NEXT + before_answer
    inside = whole.startswith(start) and whole.endswith(end) and len(whole) >= len(start) + len(end)
    return whole[len(start) : len(whole) - len(end)] if inside else None


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]]) -> str:
    """Messages in the tokenizer's chat template up to where the answer begins; "" if it refuses them."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return ""
