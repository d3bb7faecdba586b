"""python scripts/check_data.py data/train.jsonl data/golden_test_set.jsonl

Checks the properties that data/README.md promises; prints one line for each fault (exit code 1) or a summary (exit code 0).
"""

import argparse
import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from intern.data.text import comparable
from intern.evaluation.text_scores import numbers
from intern.inspection.near_duplicates import words

Row = dict[str, Any]

CHUNK_WORDS = (60, 160)
ANSWER_WORDS = (1, 80)
QUESTION_WORDS = (3, 40)
NEAR = 0.75  # Jaccard index of their words from which two questions count as the same question
FIELDS = {"question": str, "answer": str, "chunk_text": str, "chunk_id": str, "topic": str}


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the Jaccard index of two word sets, from 0 to 1."""
    return len(a & b) / len(a | b) if a | b else 1.0


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row_faults(row: Row) -> list[str]:
    for field, kind in FIELDS.items():
        if not isinstance(row.get(field), kind) or not row[field].strip():
            return [f"{field} is missing, empty or not text"]
    faults = []
    if unsupported := numbers(row["answer"]) - numbers(row["chunk_text"]):
        faults.append(f"numbers of the answer that its chunk does not have: {', '.join(sorted(unsupported))}")
    for field, (least, most) in {"chunk_text": CHUNK_WORDS, "answer": ANSWER_WORDS, "question": QUESTION_WORDS}.items():
        count = len(row[field].split())
        if not least <= count <= most:
            faults.append(f"{field} has {count} words, not {least} to {most}")
    for field in FIELDS:
        text = row[field]
        if (
            text != unicodedata.normalize("NFC", text)
            or text != text.strip()
            or any(unicodedata.category(c) == "Cc" for c in text)
            or "\ufffd" in text
        ):
            faults.append(f"{field} is not clean text (NFC, no control characters, no spaces around it)")
    return faults


def set_faults(train: list[Row], golden: list[Row]) -> list[str]:
    """Return faults between rows: duplicates, near-duplicates across the split, chunks that differ under one id, wrong marks."""
    faults = []
    for question, count in Counter(comparable(row["question"]) for row in train + golden).items():
        if count > 1:
            faults.append(f"{count} rows ask: {question}")
    trained = [(words(row["question"]), row["question"]) for row in train]
    for row in golden:
        mine = words(row["question"])
        faults += [
            f"golden question {row['question']!r} is near training question {other!r}"
            for theirs, other in trained
            if similarity(mine, theirs) >= NEAR
        ]
    texts: dict[str, tuple[str, str]] = {}
    for row in train + golden:
        chunk = (row["chunk_text"], row["topic"])
        if texts.setdefault(row["chunk_id"], chunk) != chunk:
            faults.append(f"chunk {row['chunk_id']} has two texts or topics")
    if len({text for text, _ in texts.values()}) < len(texts):
        faults.append("one chunk text has two chunk ids")
    seen = {row["chunk_id"] for row in train}
    faults += [
        f"golden question {row['question']!r} is marked wrongly as seen or unseen"
        for row in golden
        if row.get("seen_chunk") is not (row["chunk_id"] in seen)
    ]
    return faults


def check(train_path: Path, golden_path: Path) -> list[str]:
    """Return all faults of the two files, as lines that name file and row."""
    faults, sets = [], []
    for path in (train_path, golden_path):
        sets.append(read(path))
        faults += [f"{path}:{number}: {fault}" for number, row in enumerate(sets[-1], 1) for fault in row_faults(row)]
    return faults or set_faults(*sets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("golden", type=Path)
    args = parser.parse_args()
    if faults := check(args.train, args.golden):
        print("\n".join(faults))
        return 1
    train, golden = read(args.train), read(args.golden)
    chunks = len({row["chunk_id"] for row in train + golden})
    halves = Counter(row["seen_chunk"] for row in golden)
    print(
        f"{len(train)} training rows, {len(golden)} golden rows ({halves[True]} on seen chunks, {halves[False]} on unseen ones), {chunks} chunks: no fault"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
