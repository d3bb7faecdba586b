"""A share of the training rows, held out as golden rows: whole documents at a time, so that nothing of one is on both sides."""

import hashlib
from collections import defaultdict

from datasets import Dataset

from intern.errors import UserError

_COLUMNS = ["question", "chunk_text", "chunk_id"]


def hold_out(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into training and golden rows, in the same way every time.

    Rows belong together if they share a document's key (chunk_id) or text (chunk_text); rows of no document, if they ask the same question.

    Args:
        rows: checked rows.
        share: the share of the rows that is held out, above 0 and below 1; met as closely as whole documents allow.
        seed: another one holds out other documents.

    Returns:
        Training rows and golden rows, each in the order of the file.

    Raises:
        UserError: all rows belong to one document.
    """
    groups = _groups(rows)
    sizes: dict[str, int] = defaultdict(int)
    for group in groups:
        sizes[group] += 1
    if len(sizes) < 2:
        raise UserError(
            f"data.eval_share={share}: all {len(groups)} rows belong to one document or ask one question: give data.eval_file instead"
        )
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    wanted = share * len(groups)
    held: set[str] = set()
    for group in order:
        # The last group goes where it brings the share closer to what is wanted.
        if wanted < sizes[group] / 2 and held:
            break
        held.add(group)
        wanted -= sizes[group]
        if wanted <= 0 or len(held) == len(sizes) - 1:
            break
    golden = [place for place, group in enumerate(groups) if group in held]
    train = [place for place, group in enumerate(groups) if group not in held]
    return rows.select(train), rows.select(golden)


def _groups(rows: Dataset) -> list[str]:
    """The name of the group that each row belongs to: the marks of a row join groups, in either order (union-find)."""
    parents: dict[str, str] = {}

    def root(mark: str) -> str:
        while parents.setdefault(mark, mark) != mark:
            parents[mark] = parents[parents[mark]]
            mark = parents[mark]
        return mark

    first_marks: list[str] = []
    for batch in rows.select_columns(_COLUMNS).iter(10_000):
        for question, text, key in zip(*(batch[name] for name in _COLUMNS), strict=True):
            marks = [
                hashlib.sha256(f"{kind}\0{' '.join(value.split()).casefold()}".encode()).hexdigest()
                for kind, value in (("key", key), ("text", text))
                if value and value.strip()
            ] or [hashlib.sha256(f"question\0{' '.join(question.split()).casefold()}".encode()).hexdigest()]
            for mark in marks[1:]:
                one, other = sorted((root(marks[0]), root(mark)))
                parents[other] = one
            first_marks.append(marks[0])
    return [root(mark) for mark in first_marks]
