"""What the checks of rows share: a dataset read in batches, and the row numbers that a message names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from datasets import Dataset

from intern.inspection.check import GREEN, Check, Status

_BATCH_ROWS = 10_000  # rows in memory at a time, so that a million rows need no more memory than a few
NAMED = 5  # row numbers that a message lists


def batches(rows: Dataset, columns: list[str]) -> Iterator[pa.Table]:
    """Iterate over some columns of a dataset, 10,000 rows at a time."""
    return iter(rows.select_columns(columns).with_format("arrow").iter(_BATCH_ROWS))


def flat(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all ids and labels of a batch end to end, each (tokens,), and where each row starts, (rows,)."""
    lists = table["input_ids"].combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    starts = np.cumsum(lengths) - lengths
    return lists.flatten().to_numpy(), table["labels"].combine_chunks().flatten().to_numpy(), starts


def per_row(where: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Count the marked tokens of each row: (tokens,) booleans -> (rows,)."""
    return np.add.reduceat(where.astype(np.int32), starts)


@dataclass
class FaultyRows:
    """Rows that share a fault: how many, and the numbers of the first few."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(row)

    def add_marked(self, rows: np.ndarray, where: np.ndarray) -> None:
        """Add the rows at which `where` is true."""
        for row in rows[where].tolist():
            self.add(row)

    def __str__(self) -> str:
        return named(self.first, self.count)


def named(rows: Sequence[int], count: int | None = None) -> str:
    """Return "7 rows: 4, 9, 12, 15, 20, ..."; `count` is the number of rows if `rows` are only the first."""
    count = len(rows) if count is None else count
    shown = ", ".join(map(str, rows[:NAMED])) + (", ..." if count > min(len(rows), NAMED) else "")
    return f"{count:,} row{'s' if count != 1 else ''}: {shown}"


def fault_check(name: str, status: Status, rows: FaultyRows, good: str, bad: str, remedy: str) -> Check:
    """Return a check that is green with `good` if no row is faulty, else `status` with `bad` and the rows."""
    return Check(name, status, f"{bad}: {rows}", remedy) if rows.count else Check(name, GREEN, good)
