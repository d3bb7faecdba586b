"""Rows -> their figures and what is wrong or odd about them, read in batches so that a million rows need no more memory than a few."""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from intern.data.packing import keeps_rows_apart
from intern.data.prompt import IGNORED, Prompt
from intern.data.text import comparable
from intern.data.tokenize import Tokenized
from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.near_duplicates import WORD, NearTexts

NEAR = 0.75  # Jaccard index of their words from which two questions count as one question asked twice
_BATCH = 10_000  # rows in memory at a time
_NAMED = 5  # rows that a line names
_SHORT = {"question": 8, "answer": 2}  # characters: below this a field is hardly a question, or an answer
_LONG = 10  # times the median length: beyond this a field is an outlier
_LOW_EFFICIENCY = (
    0.7  # share of computed positions that hold a token, below which more than a third of the time is wasted
)
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # C0 and C1 without tab and line breaks


@dataclass
class _Rows:
    """Rows that share a fault: how many, and the numbers of the first."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(row)

    def __str__(self) -> str:
        return named(self.first, self.count)


def named(rows: Sequence[int], count: int | None = None) -> str:
    """ "3 rows: 4, 9, 12", the first five of them named."""
    count = len(rows) if count is None else count
    shown = ", ".join(map(str, rows[:_NAMED])) + (", ..." if count > min(len(rows), _NAMED) else "")
    return f"{count:,} row{'s' if count != 1 else ''}: {shown}"


@dataclass
class Lengths:
    """Tokenized rows in figures. histogram[n] is the number of rows that are n tokens long."""

    histogram: np.ndarray
    tokens_with_loss: int = 0

    @property
    def rows(self) -> int:
        return int(self.histogram.sum())

    @property
    def tokens(self) -> int:
        return int(self.histogram @ np.arange(len(self.histogram)))

    @property
    def loss_share(self) -> float:
        return self.tokens_with_loss / self.tokens

    def percentile(self, percent: float) -> int:
        """The length in tokens that `percent` of the rows do not exceed (nearest rank)."""
        rank = max(math.ceil(percent / 100 * self.rows), 1)
        return int(np.searchsorted(np.cumsum(self.histogram), rank))


def check_tokens(
    tokens: Tokenized, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Lengths, list[Check]]:
    """The lengths of tokenized rows, and whether every row teaches what it should: one BOS, loss on the answer alone, and on its end."""
    end_of_turn = tokenizer.convert_tokens_to_ids(prompt.template[3])
    template = [token for piece in prompt.template for token in _special_ids(tokenizer, piece)]
    bos = tokenizer.bos_token_id
    # A tokenizer whose plain text begins with BOS belongs to a model that was trained on it.
    wanted = 0 if bos is None else max(template.count(bos), int(tokenizer("a")["input_ids"][0] == bos))
    lengths = Lengths(np.zeros(max_length + 1, dtype=np.int64))
    never_ends, mask, wrong_bos = _Rows(), _Rows(), _Rows()
    origins = batches(tokens.origins, ["row", "turns"])
    for table, origin in zip(batches(tokens.rows, ["input_ids", "labels"]), origins, strict=True):
        rows = origin["row"].to_numpy()
        ids, labels, starts = flat(table)
        ends = np.append(starts[1:], len(ids)) - 1
        lengths.histogram += np.bincount(ends - starts + 1, minlength=max_length + 1)
        carries = labels != IGNORED
        lengths.tokens_with_loss += int(carries.sum())
        _add(never_ends, rows, labels[ends] != end_of_turn)
        # Right is: no loss, then loss to the end of turn, once for each answer. So loss begins as often as there are answers with loss, never
        # at the first token, and labels repeat the ids.
        begins = carries & ~np.append(False, carries[:-1])
        changed = _per_row(carries & (labels != ids), starts) > 0
        _add(
            mask,
            rows,
            changed | (_per_row(begins, starts) != origin["turns"].to_numpy()) | carries[starts] | ~carries[ends],
        )
        if bos is not None:
            _add(wrong_bos, rows, (_per_row(ids == bos, starts) != wanted) | ((ids[starts] != bos) & (wanted > 0)))
    name = repr(prompt.template[3])
    return lengths, [
        _fault(
            "end of turn",
            never_ends,
            f"{name} ends every row, with loss",
            f"{name} does not end, or has no loss",
            "a model trained so never stops: mend the chat template",
        ),
        _fault(
            "loss mask",
            mask,
            "loss is on the answers alone",
            "loss where no answer is, or none",
            "mend the chat template",
        ),
        _fault(
            "BOS",
            wrong_bos,
            "this model has none" if not wanted else f"{tokenizer.bos_token!r} begins every row, once",
            f"not exactly {wanted} {tokenizer.bos_token!r} at the beginning",
            "a model that was trained with one answers worse without: let the chat template begin with {{ bos_token }}",
        ),
    ]


def check_fit(tokens: Tokenized, max_length: int) -> Check:
    """Whether rows had to be shortened or dropped."""
    if not tokens.dropped and not tokens.shortened and not tokens.lost_turns:
        return Check("fit", GREEN, f"every row fits into {max_length:,} tokens")
    cut, turns_cut = _Rows(), _Rows()
    for table in batches(tokens.origins, ["row", "cut", "turns_cut"]):
        rows = table["row"].to_numpy()
        _add(cut, rows, table["cut"].to_numpy() > 0)
        _add(turns_cut, rows, table["turns_cut"].to_numpy() > 0)
    parts = [f"shortened {cut}"] if cut.count else []
    parts += [f"without their oldest turns {turns_cut}"] if turns_cut.count else []
    parts += [f"dropped {named(tokens.dropped)}"] if tokens.dropped else []
    return Check("fit", AMBER, "; ".join(parts), "raise trainer.max_length, or shorten what is long")


def check_packing(packs: Dataset, lengths: Lengths, args: SFTConfig) -> tuple[float, Check]:
    """The share of computed positions that hold a token, and whether packing kept every token and the rows apart.

    With packing the positions are packs times trainer.max_length; without it, batches are padded to their longest row, in one random order,
    unless their rows lie one behind the other.
    """
    if args.packing:
        tokens = with_loss = 0
        for table in batches(packs, ["input_ids", "labels"]):
            ids, labels, _ = flat(table)
            tokens += len(ids)
            with_loss += int((labels != IGNORED).sum())
        share = tokens / (len(packs) * int(args.max_length or 0))
        if (tokens, with_loss) != (lengths.tokens, lengths.tokens_with_loss):
            lost = f"{lengths.tokens - tokens:,} of {lengths.tokens:,} tokens are lost in packing"
            return share, Check("packing", RED, lost, "take trainer.packing_strategy=bfd")
        found = f"{lengths.rows:,} rows in {len(packs):,} packs of {args.max_length:,} tokens, {share:.0%} used"
        if not keeps_rows_apart(args):
            found += f"; trainer.packing_strategy={args.packing_strategy} cuts rows, and they see each other"
            return share, Check("packing", AMBER, found, "take trainer.packing_strategy=bfd")
    elif args.padding_free:
        return 1.0, Check("packing", GREEN, "no packing: the rows of a batch lie one behind the other, without padding")
    else:
        every = np.repeat(np.arange(len(lengths.histogram), dtype=np.int32), lengths.histogram)
        np.random.default_rng(args.seed).shuffle(every)
        size = args.per_device_train_batch_size
        longest = np.maximum.reduceat(every, np.arange(0, len(every), size))
        sizes = np.minimum(size, len(every) - np.arange(0, len(every), size))
        share = float(every.sum(dtype=np.int64) / (longest.astype(np.int64) @ sizes))
        found = f"no packing: {share:.0%} of the positions in random batches of {size} used"
    low = share < _LOW_EFFICIENCY and len(packs) > 1  # one pack is as full as there are rows
    remedy = ("lower trainer.max_length" if args.packing else "take trainer.packing=true") if low else ""
    return share, Check("packing", AMBER if low else GREEN, found, remedy)


def check_texts(rows: Dataset, special_tokens: Sequence[str], shows_material: bool) -> list[Check]:
    """Duplicates, and fields that look wrong. `special_tokens` are the model's; where material is shown, it makes a question another one."""
    odd: dict[str, _Rows] = {}
    numbers: list[np.ndarray] = []
    asked: list[np.ndarray] = []
    answered: list[np.ndarray] = []
    sizes: dict[str, list[np.ndarray]] = {"question": [], "answer": []}
    special = re.compile("|".join(map(re.escape, special_tokens)) or r"(?!)")
    for table in batches(rows, ["row", "question", "answer", "chunk_text", "history"]):
        numbers.append(table["row"].to_numpy())
        columns = {name: table[name].to_pylist() for name in ("question", "answer", "chunk_text")}
        for name, parts in sizes.items():
            parts.append(np.fromiter((len(text) for text in columns[name]), dtype=np.int32, count=len(table)))
        questions = [comparable(text) for text in columns["question"]]
        answers = [comparable(text) for text in columns["answer"]]
        told = [_told(history) for history in table["history"].to_pylist()]
        keys = [
            f"{before}{question}\0{comparable(material or '')}" if shows_material else before + question
            for before, question, material in zip(told, questions, columns["chunk_text"], strict=True)
        ]
        asked.append(_hashes(keys))
        answered.append(_hashes([f"{key}\0\0{answer}" for key, answer in zip(keys, answers, strict=True)]))
        for place, row in enumerate(numbers[-1].tolist()):
            texts = {name: columns[name][place] for name in columns if columns[name][place]}
            for fault in _odd(questions[place], answers[place], texts, special):
                odd.setdefault(fault, _Rows()).add(row)
    all_rows = np.concatenate(numbers)
    for name, parts in sizes.items():
        lengths = np.concatenate(parts)
        most = _LONG * np.median(lengths)
        for fault, where in {
            f"{name} shorter than {_SHORT[name]} characters": lengths < _SHORT[name],
            f"{name} more than {_LONG} times as long as the median": lengths > most,
        }.items():
            _add(odd.setdefault(fault, _Rows()), all_rows, where)
    again, same = _repeated(np.concatenate(asked), all_rows), _repeated(np.concatenate(answered), all_rows)
    what = "question on the same material" if shows_material else "question"
    checks = [
        _notice("same answer", same, "no row is there twice", "question and answer of an earlier row", "delete them"),
        _notice(
            "same question",
            again,
            "no question is asked twice",
            f"{what} of an earlier row",
            "keep one answer to a question: two that differ teach neither",
        ),
    ]
    faults = [f"{fault} ({rows})" for fault, rows in odd.items() if rows.count]
    remedy = "look at these rows (row=...)" if faults else ""
    found = "; ".join(faults) or "no empty, control or replacement characters; no outliers"
    return [*checks, Check("odd fields", AMBER if faults else GREEN, found, remedy)]


def check_leaks(train: Dataset, golden: Dataset, shows_material: bool) -> list[Check]:
    """Golden rows that training gives away: the same question, nearly the same question, the same chunk without saying so."""
    columns = ["row", "question", "answer", "chunk_text", "chunk_id", "seen_chunk", "history"]
    rows = [row for table in batches(golden, columns) for row in table.to_pylist()]

    def key(row: dict[str, Any]) -> str:
        return f"{_told(row['history'])}{comparable(row['question'])}\0{comparable(row['chunk_text'] or '') if shows_material else ''}"

    asked: dict[str, list[int]] = {}
    chunks: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        asked.setdefault(key(row), []).append(place)
        for mark in _chunk_marks(row):
            chunks.setdefault(mark, []).append(place)
    near_texts = NearTexts([row["question"] for row in rows], NEAR)
    identical: dict[int, int] = {}  # place of a golden row -> number of a training row
    near: dict[int, tuple[int, float]] = {}
    on_chunk: set[int] = set()
    for table in batches(train, ["row", "question", "chunk_text", "chunk_id", "history"]):
        for row in table.to_pylist():
            for mark in _chunk_marks(row):
                on_chunk.update(chunks.get(mark, ()))
            for place, value in near_texts.near(row["question"]):
                if value > near.get(place, (0, 0.0))[1]:
                    near[place] = row["row"], value
            for place in asked.get(key(row), ()):
                identical.setdefault(place, row["row"])
    nearly = {place: pair for place, pair in near.items() if place not in identical}

    def pairs(found: dict[int, int]) -> str:
        first = [f"golden {rows[place]['row']} = training {other}" for place, other in sorted(found.items())[:_NAMED]]
        return ", ".join(first) + (", ..." if len(found) > _NAMED else "")

    checks = [Check("golden questions", GREEN, "no golden question is a training question")]
    if identical:
        found = f"{len(identical):,} of {len(rows):,} golden rows are training rows: {pairs(identical)}"
        checks = [
            Check("golden questions", RED, found, "delete them from one of the two files: their score measures memory")
        ]
    near_check = Check("near golden questions", GREEN, f"none shares {NEAR:.0%} of its words with a training question")
    if nearly:
        first = [
            f"golden {rows[place]['row']} ~ training {other} ({value:.2f})"
            for place, (other, value) in sorted(nearly.items())[:_NAMED]
        ]
        found = f"{len(nearly):,} of {len(rows):,}: " + ", ".join(first) + (", ..." if len(nearly) > _NAMED else "")
        near_check = Check(
            "near golden questions", AMBER, found, "reword or delete them: they are training questions asked again"
        )
    return [*checks, near_check, _chunk_check(rows, on_chunk)]


def _chunk_check(rows: list[dict[str, Any]], on_chunk: set[int]) -> Check:
    name = "golden chunks"
    anonymous = sum(1 for row in rows if not _chunk_marks(row))
    if anonymous == len(rows):
        return Check(name, GREEN, "golden rows name no chunks: nothing to compare")
    found = f"{len(on_chunk):,} of {len(rows):,} golden rows are on chunks that training has"
    found += f"; {anonymous:,} name no chunk" if anonymous else ""
    unmarked, wrong = _Rows(), _Rows()
    for place, row in enumerate(rows):
        if row["seen_chunk"] is None and place in on_chunk:
            unmarked.add(row["row"])
        elif row["seen_chunk"] is not None and row["seen_chunk"] != (place in on_chunk) and _chunk_marks(row):
            wrong.add(row["row"])
    if not unmarked.count and not wrong.count:
        return Check(name, GREEN, found + (", all marked seen_chunk" if on_chunk else ""))
    found += f"; without seen_chunk: {unmarked}" if unmarked.count else ""
    found += f"; seen_chunk is wrong in {wrong}" if wrong.count else ""
    return Check(name, AMBER, found, "set seen_chunk, so that intern.evaluate tells them apart")


def _chunk_marks(row: dict[str, Any]) -> list[str]:
    """What names a row's chunk: its id, its text."""
    marks = [("id", row["chunk_id"]), ("text", row["chunk_text"])]
    return [f"{kind}\0{value.strip()}" for kind, value in marks if value and value.strip()]


def _odd(question: str, answer: str, texts: dict[str, str], special: re.Pattern[str]) -> Iterator[str]:
    if answer == question:
        yield "answer equal to its question"
    elif (
        len(answer) < len(question) and f" {' '.join(WORD.findall(answer))} " in f" {' '.join(WORD.findall(question))} "
    ):
        yield "answer contained in its question"
    for name, text in texts.items():
        if _CONTROL.search(text):
            yield f"{name} with control characters"
        if "\ufffd" in text:
            yield f"{name} with replacement characters (was not decoded as UTF-8 once)"
        if special.search(text):
            yield f"{name} with the text of a special token (it stays text)"


def _told(history: list[dict[str, str]] | None) -> str:
    """The turns before a question, which make it another one; empty for a question alone."""
    return "".join(f"{comparable(turn['question'])}\0{comparable(turn['answer'])}\0" for turn in history or ())


def _hashes(texts: list[str]) -> np.ndarray:
    """8 bytes a text instead of the text: among a million texts two collide by chance with a probability of 3e-8."""
    return np.frombuffer(b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts), np.uint64)


def _repeated(hashes: np.ndarray, numbers: np.ndarray) -> _Rows:
    """The rows whose hash an earlier row has."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    rows = np.sort(numbers[order[1:][ordered[1:] == ordered[:-1]]])
    return _Rows(len(rows), rows[:_NAMED].tolist())


def _add(found: _Rows, rows: np.ndarray, where: np.ndarray) -> None:
    for row in rows[where].tolist():
        found.add(row)


def _fault(name: str, rows: _Rows, good: str, bad: str, remedy: str) -> Check:
    return Check(name, RED, f"{bad}: {rows}", remedy) if rows.count else Check(name, GREEN, good)


def _notice(name: str, rows: _Rows, good: str, bad: str, remedy: str) -> Check:
    return Check(name, AMBER, f"{bad}: {rows}", remedy) if rows.count else Check(name, GREEN, good)


def batches(rows: Dataset, columns: list[str]) -> Iterator[pa.Table]:
    """Some columns of a dataset, 10,000 rows at a time."""
    return iter(rows.select_columns(columns).with_format("arrow").iter(_BATCH))


def flat(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ids and labels of a batch end to end, and where each row starts."""
    lists = table["input_ids"].combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    starts = np.cumsum(lengths) - lengths
    return lists.flatten().to_numpy(), table["labels"].combine_chunks().flatten().to_numpy(), starts


def _per_row(where: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many tokens of each row are marked."""
    return np.add.reduceat(where.astype(np.int32), starts)


def _special_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
