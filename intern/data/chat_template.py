"""A tokenizer's chat template -> the literal text around each turn, read off its own rendering."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from intern.data.row_tokens import token_ids
from intern.data.template_sandbox import ProgramError, bounded_text
from intern.errors import UserError
from intern.paths import find

log = logging.getLogger(__name__)

# Unicode private-use characters as placeholders: they are rendered alone, never together with a user's text.
SYSTEM, USER, ANSWER, NEXT = ("\ue000system\ue000", "\ue000user\ue000", "\ue000answer\ue000", "\ue000next\ue000")
TEMPLATE_FILE = ".jinja"  # ends the name of a file with a chat template
_DEFAULT = "default"  # transformers' name of the template that is used without a name
_THINKING = "enable_thinking"  # the variable with which templates of thinking models switch it off

Messages = Sequence[tuple[str, str]]  # (role, content)


@dataclass(frozen=True)
class ChatTemplate:
    """The literal text around the turns of a conversation.

    Attributes:
        pieces: before the system prompt, between system prompt and user turn, between user turn and answer, and the end of turn.
        stop_ids: the tokens at which an answer ends.
        opening_alone: before the user turn if there is no system turn; None if the template always has one.
        next_turn: between an end of turn and the next question; None if earlier turns are rendered in a way that cannot be followed.
        system_in_user: there is no system turn: the system prompt begins the first user turn.
        answer_prefix: white space that belongs to the answer.
        earlier_before_answer: what stands before the answers of earlier turns, if it differs (thinking models leave an empty thought out).
    """

    pieces: tuple[str, str, str, str]
    stop_ids: tuple[int, ...]
    opening_alone: str | None = None
    next_turn: str | None = None
    system_in_user: bool = False
    answer_prefix: str = ""
    earlier_before_answer: str | None = None


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's chat template as a function of messages."""

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # data.template_kwargs
    takes_lists: bool = False  # content as [{"type": "text", "text": ...}], as some vision models want it
    _rendered: dict[tuple[Messages, bool], str] = field(default_factory=dict, compare=False)

    def conversation(self, messages: Messages) -> list[dict[str, Any]]:
        """Messages in the form that the template takes."""
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if self.takes_lists else text}
            for role, text in messages
        ]

    def text(self, messages: Messages, asks: bool) -> str:
        """The rendered text, up to where the answer begins if `asks`.

        Raises:
            ProgramError: what the template or Jinja raises.
            UserError: the template takes too much time or memory.
        """

        def render() -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    self.conversation(messages), tokenize=False, add_generation_prompt=asks, **self.kwargs
                )
            )

        key = (tuple(messages), asks)
        if key not in self._rendered:
            self._rendered[key] = bounded_text(render, f"the chat template of {self.tokenizer.name_or_path}")
        return self._rendered[key]

    def ids(self, messages: Messages, asks: bool) -> list[int]:
        """The same as token ids."""
        return token_ids(self.tokenizer, self.text(messages, asks), special=True)

    def attempt(self, messages: Messages, asks: bool) -> str:
        """The rendered text; "" if the template refuses these messages."""
        try:
            return self.text(messages, asks)
        except ProgramError:
            return ""


def choose_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> None:
    """Give a tokenizer one chat template: only this one is trained, asked, and stored in the run.

    Args:
        tokenizer: the model's; some have several templates by name (additional_chat_templates/, or a list in tokenizer_config.json).
        wanted: data.chat_template: a name, or a file that ends in .jinja; None for the default one.

    Raises:
        UserError: no such template or file, or several of which none is the default.
    """
    if wanted is not None and wanted.endswith(TEMPLATE_FILE):
        file = find(wanted)
        if file is None:
            raise UserError(
                f"data.chat_template={wanted}: no such file, neither in the working directory nor in the project"
            )
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template={wanted}: cannot be read ({type(error).__name__})") from error
        return
    found = tokenizer.chat_template
    templates: Mapping[str, str] = found if isinstance(found, dict) else {_DEFAULT: found} if found else {}
    name = _DEFAULT if wanted is None else wanted
    if name in templates:
        if len(templates) > 1:
            others = ", ".join(sorted(set(templates) - {name}))
            log.info("chat template: %s (data.chat_template=... takes another: %s)", name, others)
        tokenizer.chat_template = templates[name]
    elif wanted is not None:
        has = f"it has {', '.join(sorted(templates))}" if templates else "it has none"
        raise UserError(
            f"data.chat_template={wanted}: the tokenizer has no such template; {has}, and a file ends in {TEMPLATE_FILE}"
        )
    elif templates:
        raise UserError(
            f"data.chat_template: the tokenizer has several and no default: choose one of {', '.join(sorted(templates))}"
        )


def build_renderer(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> Renderer:
    """The renderer of a tokenizer's chat template, with content in the form that shows the user's text.

    Raises:
        UserError: no chat template, or one that renders no question and answer.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template: take an Instruct model, or give data.chat_template=FILE.jinja"
        )
    question: Messages = [("user", USER), ("assistant", ANSWER)]
    for takes_lists in (False, True):
        renderer = Renderer(tokenizer, kwargs, takes_lists)
        if _in_order(renderer.attempt(question, asks=False), USER, ANSWER):
            break
    else:
        try:
            Renderer(tokenizer, kwargs).text(question, asks=False)
            reason = "it shows no question and answer"
        except ProgramError as error:
            reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the chat template of {name} refuses a user and an assistant turn ({reason}): take an Instruct model"
        )
    asked = renderer.attempt(question[:1], asks=True)
    trained = renderer.text(question, asks=False)
    opens_alike = trained.startswith(asked) and not trained[len(asked) :].partition(ANSWER)[0].strip()
    if not opens_alike and _THINKING in str(tokenizer.chat_template) and _THINKING not in kwargs:
        log.info(
            "the model thinks before it answers; it is trained and asked without: data.template_kwargs.%s=false",
            _THINKING,
        )
        return Renderer(tokenizer, {**kwargs, _THINKING: False}, renderer.takes_lists)
    return renderer


def take_apart(renderer: Renderer) -> ChatTemplate:
    """Read the text around each turn off the template's own rendering.

    Raises:
        UserError: a template that this contract cannot follow.
    """
    tokenizer, name = renderer.tokenizer, renderer.tokenizer.name_or_path
    system: Messages = [("system", SYSTEM), ("user", USER)]
    alone: Messages = [("user", USER)]
    marks: tuple[str, ...] = (SYSTEM, USER)
    # Some templates show the system prompt only while the last turn is a question: it would be missing from every trained row.
    has_system = _in_order(renderer.attempt(system, asks=True), *marks) and _in_order(
        renderer.attempt([*system, ("assistant", ANSWER)], asks=False), *marks, ANSWER
    )
    turns = system if has_system else alone
    asked = renderer.attempt(turns, asks=True)
    opening, middle, before_asked = _split(asked, *marks) if has_system else ("", "", asked.partition(USER)[2])
    trained = renderer.attempt([*turns, ("assistant", ANSWER)], asks=False)
    before_answer = trained.rpartition(USER)[2].partition(ANSWER)[0]
    rest = trained.partition(ANSWER)[2]
    answer_prefix = ""
    if before_answer.startswith(before_asked) and not before_answer[len(before_asked) :].strip():
        before_answer, answer_prefix = before_asked, before_answer[len(before_asked) :]
    elif not before_answer.startswith(before_asked) and not _opens_a_thought(before_asked, before_answer):
        raise UserError(f"the chat template of {name} opens an answer differently in training and in asking")
    # Otherwise one of the two opens with a thought or names a channel: it is trained and asked as the finished conversation shows it.
    end, stop = _end_of_turn(tokenizer, rest)
    first = trained.partition(SYSTEM if has_system else USER)[0]
    bos = tokenizer.bos_token_id
    if bos is not None and token_ids(tokenizer, first, special=True).count(bos) > 1:
        raise UserError(f"the chat template of {name} begins with more than one {tokenizer.bos_token}")
    pieces = opening, middle, before_answer, end
    alone_opening = _opening_alone(renderer, before_asked) if has_system else first
    stop_ids = {stop, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
    earlier, next_turn = _next_turn(renderer, turns, answer_prefix, pieces)
    return ChatTemplate(
        pieces if has_system else ("", "", before_answer, end),
        tuple(sorted(stop_ids)),
        alone_opening,
        next_turn,
        not has_system,
        answer_prefix,
        earlier if earlier != before_answer else None,
    )


def _opens_a_thought(asked: str, trained: str) -> bool:
    """Whether only asking opens a thought, which finished conversations leave out."""
    return asked.startswith(trained) and "think" in asked[len(trained) :]


def _in_order(text: str, *marks: str) -> bool:
    places = [text.find(mark) for mark in marks]
    return -1 not in places and places == sorted(places)


def _split(text: str, *marks: str) -> tuple[str, ...]:
    """The parts of a text between marks that are in it in this order."""
    parts = []
    for mark in marks:
        part, _, text = text.partition(mark)
        parts.append(part)
    return (*parts, text)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, rest: str) -> tuple[str, int]:
    """The text that ends an answer, up to its first special token, and that token; the end of the text if the template has nothing there."""
    for token in token_ids(tokenizer, rest, special=True):
        if token in tokenizer.all_special_ids:
            text = str(tokenizer.convert_ids_to_tokens(token))
            return rest.partition(text)[0] + text, token
    if tokenizer.eos_token_id is None or rest.strip():
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} ends an answer without a special token: it would never stop"
        )
    return str(tokenizer.eos_token), int(tokenizer.eos_token_id)


def _opening_alone(renderer: Renderer, before_asked: str) -> str | None:
    opening, mark, rest = renderer.attempt([("user", USER)], asks=True).partition(USER)
    return opening if mark and rest == before_asked else None


def _next_turn(
    renderer: Renderer, turns: Messages, answer_prefix: str, pieces: tuple[str, str, str, str]
) -> tuple[str | None, str | None]:
    """What stands before an earlier answer, and between its end and the next question; None, None if no form is found."""
    whole = renderer.attempt([*turns, ("assistant", ANSWER), ("user", NEXT)], asks=True)
    if not _in_order(whole, USER, ANSWER, NEXT):
        return None, None
    before, between, after = _split(whole.partition(USER)[2], ANSWER, NEXT)
    end = pieces[3]
    is_same_start = whole.startswith(renderer.attempt(turns, asks=True).partition(USER)[0])
    is_same_end = pieces[2].startswith(after) or after.startswith(pieces[2])
    if answer_prefix:
        before = before.removesuffix(answer_prefix)
    if not is_same_start or not is_same_end:
        return None, None
    if between.startswith(end):
        return before, between[len(end) :]
    # A template without an end of turn of its own: the end of the text ends an answer, and here nothing does.
    return None, None
