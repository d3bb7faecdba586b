"""The prompt contract: a question -> token ids and loss mask, the same for training, evaluation and answering."""

import hashlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from intern.errors import UserError

Context = Literal["never", "always", "mixed"]
Kind = Literal["template", "system", "material", "question", "answer", "end of turn"]
log = logging.getLogger(__name__)

IGNORED = -100  # the label of a token without loss (torch.nn.CrossEntropyLoss's ignore_index)
_SYSTEM, _USER, _ANSWER = (
    "\ue000system\ue000",
    "\ue000user\ue000",
    "\ue000answer\ue000",
)  # private-use marks: no text has them


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it. labels[i] is input_ids[i] where token i carries loss, else IGNORED; both have the same length."""

    input_ids: list[int]
    labels: list[int]
    context_tokens_cut: int  # tokens taken off the end of the material so that the row fits


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
    """

    system_prompt: str
    context: Context
    template: tuple[str, str, str, str]
    stop_ids: tuple[int, ...]

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
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        try:
            asked = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            answered = str(
                tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": _ANSWER}], tokenize=False)
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} refuses a system and a user turn: {error}"
            ) from error
        pieces = []
        rest = answered
        for mark in (_SYSTEM, _USER, _ANSWER):
            piece, _, rest = rest.partition(mark)
            pieces.append(piece)
        if asked != pieces[0] + _SYSTEM + pieces[1] + _USER + pieces[2]:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} opens an answer differently in training and in asking"
            )
        end_of_turn = _ids(tokenizer, rest, special=True)[:1]
        if not end_of_turn or end_of_turn[0] not in tokenizer.all_special_ids:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} ends an answer without a special token: it would never stop"
            )
        opening = _ids(tokenizer, pieces[0], special=True)
        if tokenizer.bos_token_id is not None and opening.count(tokenizer.bos_token_id) > 1:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} begins with more than one {tokenizer.bos_token}"
            )
        stop_ids = {*end_of_turn, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
        template = (pieces[0], pieces[1], pieces[2], str(tokenizer.decode(end_of_turn)))
        prompt = cls(system_prompt.strip(), cast(Context, context), template, tuple(sorted(stop_ids)))
        prompt._check_against_template(tokenizer)
        return prompt

    def _check_against_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ordinary text must come out as the library's own rendering: some tokenizers change text at the seams between pieces."""
        messages = [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": "How much?"}]
        theirs: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        [ours] = self.encode(tokenizer, ["How much?"])
        if ours is None or ours.input_ids != list(theirs["input_ids"]):
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} joins text across the turns of its chat template: not supported"
            )

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
    ) -> list[Encoded | None]:
        """Token ids and labels of some rows.

        Without answers the ids end where the answer would begin: the prefix of the trained row. A row that is longer than max_length
        tokens loses the end of its material; one that is too long even without material is None.
        """
        opening, middle, before_answer, end_of_turn = self._template_ids(tokenizer)
        head = opening + _ids(tokenizer, self.system_prompt, special=False) + middle
        shown = [
            _user_turn(question, material)
            for question, material in zip(questions, materials or [None] * len(questions), strict=True)
        ]
        users = tokenizer([text for text, _, _ in shown], add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        replies: list[list[int]] = [[] for _ in questions]
        if answers is not None:
            plain = tokenizer(
                [answer.strip() for answer in answers], add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            replies = [list(ids) + end_of_turn for ids in plain]
        rows: list[Encoded | None] = []
        for (text, start, end), user, reply in zip(shown, users, replies, strict=True):
            room = None if max_length is None else max_length - len(head) - len(before_answer) - len(reply)
            cut = 0
            if room is not None and len(user) > room:
                cut = len(user) - room
                inside = _inside_material(tokenizer, text, start, end)
                if len(inside) < cut:
                    rows.append(None)
                    continue
                gone = set(inside[len(inside) - cut :])
                user = [token for index, token in enumerate(user) if index not in gone]
            prefix = head + list(user) + before_answer
            rows.append(Encoded(prefix + reply, [IGNORED] * len(prefix) + reply, cut))
        return rows

    def explain(
        self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str, material: str | None, max_length: int
    ) -> list[Token]:
        """Every token of a training row with what it is. Those not marked as cut are what `encode` gives; a row that it drops has no mark."""
        opening, middle, before_answer, end_of_turn = self._template_ids(tokenizer)
        text, start, end = _user_turn(question, material)
        user = _ids(tokenizer, text, special=False)
        inside = _inside_material(tokenizer, text, start, end)
        around: list[tuple[Kind, list[int]]] = [
            ("template", opening),
            ("system", _ids(tokenizer, self.system_prompt, special=False)),
            ("template", middle),
            ("question", user),
            ("template", before_answer),
            ("answer", _ids(tokenizer, answer.strip(), special=False)),
            ("end of turn", end_of_turn),
        ]
        cut = max(sum(len(ids) for _, ids in around) - max_length, 0)
        gone = set(inside[len(inside) - cut :]) if cut <= len(inside) else set()
        tokens = []
        for kind, ids in around:
            if kind == "question":
                shown = set(inside)
                tokens += [
                    Token(one, "material" if index in shown else kind, index in gone) for index, one in enumerate(ids)
                ]
            else:
                tokens += [Token(one, kind, False) for one in ids]
        return tokens

    def _template_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int], list[int]]:
        opening, middle, before_answer, end_of_turn = (_ids(tokenizer, piece, special=True) for piece in self.template)
        return opening, middle, before_answer, end_of_turn

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
        first, second, third, fourth = template
        return cls(stored["system_prompt"], stored["context"], (first, second, third, fourth), tuple(stop_ids))


def _is_text(value: Any) -> bool:
    """Text that a tokenizer takes: no half surrogate pairs."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"])


def _user_turn(question: str, material: str | None) -> tuple[str, int, int]:
    """The text of a user's turn, and where its material starts and ends in it."""
    if not material:
        return question.strip(), 0, 0
    before, material = "Material:\n", material.strip()
    return f"{before}{material}\n\nQuestion: {question.strip()}", len(before), len(before) + len(material)


def _inside_material(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> list[int]:
    """Which tokens of a user's turn lie inside its material, from the first to the last."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    return [
        index
        for index, (first, last) in enumerate(encoded["offset_mapping"])
        if start <= first and last <= end and first < last
    ]
