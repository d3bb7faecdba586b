"""The prompt contract: a question -> token ids and loss mask, the same for training, evaluation and answering.

A little over 300 lines: one class whose methods all read the same pieces of the template.
"""

import hashlib
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast, get_args

from transformers import PreTrainedTokenizerBase

from intern.data.chat_template import Renderer, build_renderer, take_apart
from intern.data.conversation import checked_text
from intern.data.row_tokens import (
    IGNORED,
    Encoded,
    Kind,
    LossOn,
    Part,
    RowTexts,
    TemplateTexts,
    cut_parts,
    encoded,
    inside_context,
    user_turn,
)
from intern.data.stored_prompt import prompt_arguments
from intern.data.truncation import Cut, longest_text
from intern.errors import UserError

Context = Literal["never", "always", "mixed"]
log = logging.getLogger(__name__)
# Ordinary text with everything that a template might change: quotes, tags, commas, years, line breaks, length.
_QUESTION = "How much did it grow, in 2024?\nSay \"why\" & 'how' <briefly>: 1,234.5% of $5." + " And so on." * 30
_ANSWER = "It rose 18%, from $1,000 in 2023:\n\n- \"why\" & 'how' <b>so</b>;\n- 1,234.5%." + " And so on." * 30
__all__ = ["IGNORED", "Context", "Encoded", "Kind", "LossOn", "Prompt", "Token"]


@dataclass(frozen=True)
class Token:
    """One token of a row, for a person to look at: what it belongs to, and whether it went so that the row fits."""

    id: int
    kind: Kind
    cut: bool


@dataclass(frozen=True)
class Prompt:
    """A chat template taken apart once, so that template text and people's text never mix.

    `template` is the literal text before the system prompt, between system prompt and user turn, between user turn and answer, and the
    end of turn. Only these pieces may become special tokens: everything else is tokenized as plain text. A run stores the pieces, so a
    template that changes (or carries today's date) cannot make a question look different from what was trained.

    `opening_alone` is the text before the user turn of a row without a system prompt, and `next_turn` the text between an answer's end of
    turn and the next question. They are None if the template has no such form, and in runs from before there was one: then an empty system
    prompt is rendered as an empty turn, and several turns are refused. The other texts are those of `ChatTemplate`.

    `is_joined` says that text is tokenized together across the pieces, up to the next special token: the tokenizer of such a model gives
    other tokens to the parts alone. `template_kwargs` is what the template was rendered with, for programs that render it again.
    """

    system_prompt: str
    context: Context
    template: tuple[str, str, str, str]
    stop_ids: tuple[int, ...]
    opening_alone: str | None = None
    next_turn: str | None = None
    system_in_user: bool = False
    answer_prefix: str = ""
    earlier_before_answer: str | None = None
    is_joined: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str,
        context: str,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "Prompt":
        """The prompt of a tokenizer's own chat template.

        Args:
            tokenizer: the model's.
            system_prompt: data.system_prompt; empty for none.
            context: data.context.
            template_kwargs: data.template_kwargs, variables of the chat template such as {"enable_thinking": False}.

        Raises:
            UserError: no chat template, one that this contract cannot follow, or a context mode that does not exist.
        """
        if context not in get_args(Context):
            raise UserError(f"data.context={context}: must be auto or one of {', '.join(get_args(Context))}")
        renderer = build_renderer(tokenizer, template_kwargs or {})
        template = take_apart(renderer)
        prompt = cls(
            system_prompt.strip(),
            cast(Context, context),
            template.pieces,
            template.stop_ids,
            template.opening_alone,
            template.next_turn,
            template.system_in_user,
            template.answer_prefix,
            template.earlier_before_answer,
            template_kwargs=dict(renderer.kwargs),
        )
        if not prompt._renders_like_template(renderer, []):
            prompt = replace(prompt, is_joined=True)
            if not prompt._renders_like_template(renderer, []):
                raise UserError(
                    f"the tokenizer of {tokenizer.name_or_path} renders turns of its chat template in a way that cannot be followed: "
                    "take another model of the family"
                )
        if not prompt._asks_as_trained(tokenizer):
            prompt = prompt._with_space_in_answer()
            if not prompt._renders_like_template(renderer, []) or not prompt._asks_as_trained(tokenizer):
                raise UserError(
                    f"the tokenizer of {tokenizer.name_or_path} joins the start of an answer with the text before it, so a question would "
                    "be asked in other tokens than it was trained: take another model of the family"
                )
        if prompt.next_turn is not None and not prompt._renders_like_template(renderer, [("Why?", "Because.")]):
            prompt = replace(prompt, next_turn=None)
        return prompt

    def _renders_like_template(self, renderer: Renderer, history: Sequence[tuple[str, str]]) -> bool:
        """Whether ordinary text comes out as the library's own rendering: some tokenizers change text at the seams between pieces."""
        has_system = bool(self.system_prompt) or self.opening_alone is None
        turns = [("user", question) for question, _ in history] + [("user", _QUESTION)]
        head = []
        if self.system_in_user:
            turns[0] = "user", self._with_system(turns[0][1])
        elif has_system:
            head = [("system", self.system_prompt)]
        messages = [*head]
        for question, (_, answer) in zip(turns, history, strict=False):
            messages += [question, ("assistant", answer)]
        messages += [turns[-1], ("assistant", _ANSWER)]
        theirs = renderer.ids(messages, asks=False)
        [ours] = self.encode(renderer.tokenizer, [_QUESTION], [_ANSWER], histories=[history])
        # After the end of turn some templates add a line break, or nothing where we end the text.
        return ours is not None and _agree(ours.input_ids, theirs, self.stop_ids)

    def _asks_as_trained(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the tokens of a question alone begin those of the question with its answer."""
        [asked], [trained] = (
            self.encode(tokenizer, [_QUESTION]),
            self.encode(tokenizer, [_QUESTION], [_ANSWER]),
        )
        return (
            asked is not None and trained is not None and trained.input_ids[: len(asked.input_ids)] == asked.input_ids
        )

    def _with_space_in_answer(self) -> "Prompt":
        """The same texts, with the white space before an answer as a part of the answer, which tokenizers join with its first word."""
        first, second, before, end = self.template
        head = before.rstrip()
        return replace(
            self, template=(first, second, head, end), answer_prefix=before[len(head) :] + self.answer_prefix
        )

    def _with_system(self, question: str, system: str | None = None) -> str:
        head = self.system_prompt if system is None else system
        return f"{head}\n\n{question}" if head else question

    def trains_with_material(self, question: str) -> bool:
        """Whether training shows this question with its material; half of them under "mixed", the same ones every time."""
        return self.context == "always" or (self.context == "mixed" and zlib.crc32(question.encode()) % 2 == 0)

    @property
    def scores_with_material(self) -> bool:
        """Whether golden rows are shown with their material: wherever the model may be asked so."""
        return self.context != "never"

    def check_question(self, question: str, material: str | None) -> None:
        """Raises UserError for an empty question or material that no training row had; warns where material is missing."""
        if not question.strip():
            raise UserError("question is empty: give question='...'")
        checked_text(question, "question")
        checked_text(material, "context")
        if self.context == "always" and not material:
            log.warning("this run was trained with material before every question: give it with context='...'")
        if self.context == "never" and material:
            raise UserError("this run was trained with data.context=never: ask without context=")

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        answers: Sequence[str] | None = None,
        materials: Sequence[str | None] | None = None,
        max_length: int | None = None,
        *,
        histories: Sequence[Sequence[tuple[str, str]]] | None = None,
        systems: Sequence[str | None] | None = None,
        loss_on: LossOn = "all",
    ) -> list[Encoded | None]:
        """Turn rows into token ids and labels.

        Args:
            tokenizer: the model's.
            questions: the last question of each row.
            answers: their answers; None: the ids end where the answer would begin, the prefix of the trained row.
            materials: the context of each last question, None for a question alone.
            max_length: the most tokens of a row (intern/data/truncation.py says what goes); None: any number.
            histories: the (question, answer) pairs before each last question.
            systems: a system prompt of each row's own, None for the prompt's.
            loss_on: "all" answers carry loss, or the "last" one only.

        Returns:
            One entry per row; None for a row that does not fit.

        Raises:
            UserError: a row of several turns, and a chat template that has no form for them.
        """
        nothing: list[Any] = [None] * len(questions)
        # Before earlier answers a thinking model's template leaves an empty thought out: what precedes them is not what is asked.
        learns_earlier = loss_on == "all" and self.earlier_before_answer is None
        given: list[Sequence[Any]] = [
            questions,
            materials or nothing,
            histories or nothing,
            systems or nothing,
            answers or nothing,
        ]
        rows = [
            self._row_texts(*row, max_length, learns_earlier)  # type: ignore[call-arg]  # zip loses how many there are
            for row in zip(*given, strict=True)
        ]
        template = self._template_texts
        if self.is_joined:
            every = [[] if row is None else template.joined_parts(tokenizer, row) for row in rows]
        else:
            every = self._parts(tokenizer, template, rows)
        found = [
            None if row is None else encoded(tokenizer, row, parts, max_length)
            for row, parts in zip(rows, every, strict=True)
        ]
        if not self.system_in_user:
            return found
        return [
            # The system prompt (the row's own or the prompt's) went with the first turn: it must begin the first turn that stays.
            self._without_turns(tokenizer, one, row, max_length, loss_on) if one is not None and one.turns_cut else one
            for one, row in zip(found, zip(*given, strict=True), strict=True)
        ]

    def _without_turns(
        self,
        tokenizer: PreTrainedTokenizerBase,
        one: Encoded,
        row: tuple[Any, ...],
        max_length: int | None,
        loss_on: LossOn,
    ) -> Encoded | None:
        question, material, history, system, answer = row
        [shorter] = self.encode(
            tokenizer,
            [question],
            None if answer is None else [answer],
            [material],
            max_length,
            histories=[history[one.turns_cut :]],
            systems=[system],
            loss_on=loss_on,
        )
        return None if shorter is None else replace(shorter, turns_cut=shorter.turns_cut + one.turns_cut)

    def _parts(
        self, tokenizer: PreTrainedTokenizerBase, template: TemplateTexts, rows: Sequence[RowTexts | None]
    ) -> list[list[Part]]:
        """The parts of rows whose texts are tokenized alone."""
        # One call for all texts: a fast tokenizer spreads them over the cores.
        texts = list(dict.fromkeys(text for row in rows if row is not None for text in row.texts))
        every = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
        ids = dict(zip(texts, every, strict=True))
        pieces = template.ids(tokenizer)
        return [[] if row is None else pieces.parts(row, [ids[text] for text in row.texts]) for row in rows]

    def explain(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        material: str | None,
        max_length: int,
        *,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
    ) -> list[Token]:
        """Every token of a training row with what it is.

        Returns:
            Those not marked as cut are the ids of `encode`. A row that does not fit has no mark; of one whose text alone is too long to be
            tokenized there are no tokens.
        """
        row = self._row_texts(question, material, history, system, answer, max_length)
        if row is None:
            return []
        template = self._template_texts
        parts = template.joined_parts(tokenizer, row) if self.is_joined else self._parts(tokenizer, template, [row])[0]
        inside = inside_context(tokenizer, row, parts)
        cut = cut_parts(parts, inside, max_length) or Cut(0, 0)
        shown, gone = set(inside), set(inside[len(inside) - cut.context :])
        if cut.turns and self.system_in_user:
            before = [Token(one, part.kind, True) for part in parts if 0 <= part.turn < cut.turns for one in part.ids]
            rest = list(history)[row.turns_skipped + cut.turns :]
            return before + self.explain(tokenizer, question, answer, material, max_length, history=rest, system=system)
        tokens = []
        for part in parts:
            if part.kind == "question" and part.turn < 0:
                tokens += [
                    Token(one, "material" if index in shown else part.kind, index in gone)
                    for index, one in enumerate(part.ids)
                ]
            else:
                tokens += [Token(one, part.kind, 0 <= part.turn < cut.turns) for one in part.ids]
        return tokens

    def _row_texts(
        self,
        question: str,
        material: str | None,
        history: Sequence[tuple[str, str]] | None,
        system: str | None,
        answer: str | None,
        max_length: int | None,
        learns_earlier: bool = True,
    ) -> RowTexts | None:
        """The texts of a row as they are tokenized; None if those that cannot be cut are too long to be worth it."""
        turns = [(asked.strip(), self.answer_prefix + said.strip()) for asked, said in history or ()]
        if turns and self.next_turn is None:
            raise UserError("the chat template of this model has no form for rows of several turns: take another model")
        head = self.system_prompt if system is None else system.strip()
        row_system = head if (head or self.opening_alone is None) and not self.system_in_user else None
        if max_length is not None:
            most = longest_text(max_length)
            if len(head) + len(question) + len(answer or "") > most:
                return None
            if material and len(material.strip()) > most:
                material = material.strip()[:most]
            turns = _newest(turns, most)
        user, told = user_turn(question, material), None if answer is None else self.answer_prefix + answer.strip()
        if self.system_in_user and head:
            if turns:
                turns[0] = self._with_system(turns[0][0], head), turns[0][1]
            else:
                more = len(self._with_system("", head))
                user = self._with_system(user[0], head), user[1] + more, user[2] + more
        return RowTexts(row_system, turns, user, told, len(history or ()) - len(turns), learns_earlier)

    @property
    def _template_texts(self) -> TemplateTexts:
        before_answer = self.template[2]
        earlier = before_answer if self.earlier_before_answer is None else self.earlier_before_answer
        return TemplateTexts(*self.template, self.opening_alone or "", self.next_turn or "", earlier)

    def to_json(self) -> dict[str, Any]:
        """What prompt.json holds."""
        return asdict(self) | {"template_sha256": hashlib.sha256("\0".join(self.template).encode()).hexdigest()}

    @classmethod
    def from_json(cls, stored: dict[str, Any], place: str = "prompt.json") -> "Prompt":
        """The prompt of a finished run; UserError, beginning with `place`, where it is not as `to_json` writes it."""
        return cls(**prompt_arguments(stored, get_args(Context), place))


def _newest(turns: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """The last turns that have at most `most` characters together: the oldest go first, as in `cut_to_fit`."""
    characters = 0
    for count, (question, answer) in enumerate(reversed(turns)):
        characters += len(question) + len(answer)
        if characters > most:
            return turns[len(turns) - count :]
    return turns


def _agree(ours: list[int], theirs: list[int], stop_ids: tuple[int, ...]) -> bool:
    """Whether two renderings of a conversation are the same up to the end of the last answer.

    After it some templates add a line break; where a template has no end of its own, ours has the end of the text.
    """
    count = min(len(ours), len(theirs))
    rest = [*ours[count:], *theirs[count:]]
    return ours[:count] == theirs[:count] and len(rest) <= 4 and all(token in stop_ids for token in ours[count:])
