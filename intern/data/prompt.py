"""The prompt contract: a question -> token ids and loss mask, the same for training, evaluation and answering.

A little over 300 lines: one class whose methods all read the same pieces of the template.
"""

import hashlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from intern.data.chat_template import ANSWER, SYSTEM, USER, next_turn, opening_alone
from intern.data.row_tokens import (
    IGNORED,
    Encoded,
    Kind,
    LossOn,
    RowTexts,
    TemplateIds,
    cut_parts,
    encoded,
    inside_context,
    token_ids,
    user_turn,
)
from intern.data.truncation import Cut, longest_text
from intern.errors import UserError

Context = Literal["never", "always", "mixed"]
log = logging.getLogger(__name__)
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
    prompt is rendered as an empty turn, and several turns are refused.
    """

    system_prompt: str
    context: Context
    template: tuple[str, str, str, str]
    stop_ids: tuple[int, ...]
    opening_alone: str | None = None
    next_turn: str | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, system_prompt: str, context: str) -> "Prompt":
        """The prompt of a tokenizer's own chat template.

        Raises:
            UserError: no chat template, one that this contract cannot follow, or a context mode that does not exist.
        """
        if context not in get_args(Context):
            raise UserError(f"data.context={context}: must be one of {', '.join(get_args(Context))}")
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: take an Instruct model")
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
        try:
            asked = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            answered = str(
                tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": ANSWER}], tokenize=False)
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} refuses a system and a user turn: {error}"
            ) from error
        pieces = []
        rest = answered
        for mark in (SYSTEM, USER, ANSWER):
            piece, _, rest = rest.partition(mark)
            pieces.append(piece)
        if asked != pieces[0] + SYSTEM + pieces[1] + USER + pieces[2]:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} opens an answer differently in training and in asking"
            )
        end_of_turn = token_ids(tokenizer, rest, special=True)[:1]
        if not end_of_turn or end_of_turn[0] not in tokenizer.all_special_ids:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} ends an answer without a special token: it would never stop"
            )
        opening = token_ids(tokenizer, pieces[0], special=True)
        if tokenizer.bos_token_id is not None and opening.count(tokenizer.bos_token_id) > 1:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} begins with more than one {tokenizer.bos_token}"
            )
        stop_ids = {*end_of_turn, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
        template = (pieces[0], pieces[1], pieces[2], str(tokenizer.decode(end_of_turn)))
        prompt = cls(
            system_prompt.strip(),
            cast(Context, context),
            template,
            tuple(sorted(stop_ids)),
            opening_alone(tokenizer, pieces[2]),
            next_turn(tokenizer, template),
        )
        if not prompt._renders_like_template(tokenizer, []):
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} joins text across the turns of its chat template: not supported"
            )
        if prompt.next_turn is not None and not prompt._renders_like_template(tokenizer, [("Why?", "Because.")]):
            prompt = replace(prompt, next_turn=None)
        return prompt

    def _renders_like_template(self, tokenizer: PreTrainedTokenizerBase, history: Sequence[tuple[str, str]]) -> bool:
        """Whether ordinary text comes out as the library's own rendering: some tokenizers change text at the seams between pieces."""
        has_system = bool(self.system_prompt) or self.opening_alone is None
        messages = [{"role": "system", "content": self.system_prompt}] if has_system else []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": "How much?"})
        theirs: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        [ours] = self.encode(tokenizer, ["How much?"], histories=[history])
        return ours is not None and ours.input_ids == list(theirs["input_ids"])

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
        rows = [
            self._row_texts(*row, max_length)
            for row in zip(
                questions,
                materials or nothing,
                histories or nothing,
                systems or nothing,
                answers or nothing,
                strict=True,
            )
        ]
        # One call for all texts: a fast tokenizer spreads them over the cores.
        texts = list(dict.fromkeys(text for row in rows if row is not None for text in row.texts))
        every = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
        ids = dict(zip(texts, every, strict=True))
        pieces = self._template_ids(tokenizer)
        return [
            None
            if row is None
            else encoded(tokenizer, row, pieces.parts(row, [ids[text] for text in row.texts]), max_length, loss_on)
            for row in rows
        ]

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
        parts = self._template_ids(tokenizer).parts(
            row, [token_ids(tokenizer, text, special=False) for text in row.texts]
        )
        inside = inside_context(tokenizer, *row.user)
        cut = cut_parts(parts, inside, max_length) or Cut(0, 0)
        gone = set(inside[len(inside) - cut.context :])
        tokens = []
        for part in parts:
            if part.kind == "question" and part.turn < 0:
                shown = set(inside)
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
    ) -> RowTexts | None:
        """The texts of a row as they are tokenized; None if those that cannot be cut are too long to be worth it."""
        turns = [(asked.strip(), said.strip()) for asked, said in history or ()]
        if turns and self.next_turn is None:
            raise UserError("the chat template of this model has no form for rows of several turns: take another model")
        head = self.system_prompt if system is None else system.strip()
        row_system = head if head or self.opening_alone is None else None
        if max_length is not None:
            most = longest_text(max_length)
            if len(head) + len(question) + len(answer or "") > most:
                return None
            if material and len(material.strip()) > most:
                material = material.strip()[:most]
            while sum(len(text) for turn in turns for text in turn) > most:  # the oldest go first, as in `cut_to_fit`
                turns = turns[1:]
        user, told = user_turn(question, material), None if answer is None else answer.strip()
        return RowTexts(row_system, turns, user, told, len(history or ()) - len(turns))

    def _template_ids(self, tokenizer: PreTrainedTokenizerBase) -> TemplateIds:
        pieces = (*self.template, self.opening_alone or "", self.next_turn or "")
        return TemplateIds(*(token_ids(tokenizer, piece, special=True) for piece in pieces))

    def to_json(self) -> dict[str, Any]:
        """What prompt.json holds."""
        return asdict(self) | {"template_sha256": hashlib.sha256("\0".join(self.template).encode()).hexdigest()}

    @classmethod
    def from_json(cls, stored: dict[str, Any], place: str = "prompt.json") -> "Prompt":
        """The prompt of a finished run; UserError, beginning with `place`, where it is not as `to_json` writes it."""
        template, stop_ids = stored.get("template"), stored.get("stop_ids")
        if not isinstance(template, list) or len(template) != 4 or not all(map(_is_text, template)):
            raise UserError(f"{place}: template must be four pieces of text")
        if not _is_text(stored.get("system_prompt")):
            raise UserError(f"{place}: system_prompt must be text")
        if stored.get("context") not in get_args(Context):
            raise UserError(f"{place}: context must be one of {', '.join(get_args(Context))}")
        if (
            not isinstance(stop_ids, list)
            or not stop_ids
            or not all(type(token) is int and 0 <= token < 2**31 for token in stop_ids)
        ):
            raise UserError(f"{place}: stop_ids must be the numbers of tokens")
        for name in ("opening_alone", "next_turn"):
            if stored.get(name) is not None and not _is_text(stored[name]):
                raise UserError(f"{place}: {name} must be text, or null")
        first, second, third, fourth = template
        return cls(
            stored["system_prompt"],
            stored["context"],
            (first, second, third, fourth),
            tuple(stop_ids),
            stored.get("opening_alone"),
            stored.get("next_turn"),
        )


def _is_text(value: Any) -> bool:
    """Text that a tokenizer takes: no half surrogate pairs."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
