"""The texts of a row and the tokens that they become, part by part: what encoding a row and explaining one share."""

import bisect
import itertools
import re
from collections.abc import Sequence
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
    is_learned: bool = False  # whether they carry loss
    spans: tuple[tuple[int, int], ...] = ()  # the characters of each token in the part's text, if they are known


class RowTexts(NamedTuple):
    """A row's texts as they are tokenized."""

    system: str | None  # None: no system turn
    history: list[tuple[str, str]]
    user: tuple[str, int, int]  # the last user turn, and where its context starts and ends
    answer: str | None
    turns_skipped: int  # turns before `history` that are too long to be worth tokenizing
    learns_earlier: bool = True  # whether the answers of `history` carry loss

    @property
    def texts(self) -> list[str]:
        """All of them, in their order in the row."""
        system = [] if self.system is None else [self.system]
        answer = [] if self.answer is None else [self.answer]
        return [*system, *(text for turn in self.history for text in turn), self.user[0], *answer]


@dataclass(frozen=True)
class TemplateTexts:
    """The pieces of the template (intern/data/chat_template.py)."""

    opening: str
    middle: str
    before_answer: str
    end_of_turn: str
    opening_alone: str
    next_turn: str
    earlier_before_answer: str

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> "TemplateIds":
        """The pieces as tokens."""
        return TemplateIds(**{name: token_ids(tokenizer, text, special=True) for name, text in vars(self).items()})

    def joined_parts(self, tokenizer: PreTrainedTokenizerBase, row: RowTexts) -> list[Part]:
        """The whole row, with text tokenized together across the pieces up to the next special token.

        A token belongs to the part that holds its last character.
        """
        parts: list[Part] = []
        run: list[_Piece] = []
        for piece in _pieces(row, self):
            for text, is_special in (
                _at_special_tokens(tokenizer, piece.text) if piece.is_template else [(piece.text, False)]
            ):
                if is_special:
                    parts += [
                        *_joined(tokenizer, run),
                        Part(piece.kind, token_ids(tokenizer, text, special=True), piece.turn, piece.is_learned),
                    ]
                    run = []
                elif text:
                    run.append(piece._replace(text=text))
        return _merged([*parts, *_joined(tokenizer, run)])


@dataclass(frozen=True)
class TemplateIds:
    """The pieces of the template as tokens."""

    opening: list[int]
    middle: list[int]
    before_answer: list[int]
    end_of_turn: list[int]
    opening_alone: list[int]
    next_turn: list[int]
    earlier_before_answer: list[int]

    def parts(self, row: RowTexts, ids: list[list[int]]) -> list[Part]:
        """The whole row, from the tokens of its texts."""
        rest = iter(ids)
        return [
            Part(
                piece.kind, getattr(self, piece.text) if piece.is_template else next(rest), piece.turn, piece.is_learned
            )
            for piece in _pieces(row, None)
        ]


class _Piece(NamedTuple):
    """A part of a row before it is tokenized."""

    kind: Kind
    text: str  # of the template: the name of the piece, if its texts are not at hand
    turn: int = -1
    is_template: bool = True
    is_learned: bool = False


def _pieces(row: RowTexts, template: TemplateTexts | None) -> list[_Piece]:
    """The order of a row, stated once."""

    def of_template(name: str, turn: int = -1, kind: Kind = "template", is_learned: bool = False) -> _Piece:
        return _Piece(kind, name if template is None else str(getattr(template, name)), turn, True, is_learned)

    def of_row(kind: Kind, text: str, turn: int = -1, is_learned: bool = False) -> _Piece:
        return _Piece(kind, text, turn, False, is_learned)

    pieces = [of_template("opening_alone")]
    if row.system is not None:
        pieces = [of_template("opening"), of_row("system", row.system), of_template("middle")]
    for turn, (question, answer) in enumerate(row.history):
        pieces += [
            of_row("question", question, turn),
            of_template("earlier_before_answer", turn),
            of_row("answer", answer, turn, row.learns_earlier),
            of_template("end_of_turn", turn, "end of turn", row.learns_earlier),
            of_template("next_turn", turn),
        ]
    pieces += [of_row("question", row.user[0]), of_template("before_answer")]
    if row.answer is not None:
        pieces += [of_row("answer", row.answer, is_learned=True), of_template("end_of_turn", -1, "end of turn", True)]
    return pieces


def _at_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, bool]]:
    """The text in parts, and whether each is a special token."""
    special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    names = "|".join(re.escape(token) for token in special)
    return [(part, part in special) for part in re.split(f"({names})", text) if part]


def _joined(tokenizer: PreTrainedTokenizerBase, run: list[_Piece]) -> list[Part]:
    """Pieces that follow each other without a special token between them, tokenized as one text."""
    if not run:
        return []
    text = "".join(piece.text for piece in run)
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids: list[list[int]] = [[] for _ in run]
    spans: list[list[tuple[int, int]]] = [[] for _ in run]
    ends = list(itertools.accumulate(len(piece.text) for piece in run))
    for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        index = min(bisect.bisect_left(ends, max(end, 1)), len(run) - 1)
        ids[index].append(token)
        before = ends[index] - len(run[index].text)
        spans[index].append((start - before, end - before))
    return [
        Part(piece.kind, ids[index], piece.turn, piece.is_learned, tuple(spans[index]))
        for index, piece in enumerate(run)
    ]


def _merged(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind and turn as one part: an end of turn may be some text and a token."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if (
            last
            and (last.kind, last.turn, last.is_learned) == (part.kind, part.turn, part.is_learned)
            and part.kind != "question"
        ):
            merged[-1] = last._replace(ids=last.ids + part.ids, spans=())
        else:
            merged.append(part)
    return merged


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


def inside_context(tokenizer: PreTrainedTokenizerBase, row: RowTexts, parts: list[Part]) -> list[int]:
    """Which tokens of the last user turn lie inside its context, from the first to the last."""
    text, start, end = row.user
    if start == end:
        return []
    spans: Sequence[tuple[int, int]] = next(part.spans for part in parts if part.kind == "question" and part.turn < 0)
    if not spans:
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        spans = encoding["offset_mapping"]
    return [index for index, (first, last) in enumerate(spans) if start <= first and last <= end and first < last]


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    row: RowTexts,
    parts: list[Part],
    max_length: int | None,
) -> Encoded | None:
    """Join the parts of a row, cut to fit; None if it does not."""
    cut = Cut(0, 0)
    gone: set[int] = set()
    if max_length is not None and sum(len(part.ids) for part in parts) > max_length:
        inside = inside_context(tokenizer, row, parts)
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
        labels += ids if part.is_learned else [IGNORED] * len(ids)
    earlier = len(row.history) - cut.turns if row.learns_earlier else 0
    return Encoded(input_ids, labels, cut.context, earlier + 1, row.turns_skipped + cut.turns)
