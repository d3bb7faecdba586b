"""A loaded run and golden rows -> predictions.jsonl, appended batch by batch, so that a second start with the same inputs resumes."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from intern.display.text import json_text
from intern.errors import RunError
from intern.evaluation.turns import COLUMN
from intern.runs.files import replace_file, write_text

if TYPE_CHECKING:
    from datasets import Dataset

    from intern.inference.answer import Intern

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """One model's answer to one golden row, and its loss on the reference."""

    model: str
    row: int  # the line of the golden file
    answer: str
    ended: bool  # with an end of turn; False: cut off at max_new_tokens
    tokens: int  # of the answer, without the end of turn
    loss: float | None  # nats, summed over the reference's tokens; None: the row does not fit into the trained length
    loss_tokens: int
    seconds: float  # the batch's answering time divided by its rows
    turn: int = 0  # of a conversation, from 1; 0: the row has one question

    @property
    def key(self) -> tuple[int, int]:
        """What tells the answers of one model apart."""
        return self.row, self.turn


_CHECKED = TypeAdapter(Prediction)


class Predictions:
    """The predictions of one evaluation, stored with the inputs that they were made from."""

    def __init__(self, folder: Path, inputs: dict[str, Any]) -> None:
        """Load the predictions of an earlier start with the same inputs; delete those made from other inputs.

        Args:
            folder: the folder of inputs.json and predictions.jsonl.
            inputs: everything that decides an answer, in types that JSON has.
        """
        self.path = folder / "predictions.jsonl"
        self._inputs = inputs
        self._known: dict[tuple[str, tuple[int, int]], Prediction] = {}
        stored = folder / "inputs.json"
        before = None
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(stored.read_text(encoding="utf-8"))
        if before == inputs:
            self._known = {(one.model, one.key): one for one in _read(self.path)}
            self._write(self._known.values())
            return
        if self.path.exists():
            log.warning("%s: made from other inputs, starting again", self.path)
        with replace_file(stored, folder) as file:
            file.write((json.dumps(inputs, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
            file.flush()
            # There is room for the new file: only now what it replaces is removed, the predictions before their inputs.
            (folder / "metrics.json").unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self._write([])

    def take_from(self, folder: Path) -> None:
        """Take the predictions of models that another evaluation has in common with this one, if everything else is the same too.

        Args:
            folder: of inputs.json and predictions.jsonl of the other evaluation.
        """
        try:
            theirs = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if {**theirs, "models": None} != {**self._inputs, "models": None}:
            return
        shared = {model["name"] for model in self._inputs["models"] if model in theirs["models"]}
        known = {model for model, _ in self._known}
        found = [one for one in _read(folder / self.path.name) if one.model in shared - known]
        if found:
            self.add(found)

    def of(self, model: str, rows: Sequence[tuple[int, int]]) -> list[Prediction] | None:
        """Return one model's predictions for these keys, (row, turn), in their order; None if one is missing."""
        found = [self._known.get((model, row)) for row in rows]
        return [one for one in found if one is not None] if None not in found else None

    def begin(self) -> None:
        """Remove the metrics of an earlier start before predictions are added: they promise that those next to them are complete."""
        (self.path.parent / "metrics.json").unlink(missing_ok=True)

    def add(self, batch: Sequence[Prediction]) -> None:
        """Append a whole batch. A batch that a kill cuts short is answered again as the same batch, so the scores stay the same."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(one) for one in batch))
        self._known |= {(one.model, one.key): one for one in batch}

    def put_in_order(self, models: Sequence[str]) -> None:
        """Rewrite the file in the order of the golden file, one model after the other."""
        self._write(sorted(self._known.values(), key=lambda one: (one.key, models.index(one.model))))

    def _write(self, predictions: Iterable[Prediction]) -> None:
        write_text(self.path, self.path.parent, "".join(_line(one) for one in predictions))


def _line(prediction: Prediction) -> str:
    return json_text(json.dumps(asdict(prediction), ensure_ascii=False, allow_nan=False)) + "\n"


def _read(path: Path) -> list[Prediction]:
    """Return the complete lines of the file; one that a kill cut short is left out."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValidationError):
                found.append(_CHECKED.validate_json(line, strict=True, extra="forbid"))
    return found


def predict(
    intern: "Intern", name: str, golden: "Dataset", with_context: bool, batch_size: int, seed: int, done: Predictions
) -> None:
    """Score and answer every golden row with the model in its present state; skip what `done` has already.

    Rows of similar length share a batch, which saves padding; the longest come first, so if memory does not suffice, it fails at once.

    Args:
        intern: the loaded run; its adapter may be disabled.
        name: stored as the predictions' model.
        golden: rows with question, answer, chunk_text, history, row and turn.
        with_context: show chunk_text before each question.
        batch_size: rows answered at once.
        seed: of sampling; batch n is answered with seed + n.
        done: where predictions are stored.

    Raises:
        UserError: a question is too long for the model.
        RunError: a loss that is NaN or infinite.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from intern.data.tokenize import turns
    from intern.inference.generate import generate
    from intern.inference.losses import answer_losses

    questions, references, numbers = (list(golden[column]) for column in ("question", "answer", "row"))
    keys = list(zip(numbers, golden[COLUMN], strict=True))
    shown = list(golden["chunk_text"]) if with_context else [None] * len(golden)
    histories, systems = [turns(history) for history in golden["history"]], list(golden["system"])
    encoded = intern.prompt.encode(
        intern.tokenizer,
        questions,
        references,
        shown,
        intern.cfg.trainer.max_length,
        histories=histories,
        systems=systems,
        loss_on="last",
    )
    lengths = [len(row.input_ids) if row is not None else intern.cfg.trainer.max_length for row in encoded]
    order = sorted(range(len(golden)), key=lambda index: (-lengths[index], index))
    batches: Iterable[tuple[int, list[int]]] = list(
        enumerate(order[first : first + batch_size] for first in range(0, len(order), batch_size))
    )
    console = Console(stderr=True)
    if console.is_terminal:
        batches = track(list(batches), description=f"answers: {name}", console=console)
    for number, batch in batches:
        if done.of(name, [keys[index] for index in batch]) is not None:
            continue
        fitting = [(index, row) for index in batch if (row := encoded[index]) is not None]
        inputs = [{"input_ids": row.input_ids, "labels": row.labels} for _, row in fitting]
        scored = answer_losses(intern.model, inputs, intern.tokenizer.pad_token_id, batch_size)
        losses = {index: loss for (index, _), loss in zip(fitting, scored, strict=True)}
        for index, (loss, _) in losses.items():
            if not math.isfinite(loss):
                raise RunError(
                    f"{name}: the loss on golden row {numbers[index]} is {loss}: train again with a lower trainer.learning_rate"
                )
        torch.manual_seed(seed + number)  # so sampled answers are the same after an interruption
        start = time.perf_counter()
        replies = list(
            generate(
                intern.model,
                intern.tokenizer,
                intern.prompt,
                intern.generation,
                [questions[index] for index in batch],
                [shown[index] for index in batch],
                batch_size,
                histories=[histories[index] for index in batch],
                systems=[systems[index] for index in batch],
            )
        )
        seconds = (time.perf_counter() - start) / len(batch)
        done.add(
            [
                Prediction(
                    model=name,
                    row=numbers[index],
                    answer=reply.text,
                    ended=reply.ended,
                    tokens=reply.tokens,
                    loss=losses[index][0] if index in losses else None,
                    loss_tokens=losses[index][1] if index in losses else 0,
                    seconds=round(seconds, 4),
                    turn=keys[index][1],
                )
                for index, reply in zip(batch, replies, strict=True)
            ]
        )
