"""The texts of a row and the tokens that they become, part by part: what encoding a row and explaining one share."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from intern.data.truncation import Cut, cut_to_fit

IGNORED = -100  # the label of a token without loss (torch.nn.CrossEntropyLoss's ignore_index)
Kind = Literal["template", "system", "material", "question", "answer", "end of turn"]
LossOn = Literal["all", "last"]  # which answers of a conversation carry loss


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it. labels[i] is input_ids[i] if token i carries loss, else IGNORED; both have the same length."""

    input_ids: list[int]
    labels: list[int]
    context_tokens_cut: int  # tokens taken off the end of the context so that the row fits
    turns: int = 1  # answers that carry loss
    turns_cut: int = 0  # earlier turns taken off the start of the conversation so that the row fits


class Part(NamedTuple):
    """Some tokens of a row that belong together."""

    kind: Kind
    ids: list[int]
    turn: int  # the earlier turn that they belong to, from 0; -1: not to one, so that they stay whatever is cut

    @property
    def is_learned(self) -> bool:
        """Whether it is what the assistant says."""
        return self.kind in ("answer", "end of turn")


class RowTexts(NamedTuple):
    """A row's texts as they are tokenized."""

    system: str | None  # None: no system turn
    history: list[tuple[str, str]]
    user: tuple[str, int, int]  # the last user turn, and where its context starts and ends
    answer: str | None
    turns_skipped: int  # turns before `history` that are too long to be worth tokenizing

    @property
    def texts(self) -> list[str]:
        """All of them, in their order in the row."""
        system = [] if self.system is None else [self.system]
        answer = [] if self.answer is None else [self.answer]
        return [*system, *(text for turn in self.history for text in turn), self.user[0], *answer]


@dataclass(frozen=True)
class TemplateIds:
    """The pieces of the template as tokens."""

    opening: list[int]
    middle: list[int]
    before_answer: list[int]
    end_of_turn: list[int]
    opening_alone: list[int]
    next_turn: list[int]

    def parts(self, row: RowTexts, ids: list[list[int]]) -> list[Part]:
        """The whole row, from the tokens of its texts."""
        rest = iter(ids)
        if row.system is None:
            parts = [Part("template", self.opening_alone, -1)]
        else:
            parts = [
                Part("template", self.opening, -1),
                Part("system", next(rest), -1),
                Part("template", self.middle, -1),
            ]
        for turn in range(len(row.history)):
            parts += [
                Part("question", next(rest), turn),
                Part("template", self.before_answer, turn),
                Part("answer", next(rest), turn),
                Part("end of turn", self.end_of_turn, turn),
                Part("template", self.next_turn, turn),
            ]
        parts += [Part("question", next(rest), -1), Part("template", self.before_answer, -1)]
        if row.answer is not None:
            parts += [Part("answer", next(rest), -1), Part("end of turn", self.end_of_turn, -1)]
        return parts


def cut_parts(parts: list[Part], inside: list[int], max_length: int) -> Cut | None:
    """What goes of a row; `inside` are the places of the context's tokens in the last question."""
    kept = sum(len(part.ids) for part in parts if part.turn < 0) - len(inside)
    turns = [0] * (1 + max(part.turn for part in parts))
    for part in parts:
        if part.turn >= 0:
            turns[part.turn] += len(part.ids)
    return cut_to_fit(kept, turns, len(inside), max_length)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """The tokens of a text; only a template's own text may hold special tokens."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"])


def user_turn(question: str, material: str | None) -> tuple[str, int, int]:
    """The text of a user turn, and where its context starts and ends in it."""
    if not material:
        return question.strip(), 0, 0
    before, material = "Material:\n", material.strip()
    return f"{before}{material}\n\nQuestion: {question.strip()}", len(before), len(before) + len(material)


def inside_context(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> list[int]:
    """Which tokens of a user turn lie inside its context, from the first to the last."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    return [
        index
        for index, (first, last) in enumerate(encoded["offset_mapping"])
        if start <= first and last <= end and first < last
    ]


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    row: RowTexts,
    parts: list[Part],
    max_length: int | None,
    loss_on: LossOn,
) -> Encoded | None:
    """Join the parts of a row, cut to fit; None if it does not."""
    cut = Cut(0, 0)
    gone: set[int] = set()
    if max_length is not None and sum(len(part.ids) for part in parts) > max_length:
        inside = inside_context(tokenizer, *row.user)
        found = cut_parts(parts, inside, max_length)
        if found is None:
            return None
        cut, gone = found, set(inside[len(inside) - found.context :])
    input_ids: list[int] = []
    labels: list[int] = []
    for part in parts:
        if 0 <= part.turn < cut.turns:
            continue
        ids = part.ids
        if gone and part.kind == "question" and part.turn < 0:
            ids = [token for index, token in enumerate(ids) if index not in gone]
        input_ids += ids
        labels += ids if part.is_learned and (loss_on == "all" or part.turn < 0) else [IGNORED] * len(ids)
    earlier = len(row.history) - cut.turns if loss_on == "all" else 0
    return Encoded(input_ids, labels, cut.context, earlier + 1, row.turns_skipped + cut.turns)
