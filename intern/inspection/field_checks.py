"""The preview's check of fields that look wrong: control characters, outliers, answers that repeat their question."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset

from intern.data.text import comparable
from intern.inspection.check import AMBER, GREEN, Check
from intern.inspection.near_duplicates import WORD
from intern.inspection.row_batches import FaultyRows, batches

_SHORT = {"question": 8, "answer": 2}  # characters: a shorter field is hardly a question, or an answer
_LONG = 10  # times the median length: a longer field is an outlier
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # C0 and C1 without tab and line breaks


def check_fields(rows: Dataset, special_tokens: Sequence[str]) -> Check:
    """Check the texts of all rows.

    Args:
        rows: the training rows as text.
        special_tokens: the texts of the model's special tokens.
    """
    odd: dict[str, FaultyRows] = {}
    numbers: list[np.ndarray] = []
    sizes: dict[str, list[np.ndarray]] = {"question": [], "answer": []}
    special = re.compile("|".join(map(re.escape, special_tokens)) or r"(?!)")
    for table in batches(rows, ["row", "question", "answer", "chunk_text"]):
        numbers.append(table["row"].to_numpy())
        columns = {name: table[name].to_pylist() for name in ("question", "answer", "chunk_text")}
        for name, parts in sizes.items():
            parts.append(np.fromiter((len(text) for text in columns[name]), dtype=np.int32, count=len(table)))
        for place, row in enumerate(numbers[-1].tolist()):
            texts = {name: columns[name][place] for name in columns if columns[name][place]}
            for fault in _faults(texts, special):
                odd.setdefault(fault, FaultyRows()).add(row)
    all_rows = np.concatenate(numbers)
    for name, parts in sizes.items():
        lengths = np.concatenate(parts)
        for fault, where in {
            f"{name} shorter than {_SHORT[name]} characters": lengths < _SHORT[name],
            f"{name} more than {_LONG} times as long as the median": lengths > _LONG * np.median(lengths),
        }.items():
            odd.setdefault(fault, FaultyRows()).add_marked(all_rows, where)
    faults = [f"{fault} ({rows})" for fault, rows in odd.items() if rows.count]
    if not faults:
        return Check("odd fields", GREEN, "no empty, control or replacement characters; no outliers")
    return Check("odd fields", AMBER, "; ".join(faults), "look at these rows with row=NUMBER")


def _faults(texts: dict[str, str], special: re.Pattern[str]) -> Iterator[str]:
    question, answer = comparable(texts["question"]), comparable(texts["answer"])
    if answer == question:
        yield "answer equal to its question"
    elif len(answer) < len(question) and _words(answer) in _words(question):
        yield "answer contained in its question"
    for name, text in texts.items():
        if _CONTROL.search(text):
            yield f"{name} with control characters"
        if "\ufffd" in text:
            yield f"{name} with replacement characters (it was once not decoded as UTF-8)"
        if special.search(text):
            yield f"{name} with the text of a special token (it stays text)"


def _words(text: str) -> str:
    return f" {' '.join(WORD.findall(text))} "
