"""Golden rows and a run -> which of them training has seen, by content of the training file that the run recorded."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from intern.config.build import plain
from intern.data.files import DataFile
from intern.data.prepare import training_rows
from intern.data.sources import locate
from intern.errors import UserError
from intern.runs.directory import Run


@dataclass(frozen=True)
class Overlap:
    """For each golden row, in order: True, False, or None where it cannot be told."""

    rows: Sequence[bool | None]  # question and answer stand together in a training row
    chunks: Sequence[bool | None]  # its chunk is a training row's
    told_by: str  # how this is known, or why it is not: one sentence for the report

    def seen(self, index: int) -> bool | None:
        """Whether training had the row or its chunk."""
        return True if self.rows[index] else self.chunks[index]


def find_overlap(run: Run, golden: Dataset, train_file: str | None) -> Overlap:
    """Compares by content, blanks and case aside; where the training file is gone, the golden rows' own seen_chunk marks stand.

    Args:
        train_file: another place of the run's training file; None: where the run has recorded it.

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
        (_plain(question), _plain(answer))
        for question, answer in zip(trained["question"], trained["answer"], strict=True)
    }
    chunks = {_plain(chunk) for chunk in trained["chunk_text"] if chunk}
    return Overlap(
        rows=[
            (_plain(question), _plain(answer)) in pairs
            for question, answer in zip(golden["question"], golden["answer"], strict=True)
        ],
        chunks=[_plain(chunk) in chunks if chunk and chunks else None for chunk in golden["chunk_text"]],
        told_by=f"By content, against the {len(trained):,} rows of {training.file.path}.",
    )


def _by_marks(golden: Dataset, reason: str) -> Overlap:
    marks = list(golden["seen_chunk"])
    told = (
        "the golden rows' own seen_chunk marks stand"
        if any(mark is not None for mark in marks)
        else "nor do the golden rows say"
    )
    return Overlap([None] * len(marks), marks, f"Cannot be told by content: {reason}; {told}.")


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
