"""The preview's checks for duplicates: rows that are there twice, and golden rows that training gives away."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from intern.data.text import comparable
from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.near_duplicates import NearTexts
from intern.inspection.row_batches import NAMED, FaultyRows, batches, fault_check

NEAR = 0.75  # Jaccard index of their words from which two questions count as the same question, asked twice


def check_duplicates(rows: Dataset, shows_context: bool) -> list[Check]:
    """Check whether rows or questions are repeated.

    Args:
        rows: the training rows as text.
        shows_context: whether training shows a row's context; then the same question about another context is another question.
    """
    numbers: list[np.ndarray] = []
    asked: list[np.ndarray] = []
    answered: list[np.ndarray] = []
    for table in batches(rows, ["row", "question", "answer", "chunk_text", "history"]):
        numbers.append(table["row"].to_numpy())
        found = table.to_pylist()
        keys = [_question_key(row, shows_context) for row in found]
        asked.append(_hashes(keys))
        pairs = zip(keys, found, strict=True)
        answered.append(_hashes([f"{key}\0\0{comparable(row['answer'])}" for key, row in pairs]))
    all_rows = np.concatenate(numbers)
    same = _repeated(np.concatenate(answered), all_rows)
    again = _repeated(np.concatenate(asked), all_rows)
    what = "question about the same context" if shows_context else "question"
    return [
        fault_check(
            "same answer",
            AMBER,
            same,
            "no row is repeated",
            "same question and answer as an earlier row",
            "delete them",
        ),
        fault_check(
            "same question",
            AMBER,
            again,
            "no question is repeated",
            f"same {what} as an earlier row",
            "keep one answer per question: two different ones teach neither",
        ),
    ]


def check_leaks(train: Dataset, golden: Dataset, shows_context: bool) -> list[Check]:
    """Check whether training gives golden rows away: the same question, nearly the same question, the same document without saying so.

    Args:
        train: the training rows as text.
        golden: the golden rows as text.
        shows_context: as in `check_duplicates`.
    """
    columns = ["row", "question", "answer", "chunk_text", "chunk_id", "seen_chunk", "history"]
    rows = [row for table in batches(golden, columns) for row in table.to_pylist()]

    def key(row: dict[str, Any]) -> str:
        return _question_key(row, shows_context)

    asked: dict[str, list[int]] = {}
    documents: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        asked.setdefault(key(row), []).append(place)
        for document in _document_keys(row):
            documents.setdefault(document, []).append(place)
    near_texts = NearTexts([row["question"] for row in rows], NEAR)
    identical: dict[int, int] = {}  # index of a golden row -> number of a training row
    near: dict[int, tuple[int, float]] = {}
    on_document: set[int] = set()
    for table in batches(train, ["row", "question", "chunk_text", "chunk_id", "history"]):
        for row in table.to_pylist():
            for document in _document_keys(row):
                on_document.update(documents.get(document, ()))
            for place, value in near_texts.near(row["question"]):
                if value > near.get(place, (0, 0.0))[1]:
                    near[place] = row["row"], value
            for place in asked.get(key(row), ()):
                identical.setdefault(place, row["row"])
    nearly = {place: pair for place, pair in near.items() if place not in identical}

    def pairs(found: dict[int, int]) -> str:
        first = [f"golden {rows[place]['row']} = training {other}" for place, other in sorted(found.items())[:NAMED]]
        return ", ".join(first) + (", ..." if len(found) > NAMED else "")

    checks = [Check("golden questions", GREEN, "no golden question is a training question")]
    if identical:
        found = f"{len(identical):,} of {len(rows):,} golden rows are training rows: {pairs(identical)}"
        checks = [
            Check(
                "golden questions",
                RED,
                found,
                "delete them from one of the two files: their score only measures memorization",
            )
        ]
    near_check = Check("near golden questions", GREEN, f"none shares {NEAR:.0%} of its words with a training question")
    if nearly:
        first = [
            f"golden {rows[place]['row']} ~ training {other} ({value:.2f})"
            for place, (other, value) in sorted(nearly.items())[:NAMED]
        ]
        found = f"{len(nearly):,} of {len(rows):,}: " + ", ".join(first) + (", ..." if len(nearly) > NAMED else "")
        near_check = Check(
            "near golden questions", AMBER, found, "reword or delete them: they are training questions in other words"
        )
    return [*checks, near_check, _document_check(rows, on_document)]


def _document_check(rows: list[dict[str, Any]], on_document: set[int]) -> Check:
    name = "golden chunks"
    anonymous = sum(1 for row in rows if not _document_keys(row))
    if anonymous == len(rows):
        return Check(name, GREEN, "golden rows name no chunks (chunk_id, chunk_text): nothing to compare")
    found = f"{len(on_document):,} of {len(rows):,} golden rows are on chunks that training has"
    found += f"; {anonymous:,} name no chunk" if anonymous else ""
    unmarked, wrong = FaultyRows(), FaultyRows()
    for place, row in enumerate(rows):
        if row["seen_chunk"] is None and place in on_document:
            unmarked.add(row["row"])
        elif row["seen_chunk"] is not None and row["seen_chunk"] != (place in on_document) and _document_keys(row):
            wrong.add(row["row"])
    if not unmarked.count and not wrong.count:
        return Check(name, GREEN, found + (", all marked seen_chunk" if on_document else ""))
    found += f"; without seen_chunk: {unmarked}" if unmarked.count else ""
    found += f"; seen_chunk is wrong in {wrong}" if wrong.count else ""
    return Check(name, AMBER, found, "set seen_chunk, so that intern.evaluate reports them separately")


def _document_keys(row: dict[str, Any]) -> list[str]:
    """Return what identifies a row's document: its id, its text."""
    keys = [("id", row["chunk_id"]), ("text", row["chunk_text"])]
    return [f"{kind}\0{value.strip()}" for kind, value in keys if value and value.strip()]


def _question_key(row: dict[str, Any], shows_context: bool) -> str:
    """Return what makes a question another one: the turns before it, its words, and its context if that is shown."""
    turns = row["history"] or ()
    told = "".join(f"{comparable(turn['question'])}\0{comparable(turn['answer'])}\0" for turn in turns)
    return f"{told}{comparable(row['question'])}\0{comparable(row['chunk_text'] or '') if shows_context else ''}"


def _hashes(texts: Sequence[str]) -> np.ndarray:
    """Return 8 bytes per text instead of the text: the chance that any two of a million texts collide is 3e-8."""
    return np.frombuffer(b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts), np.uint64)


def _repeated(hashes: np.ndarray, numbers: np.ndarray) -> FaultyRows:
    """Return the rows whose hash an earlier row has."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    rows = np.sort(numbers[order[1:][ordered[1:] == ordered[:-1]]])
    return FaultyRows(len(rows), rows[:NAMED].tolist())
