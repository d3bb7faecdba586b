"""conf/data -> how many tokens the batches of a run will have: counted with its tokenizer, or estimated from the length of its texts."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from intern.display.progress import LONG_DATA

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from intern.data.prompt import Prompt
    from intern.data.settings import DataConfig
    from intern.data.sources import RowSet

# SmolLM2's tokenizer (49,152 tokens): 3.83 bytes of UTF-8 per token in data/train.jsonl, 3.46 in pages of docs/.
_BYTES_PER_TOKEN = 3.7
_TEMPLATE_TOKENS = 10  # around a question and its answer in Llama 3's template
_SYSTEM_TOKENS = 5  # around a system turn there


@dataclass(frozen=True)
class PlannedRows:
    """The batches of one epoch.

    Args:
        units: rows; with packing, packs.
        batch: tokens of an average batch.
        largest: tokens of the largest batch.
        row: tokens of the row that an average token is in: attention costs time in proportion to it.
        scored: share of tokens that carry loss.
        basis: how the tokens were counted, for a person; empty if with the base's own tokenizer, all of them.
    """

    units: int
    batch: float
    largest: int
    row: float
    scored: float
    basis: str = ""


def count_batches(
    table: "RowSet",
    data: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "Prompt",
    args: "SFTConfig",
    is_own: bool,
) -> PlannedRows:
    """Cut the rows as training does, pack them if they are to be packed, and measure the batches.

    Args:
        table: the training rows.
        data: the values of conf/data.
        tokenizer: the base's, or one that stands in for it.
        prompt: how a row is shown.
        args: TRL's arguments.
        is_own: whether the tokenizer is the base's own; if not, tokens are estimated from the bytes of the texts.

    Raises:
        UserError: no row fits.
        RunError: the cache cannot be written.
    """
    from intern.data.packing import pack
    from intern.data.tokenize import tokenize

    every, length, size = len(table.rows), int(args.max_length or 0), args.per_device_train_batch_size
    rows = table.rows
    if every > LONG_DATA:
        step = every / LONG_DATA
        rows = rows.select([int(index * step) for index in range(LONG_DATA)])
    basis = f"from {len(rows):,} of {every:,} rows" if len(rows) < every else ""
    if is_own:
        tokens = tokenize(rows, tokenizer, prompt, length, data.num_proc, table.name, False, data.loss_on)
        cut, scored = tokens.rows, _scored(tokens.rows)
    else:
        cut, scored = _stand_ins(rows, prompt, length)
        basis = f"from the length of the texts, at {_BYTES_PER_TOKEN} bytes per token{', ' + basis if basis else ''}"
    units = pack(cut, args)
    lengths = _lengths(units, "input_ids")
    of_rows = _each(units, "seq_lengths") if "seq_lengths" in units.column_names else lengths
    chunks = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    padded = not (args.packing or args.padding_free)
    sums = [len(chunk) * max(chunk) if padded else sum(chunk) for chunk in chunks]
    longest = sorted(lengths)[-size:]
    largest = len(longest) * longest[-1] if padded else sum(longest)
    return PlannedRows(
        units=max(1, round(len(lengths) * every / len(rows))),
        batch=sum(sums) / len(sums),
        largest=length * size if args.packing else largest,
        row=sum(one * one for one in of_rows) / max(1, sum(of_rows)),
        scored=scored,
        basis=basis,
    )


def _stand_ins(rows: "Dataset", prompt: "Prompt", length: int) -> tuple["Dataset", float]:
    """Return rows of as many tokens as the texts of `rows` probably have, and the share of them that carry loss."""
    from datasets import Dataset

    lengths, scored = [], 0.0
    for row in rows:
        turns = [(turn["question"], turn["answer"]) for turn in row["history"] or ()]
        answers = [*(answer for _, answer in turns), row["answer"]]
        texts = [*(question for question, _ in turns), row["question"], *answers]
        if prompt.trains_with_material(row["question"]):
            texts.append(row["chunk_text"] or "")
        system = row["system"] or prompt.system_prompt
        around = _TEMPLATE_TOKENS * (len(turns) + 1) + (_SYSTEM_TOKENS if system else 0)
        tokens = round(_tokens(*texts, system) + around)
        lengths.append(min(tokens, length))
        scored += min(_tokens(*answers), length)
    ids = [[0] * tokens for tokens in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids}), scored / max(1, sum(lengths))


def _tokens(*texts: str) -> float:
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / _BYTES_PER_TOKEN


def _lengths(rows: "Dataset", column: str) -> list[int]:
    tables: Any = rows.select_columns(column).with_format("arrow").iter(1000)
    return [size for table in tables for size in table[column].combine_chunks().value_lengths().to_pylist()]


def _each(rows: "Dataset", column: str) -> list[int]:
    return list(itertools.chain.from_iterable(rows[column]))


def _scored(rows: "Dataset") -> float:
    import pyarrow.compute as pc

    from intern.data.row_tokens import IGNORED

    tables: Any = rows.select_columns("labels").with_format("arrow").iter(1000)
    counts = [
        (pc.sum(pc.not_equal(flat, IGNORED)).as_py() or 0, len(flat))
        for table in tables
        for flat in [table["labels"].combine_chunks().flatten()]
    ]
    return sum(learned for learned, _ in counts) / max(1, sum(every for _, every in counts))
