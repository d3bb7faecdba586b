"""Golden rows and a run -> which of the rows training has seen, by the content of the training file that the run recorded."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from intern.config.build import plain
from intern.data.files import DataFile
from intern.data.prepare import training_rows
from intern.data.sources import locate
from intern.data.text import comparable
from intern.errors import UserError
from intern.runs.directory import Run


@dataclass(frozen=True)
class Overlap:
    """For each golden row, in order: True, False, or None if unknown."""

    rows: Sequence[bool | None]  # a training row has the same question and answer
    chunks: Sequence[bool | None]  # a training row has the same chunk
    told_by: str  # how this is known, or why it is not: a sentence for the report

    def seen(self, index: int) -> bool | None:
        """Return whether training had the row or its chunk."""
        return True if self.rows[index] else self.chunks[index]


def find_overlap(run: Run, golden: Dataset, train_file: str | None) -> Overlap:
    """Compare golden and training rows by content, ignoring case and whitespace.

    Without the training file, the golden rows' own seen_chunk marks are used.

    Args:
        run: the run whose training file is compared.
        golden: rows with question, answer, chunk_text and seen_chunk.
        train_file: another place of the run's training file; None: the place that the run recorded.

    Raises:
        UserError: `train_file` is not the file that the run was trained on.
    """
    values = plain(run.read_config().data)
    digests = run.read_json(run.environment).get("data", {})
    recorded = values["train_file"]
    if train_file is not None:
        file = DataFile.find(train_file, "train_file")
        if file.sha256 != digests.get(str(recorded)):
            raise UserError(
                f"train_file={train_file}: not the file that {run.path} was trained on (its SHA-256 differs)"
            )
        values["train_file"] = str(file.path)
    try:
        sources = locate(
            values["train_file"] if isinstance(recorded, list) else [values["train_file"]], "data.train_file"
        )
    except UserError:
        return _by_marks(golden, f"the training file {recorded} is gone (train_file=... names another place)")
    if not {source.file.sha256 for source in sources if source.file is not None} <= set(digests.values()):
        return _by_marks(golden, f"the training file {recorded} has changed since the run")
    training = training_rows(values)
    trained = training.rows
    pairs = {
        (comparable(question), comparable(answer))
        for question, answer in zip(trained["question"], trained["answer"], strict=True)
    } | {
        (comparable(turn["question"]), comparable(turn["answer"]))
        for history in trained["history"]
        for turn in history or ()
    }
    chunks = {comparable(chunk) for chunk in trained["chunk_text"] if chunk}
    return Overlap(
        rows=[
            (comparable(question), comparable(answer)) in pairs
            for question, answer in zip(golden["question"], golden["answer"], strict=True)
        ],
        chunks=[comparable(chunk) in chunks if chunk and chunks else None for chunk in golden["chunk_text"]],
        told_by=f"By content, against the {len(trained):,} rows of {training.file.path}.",
    )


def _by_marks(golden: Dataset, reason: str) -> Overlap:
    marks = list(golden["seen_chunk"])
    how = (
        "the golden rows' own seen_chunk marks are used"
        if any(mark is not None for mark in marks)
        else "the golden rows do not say either"
    )
    return Overlap([None] * len(marks), marks, f"Not known from content: {reason}; {how}.")
