"""The preview's checks of rows as tokens: lengths, loss mask, BOS and end of turn, what had to be cut, how well packing fills batches."""

import math
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from intern.data.packing import keeps_rows_apart
from intern.data.prompt import IGNORED, Prompt
from intern.data.tokenize import Tokenized
from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.row_batches import FaultyRows, batches, fault_check, flat, named, per_row

_LOW_EFFICIENCY = (
    0.7  # fraction of computed positions that hold a token, below which more than a third of the time is wasted
)


@dataclass
class Lengths:
    """How long tokenized rows are. histogram[n] is the number of rows of n tokens."""

    histogram: np.ndarray
    tokens_with_loss: int = 0

    @property
    def rows(self) -> int:
        return int(self.histogram.sum())

    @property
    def tokens(self) -> int:
        return int(self.histogram @ np.arange(len(self.histogram)))

    @property
    def loss_share(self) -> float:
        return self.tokens_with_loss / self.tokens

    def percentile(self, percent: float) -> int:
        """Return the length in tokens that `percent` of the rows do not exceed (nearest rank)."""
        rank = max(math.ceil(percent / 100 * self.rows), 1)
        return int(np.searchsorted(np.cumsum(self.histogram), rank))


def check_tokens(
    tokens: Tokenized, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Lengths, list[Check]]:
    """Measure the rows, and check that each teaches what it should: one BOS, loss only on the answer and on the end of its turn.

    Args:
        tokens: the tokenized rows.
        prompt: how they were rendered.
        tokenizer: the model's.
        max_length: the most tokens of a row.
    """
    end_of_turn = tokenizer.convert_tokens_to_ids(prompt.template[3])
    template = [token for piece in prompt.template for token in _special_ids(tokenizer, piece)]
    bos = tokenizer.bos_token_id
    # If a tokenizer begins plain text with BOS, its model was trained on that.
    wanted = 0 if bos is None else max(template.count(bos), int(tokenizer("a")["input_ids"][0] == bos))
    lengths = Lengths(np.zeros(max_length + 1, dtype=np.int64))
    never_ends, mask, wrong_bos = FaultyRows(), FaultyRows(), FaultyRows()
    origins = batches(tokens.origins, ["row", "turns"])
    for table, origin in zip(batches(tokens.rows, ["input_ids", "labels"]), origins, strict=True):
        rows = origin["row"].to_numpy()
        ids, labels, starts = flat(table)
        ends = np.append(starts[1:], len(ids)) - 1
        lengths.histogram += np.bincount(ends - starts + 1, minlength=max_length + 1)
        carries = labels != IGNORED
        lengths.tokens_with_loss += int(carries.sum())
        never_ends.add_marked(rows, labels[ends] != end_of_turn)
        # Correct is: no loss, then loss to the end of turn, once per answer. So loss begins as often as there are answers with loss, never
        # at the first token, and labels repeat the ids.
        begins = carries & ~np.append(False, carries[:-1])
        changed = per_row(carries & (labels != ids), starts) > 0
        answers = origin["turns"].to_numpy()
        mask.add_marked(rows, changed | (per_row(begins, starts) != answers) | carries[starts] | ~carries[ends])
        if bos is not None:
            wrong_bos.add_marked(rows, (per_row(ids == bos, starts) != wanted) | ((ids[starts] != bos) & (wanted > 0)))
    name = repr(prompt.template[3])
    return lengths, [
        fault_check(
            "end of turn",
            RED,
            never_ends,
            f"{name} ends every row, with loss",
            f"{name} is missing at the end, or has no loss",
            "a model trained like this never stops: fix the chat template",
        ),
        fault_check(
            "loss mask",
            RED,
            mask,
            "only answers carry loss",
            "loss outside the answer, or none on it",
            "fix the chat template",
        ),
        fault_check(
            "BOS",
            RED,
            wrong_bos,
            "this model has none" if not wanted else f"every row begins with {tokenizer.bos_token!r}, once",
            f"not exactly {wanted} {tokenizer.bos_token!r} at the beginning",
            "a model that was trained with BOS answers worse without it: begin the chat template with {{ bos_token }}",
        ),
    ]


def check_fit(tokens: Tokenized, max_length: int) -> Check:
    """Check whether rows had to be shortened or dropped."""
    if not tokens.dropped and not tokens.shortened and not tokens.lost_turns:
        return Check("fit", GREEN, f"every row fits into {max_length:,} tokens")
    cut, turns_cut = FaultyRows(), FaultyRows()
    for table in batches(tokens.origins, ["row", "cut", "turns_cut"]):
        rows = table["row"].to_numpy()
        cut.add_marked(rows, table["cut"].to_numpy() > 0)
        turns_cut.add_marked(rows, table["turns_cut"].to_numpy() > 0)
    parts = [f"shortened {cut}"] if cut.count else []
    parts += [f"without their oldest turns {turns_cut}"] if turns_cut.count else []
    parts += [f"dropped {named(tokens.dropped)}"] if tokens.dropped else []
    return Check("fit", AMBER, "; ".join(parts), "raise trainer.max_length, or shorten these rows")


def check_packing(packs: Dataset, lengths: Lengths, args: SFTConfig) -> tuple[float, Check]:
    """Measure how full batches are, and check that packing kept every token and keeps the rows apart.

    With packing there are packs times trainer.max_length positions. Without it, rows are batched in one random order, and each batch is padded
    to its longest row unless its rows can be concatenated.

    Args:
        packs: what the trainer makes of the rows.
        lengths: of the rows.
        args: TRL's arguments.

    Returns:
        The fraction of computed positions that hold a token, and the check.
    """
    if args.packing:
        tokens = with_loss = 0
        for table in batches(packs, ["input_ids", "labels"]):
            ids, labels, _ = flat(table)
            tokens += len(ids)
            with_loss += int((labels != IGNORED).sum())
        share = tokens / (len(packs) * int(args.max_length or 0))
        if (tokens, with_loss) != (lengths.tokens, lengths.tokens_with_loss):
            lost = f"{lengths.tokens - tokens:,} of {lengths.tokens:,} tokens were lost in packing"
            return share, Check("packing", RED, lost, "use trainer.packing_strategy=bfd")
        found = f"{lengths.rows:,} rows in {len(packs):,} packs of {args.max_length:,} tokens, {share:.0%} used"
        if not keeps_rows_apart(args):
            found += f"; trainer.packing_strategy={args.packing_strategy} cuts rows and lets them see each other"
            return share, Check("packing", AMBER, found, "use trainer.packing_strategy=bfd")
    elif args.padding_free:
        return 1.0, Check("packing", GREEN, "no packing: the rows of a batch are concatenated, without padding")
    else:
        every = np.repeat(np.arange(len(lengths.histogram), dtype=np.int32), lengths.histogram)
        np.random.default_rng(args.seed).shuffle(every)
        size = args.per_device_train_batch_size
        longest = np.maximum.reduceat(every, np.arange(0, len(every), size))
        sizes = np.minimum(size, len(every) - np.arange(0, len(every), size))
        share = float(every.sum(dtype=np.int64) / (longest.astype(np.int64) @ sizes))
        found = f"no packing: {share:.0%} of the positions in random batches of {size} are used"
    low = share < _LOW_EFFICIENCY and len(packs) > 1  # one pack is as full as there are rows
    remedy = ("lower trainer.max_length" if args.packing else "use trainer.packing=true") if low else ""
    return share, Check("packing", AMBER if low else GREEN, found, remedy)


def _special_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
