"""Golden conversations -> one row for each answer, with the turns before it as its history."""

from typing import Any

from datasets import Dataset, Features, Value

from intern.display.progress import hidden_bars

COLUMN = "turn"  # 1, 2, ... in a conversation; 0 for a row of one question and answer


def each_answer(golden: Dataset, loss_on: str) -> Dataset:
    """Return the rows to answer: those of one turn as they are, conversations once for each answer.

    Args:
        golden: checked rows.
        loss_on: data.loss_on of the run; "last": only the last answer of a conversation was learned, and only it is scored.

    Returns:
        The rows with the column `turn`. The context stays with the last question, which it belongs to.
    """
    if loss_on == "last" or not any(golden["history"]):
        with hidden_bars(True):  # rows that were held out are copied first
            return golden.add_column(COLUMN, [0] * len(golden))
    rows: list[dict[str, Any]] = []
    for row in golden:
        history = row["history"] or []
        for turn, earlier in enumerate(history, 1):
            asked = {
                "history": history[: turn - 1] or None,
                "question": earlier["question"],
                "answer": earlier["answer"],
            }
            rows.append({**row, **asked, "chunk_text": None, COLUMN: turn})
        rows.append({**row, COLUMN: len(history) + 1 if history else 0})
    return Dataset.from_list(rows, features=Features({**golden.features, COLUMN: Value("int64")}))
