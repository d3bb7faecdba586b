"""A row of the training file -> its tokens and its place in a batch, as training has them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from intern.data.files import DataFile
from intern.data.packing import build_collator
from intern.data.prepare import Prepared
from intern.data.prompt import IGNORED, Prompt
from intern.data.tokenize import Tokenized, turns
from intern.errors import UserError
from intern.inspection.preview_display import Segment, ShownBatch, ShownRow, pieces
from intern.inspection.row_batches import batches, flat

_BEGINNING = 50  # characters of a question that identify a row of a batch


@dataclass(frozen=True)
class PreviewData:
    """What a run with this configuration trains on and is scored on."""

    prompt: Prompt
    tokenizer: PreTrainedTokenizerBase
    args: SFTConfig
    data: Prepared
    packs: Dataset

    @property
    def train_file(self) -> DataFile:
        """The training file, or the first of several."""
        return self.data.train.files[0]

    @property
    def train_rows(self) -> Dataset:
        """The training rows as text."""
        return self.data.train.rows

    @property
    def train(self) -> Tokenized:
        """The training rows as tokens."""
        return self.data.train_tokens

    @property
    def golden_rows(self) -> Dataset | None:
        """The golden rows as text."""
        return self.data.golden.rows if self.data.golden is not None else None

    @property
    def golden(self) -> Tokenized | None:
        """The golden rows as tokens."""
        return self.data.golden_tokens

    @cached_property
    def lines(self) -> np.ndarray:
        """The line number of each row of the file."""
        return _line_numbers(self.train_rows)

    @cached_property
    def trained_lines(self) -> np.ndarray:
        """The line number of each row that is trained on."""
        return _line_numbers(self.train.origins)

    @property
    def max_length(self) -> int:
        return int(self.args.max_length or 0)


def shown_row(data: PreviewData, place: int) -> ShownRow:
    """Return a row as its tokens, including those that were cut off, where they were.

    Args:
        data: of the run.
        place: index of the row among the training rows.
    """
    row = data.train_rows[place]
    text = row["chunk_text"] if data.prompt.trains_with_material(row["question"]) else None
    tokens = data.prompt.explain(
        data.tokenizer,
        row["question"],
        row["answer"],
        text,
        data.max_length,
        history=turns(row["history"]),
        system=row["system"],
    )
    trained = _tokenized(data, row["row"])
    title = data.data.train.place(row["row"])
    if trained is None:
        note = f"{len(tokens):,} tokens: dropped, longer than trainer.max_length={data.max_length:,} even without its context"
        return ShownRow(title, note, pieces(tokens, [], data.tokenizer))
    assert [token.id for token in tokens if not token.cut] == trained["input_ids"]
    cut = sum(token.cut for token in tokens)
    with_loss = sum(label != IGNORED for label in trained["labels"])
    note = f"{len(trained['input_ids']):,} tokens, {with_loss:,} with loss" + (f", {cut:,} cut off" if cut else "")
    return ShownRow(title, note, pieces(tokens, trained["labels"], data.tokenizer))


def shown_batch(data: PreviewData, places: Sequence[int]) -> ShownBatch | None:
    """Return one row of a batch as training has it: the pack with the first of these rows that is trained on; None if there is none."""
    trained = [ids for place in places if (ids := _tokenized(data, int(data.lines[place]))) is not None]
    if not trained:
        return None
    packs, size = data.packs, data.args.per_device_train_batch_size
    if data.args.packing:
        index = _pack_with(packs, np.array(trained[0]["input_ids"], dtype=np.int32))
        rows, title = [packs[index]], f"pack {index + 1:,} of {len(packs):,}"
    else:
        rows, title = [packs[place] for place in range(min(size, len(packs)))], f"the first {size} rows as a batch"
    collated = build_collator(data.args, data.tokenizer)(rows)
    return ShownBatch(f"In training: {title}", _segments(data, collated))


def row_index(data: PreviewData, number: int) -> int:
    """Return the index of the row on a line of the file, which blank lines shift.

    Raises:
        UserError: there is no row on this line.
    """
    place = int(np.searchsorted(data.lines, number))
    if place == len(data.lines) or data.lines[place] != number:
        last = int(data.lines[-1])
        raise UserError(f"row={number}: {data.train_file.path.name} has no row on this line (its last is {last})")
    return place


def _segments(data: PreviewData, batch: dict[str, Any]) -> list[Segment]:
    """Find the rows in a batch of the trainer's collator, by the boundaries and positions that it passes to the model."""
    parts: list[tuple[list[int], Segment]] = []
    for line, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        used = int(batch["attention_mask"][line].sum()) if "attention_mask" in batch else len(ids)
        bounds = batch["cu_seq_lens_q"].tolist() if "cu_seq_lens_q" in batch else [0, used]
        for start, end in pairwise(bounds):
            # Without position_ids the model counts from 0 in every row.
            positions = batch["position_ids"][line, start:end].tolist() if "position_ids" in batch else range(used)
            with_loss = sum(label != IGNORED for label in labels[start:end])
            span = f"{positions[0]:,}-{positions[-1]:,}"
            parts.append((ids[start:end], Segment("", start, end, span, with_loss, "")))
        most = data.max_length if data.args.packing else len(ids)
        if used < most:
            name = "unused" if data.args.packing else "padding"
            parts.append(([], Segment(name, used, most, "", 0, "")))
    numbers = _numbers(data, [ids for ids, _ in parts if ids])
    return [_with_name(data, segment, numbers.get(tuple(ids))) for ids, segment in parts]


def _with_name(data: PreviewData, segment: Segment, number: int | None) -> Segment:
    if number is None:
        return segment
    question = data.train_rows[row_index(data, number)]["question"]
    return replace(segment, row=str(number), begins=" ".join(question.split())[:_BEGINNING])


def _numbers(data: PreviewData, wanted: list[list[int]]) -> dict[tuple[int, ...], int]:
    """Return the line numbers of the rows that have these tokens, by their tokens."""
    missing = {np.array(ids, dtype=np.int32).tobytes(): tuple(ids) for ids in wanted}
    sizes = np.unique([len(ids) for ids in wanted])
    found: dict[tuple[int, ...], int] = {}
    origins = batches(data.train.origins, ["row"])
    for table, origin in zip(batches(data.train.rows, ["input_ids", "labels"]), origins, strict=True):
        ids, _, starts = flat(table)
        ends = np.append(starts[1:], len(ids))
        for place in np.flatnonzero(np.isin(ends - starts, sizes)).tolist():
            if (row := missing.pop(ids[starts[place] : ends[place]].tobytes(), None)) is not None:
                found[row] = origin["row"][place].as_py()
        if not missing:
            break
    return found


def _pack_with(packs: Dataset, row: np.ndarray) -> int:
    """Return the index of the pack that holds a row's tokens; the first pack if packing cuts rows."""
    if "seq_lengths" not in packs.column_names:
        return 0
    before = 0
    for table in batches(packs, ["input_ids", "labels", "seq_lengths"]):
        ids, _, _ = flat(table)
        segments = table["seq_lengths"].combine_chunks()
        lengths = segments.flatten().to_numpy()
        starts = np.cumsum(lengths) - lengths
        owners = np.repeat(np.arange(len(table)), segments.value_lengths().to_numpy())
        for place in np.flatnonzero(lengths == len(row)).tolist():
            if np.array_equal(ids[starts[place] : starts[place] + len(row)], row):
                return before + int(owners[place])
        before += len(table)
    return 0


def _tokenized(data: PreviewData, number: int) -> dict[str, list[int]] | None:
    """Return the tokens and labels of the row on a line; None if it was dropped."""
    place = int(np.searchsorted(data.trained_lines, number))
    if place == len(data.trained_lines) or data.trained_lines[place] != number:
        return None
    return data.train.rows[place]


def _line_numbers(rows: Dataset) -> np.ndarray:
    return np.concatenate([table["row"].to_numpy() for table in batches(rows, ["row"])])
