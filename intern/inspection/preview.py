"""A composed training configuration -> what it would train on, shown and checked: no weights, no GPU, nothing written but caches."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from omegaconf import DictConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from intern.config.build import build, plain
from intern.data.files import DataFile
from intern.data.packing import build_collator, pack
from intern.data.prepare import Prepared, located
from intern.data.prepare import prepare as prepare_data
from intern.data.prompt import IGNORED, Prompt
from intern.data.settings import DataConfig
from intern.data.tokenize import Tokenized, turns
from intern.display.plot import plot_lengths
from intern.errors import UserError
from intern.inspection.check import Check, show_checks
from intern.inspection.row_checks import (
    Lengths,
    batches,
    check_fit,
    check_leaks,
    check_packing,
    check_texts,
    check_tokens,
    flat,
)
from intern.inspection.token_view import Preview, Segment, ShownBatch, ShownRow, page, pieces, plain_rows, show_rows
from intern.model.base import Base
from intern.model.precision import Precision
from intern.runs.directory import Run
from intern.training.arguments import build_training_args
from intern.training.rules import Shape, batches_need_no_padding, check_values
from intern.upstream import route_messages

_PERCENTS = (50, 90, 99, 100)
_BEGINNING = 50  # characters of a question that name a row of a batch


@dataclass(frozen=True)
class Material:
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


def examine(cfg: DictConfig, console: Console) -> list[Check]:
    """Shows the rows that conf/preview.yaml asks for and what all of them are like; returns the checks.

    Raises:
        UserError: bad input, as training would raise it; a row that is not in the file.
    """
    route_messages()
    count, row = _asked(cfg)
    material = prepare(cfg)
    preview = look(material, count, row, Path(cfg.lengths) if cfg.lengths else None)
    if console.is_terminal:
        show_rows(preview, console)
    else:
        sys.stdout.write(plain_rows(preview))
    show_checks(preview.checks, console)
    if cfg.html:
        target = Path(cfg.html)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(preview, f"Preview of {material.train_file.path.name}"), encoding="utf-8")
    for path in (cfg.lengths, cfg.html):
        if path:
            sys.stderr.write(f"wrote {path}\n")
    return preview.checks


_OWN = ("rows", "row", "html", "lengths")  # keys of conf/preview.yaml


def prepare(cfg: DictConfig) -> Material:
    """The data half of a training run, by the functions that training calls; what it writes are the caches that training reads."""
    check_values({name: value for name, value in plain(cfg).items() if name not in _OWN})
    found = located(build(DataConfig, plain(cfg.data), "data"))
    # What is trained on is the same on every device: no GPU is needed to look at it.
    nowhere = Precision("cpu", torch.float32, fp16=False, bf16=False)
    args = build_training_args(cfg.trainer, Run(Path.cwd()), nowhere, cfg.seed, evaluates=found.data.evaluates)
    base = Base(cfg.model)
    tokenizer = base.tokenizer()
    args.padding_free = args.padding_free or batches_need_no_padding(
        plain(cfg), lambda: Shape(base.config, base.skeleton, tokenizer)
    )
    prompt = Prompt.from_tokenizer(
        tokenizer, found.data.system_prompt or "", found.data.context, found.data.template_kwargs
    )
    data = prepare_data(found, tokenizer, prompt, int(args.max_length or 0))
    packs = pack(data.train_tokens.rows, args)
    return Material(prompt, tokenizer, args, data, packs)


def look(material: Material, count: int, row: int | None, picture: Path | None) -> Preview:
    """Everything that is shown: the first `count` rows, or the one on line `row`; the histogram of lengths is drawn to `picture`."""
    lengths, checks = check_tokens(material.train, material.prompt, material.tokenizer, material.max_length)
    share, packing = check_packing(material.packs, lengths, material.args)
    shows_material = material.prompt.context != "never"
    checks += [check_fit(material.train, material.max_length), packing]
    checks += check_texts(material.train_rows, material.tokenizer.all_special_tokens, shows_material)
    golden_lengths = None
    if material.golden is not None and material.golden_rows is not None:
        golden_lengths, _ = check_tokens(material.golden, material.prompt, material.tokenizer, material.max_length)
        checks += check_leaks(material.train_rows, material.golden_rows, shows_material)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_lengths(lengths.histogram, material.max_length, picture)
    places = range(min(count, len(material.train_rows))) if row is None else [_place(material, row)]
    return Preview(
        rows=[shown_row(material, place) for place in places],
        batch=shown_batch(material, places),
        figures=_figures(material, lengths, golden_lengths, share),
        checks=checks,
        lengths=picture,
    )


def shown_row(material: Material, place: int) -> ShownRow:
    """The row at a place of the file as its tokens; what was cut off stands where it stood."""
    row = material.train_rows[place]
    text = row["chunk_text"] if material.prompt.trains_with_material(row["question"]) else None
    tokens = material.prompt.explain(
        material.tokenizer,
        row["question"],
        row["answer"],
        text,
        material.max_length,
        history=turns(row["history"]),
        system=row["system"],
    )
    trained = _tokenized(material, row["row"])
    title = material.data.train.place(row["row"])
    if trained is None:
        note = f"{len(tokens):,} tokens: dropped, longer than trainer.max_length={material.max_length:,} even without material"
        return ShownRow(title, note, pieces(tokens, [], material.tokenizer))
    assert [token.id for token in tokens if not token.cut] == trained["input_ids"]
    cut = sum(token.cut for token in tokens)
    with_loss = sum(label != IGNORED for label in trained["labels"])
    note = f"{len(trained['input_ids']):,} tokens, {with_loss:,} with loss" + (f", {cut:,} cut off" if cut else "")
    return ShownRow(title, note, pieces(tokens, trained["labels"], material.tokenizer))


def shown_batch(material: Material, places: Sequence[int]) -> ShownBatch | None:
    """One row of a batch as training has it: the pack with the first of these rows that is trained on; None if there is none."""
    trained = [ids for place in places if (ids := _tokenized(material, int(material.lines[place]))) is not None]
    if not trained:
        return None
    packs, size = material.packs, material.args.per_device_train_batch_size
    if material.args.packing:
        index = _pack_with(packs, np.array(trained[0]["input_ids"], dtype=np.int32))
        rows, title = [packs[index]], f"pack {index + 1:,} of {len(packs):,}"
    else:
        rows, title = [packs[place] for place in range(min(size, len(packs)))], f"the first {size} rows as a batch"
    collated = build_collator(material.args, material.tokenizer)(rows)
    return ShownBatch(f"In training: {title}", _segments(material, collated))


def _segments(material: Material, batch: dict[str, Any]) -> list[Segment]:
    """The rows that the trainer's collator put into a batch, by the boundaries and positions that it hands to the model."""
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
        most = material.max_length if material.args.packing else len(ids)
        if used < most:
            name = "unused" if material.args.packing else "padding"
            parts.append(([], Segment(name, used, most, "", 0, "")))
    numbers = _numbers(material, [ids for ids, _ in parts if ids])
    return [_with_name(material, segment, numbers.get(tuple(ids))) for ids, segment in parts]


def _with_name(material: Material, segment: Segment, number: int | None) -> Segment:
    if number is None:
        return segment
    question = material.train_rows[_place(material, number)]["question"]
    return replace(segment, row=str(number), begins=" ".join(question.split())[:_BEGINNING])


def _numbers(material: Material, wanted: list[list[int]]) -> dict[tuple[int, ...], int]:
    """The line numbers of the rows that have these tokens, by their tokens."""
    missing = {np.array(ids, dtype=np.int32).tobytes(): tuple(ids) for ids in wanted}
    sizes = np.unique([len(ids) for ids in wanted])
    found: dict[tuple[int, ...], int] = {}
    origins = batches(material.train.origins, ["row"])
    for table, origin in zip(batches(material.train.rows, ["input_ids", "labels"]), origins, strict=True):
        ids, _, starts = flat(table)
        ends = np.append(starts[1:], len(ids))
        for place in np.flatnonzero(np.isin(ends - starts, sizes)).tolist():
            if (row := missing.pop(ids[starts[place] : ends[place]].tobytes(), None)) is not None:
                found[row] = origin["row"][place].as_py()
        if not missing:
            break
    return found


def _pack_with(packs: Dataset, row: np.ndarray) -> int:
    """The place of the pack that holds a row's tokens; the first pack where packing cuts rows into pieces."""
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


def _tokenized(material: Material, number: int) -> dict[str, list[int]] | None:
    """The tokens and labels of the row on a line; None if it was dropped."""
    place = int(np.searchsorted(material.trained_lines, number))
    if place == len(material.trained_lines) or material.trained_lines[place] != number:
        return None
    return material.train.rows[place]


def _place(material: Material, number: int) -> int:
    """The place of the row on a line of the file, which blank lines shift."""
    place = int(np.searchsorted(material.lines, number))
    if place == len(material.lines) or material.lines[place] != number:
        last = int(material.lines[-1])
        raise UserError(f"row={number}: {material.train_file.path.name} has no row on this line (its last is {last})")
    return place


def _line_numbers(rows: Dataset) -> np.ndarray:
    return np.concatenate([table["row"].to_numpy() for table in batches(rows, ["row"])])


def _asked(cfg: DictConfig) -> tuple[int, int | None]:
    """How many rows to show, and which one."""
    for key, least in (("rows", 0), ("row", 1)):
        value = cfg[key]
        if (value is not None or key == "rows") and (not isinstance(value, int) or value < least):
            raise UserError(f"{key}={value}: must be a whole number, at least {least}")
    return cfg.rows, cfg.row


def _figures(material: Material, lengths: Lengths, golden: Lengths | None, share: float) -> list[tuple[str, str, str]]:
    """Name, training rows, golden rows."""

    def column(rows: Dataset | None, tokens: Tokenized | None, of: Lengths | None) -> list[str]:
        if rows is None or tokens is None or of is None:
            return ["-"] * (5 + len(_PERCENTS))
        return [
            f"{len(rows):,}",
            f"{len(tokens.dropped):,}",
            f"{tokens.shortened:,}",
            *(f"{of.percentile(percent):,}" for percent in _PERCENTS),
            f"{of.tokens:,}",
            f"{of.loss_share:.1%}",
        ]

    percents = [f"tokens of a row: {'longest' if percent == 100 else f'p{percent}'}" for percent in _PERCENTS]
    names = ["rows", "dropped", "shortened", *percents, "tokens", "tokens with loss"]
    ours = column(material.train_rows, material.train, lengths)
    theirs = column(material.golden_rows, material.golden, golden)
    return [*zip(names, ours, theirs, strict=True), ("positions used in training", f"{share:.1%}", "-")]
