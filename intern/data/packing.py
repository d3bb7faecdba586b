"""Tokenized rows -> packs and batches, by the same functions of TRL that its trainer calls."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from intern.data.files import writing_the_cache


def keeps_rows_apart(args: SFTConfig) -> bool:
    """Whether a batch is one long row with boundaries in it, as SFTTrainer decides it ("padding-free")."""
    return bool(args.padding_free or (args.packing and args.packing_strategy in {"bfd", "bfd_split"}))


def pack(rows: Dataset, args: SFTConfig) -> Dataset:
    """What SFTTrainer makes of the rows before it trains: packs with packing (input_ids, labels, seq_lengths), else the rows themselves.

    The result lies in the datasets cache under the key that the trainer asks for, so training finds it there.

    Raises:
        RunError: the cache cannot be written.
    """
    if not args.packing:
        return rows
    rows = rows.select_columns(["input_ids", "labels"])
    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed)
    with writing_the_cache():
        packs = pack_dataset(
            rows, int(args.max_length or 0), args.packing_strategy, {"num_proc": args.dataset_num_proc}
        )
        return packs.shuffle(seed=args.seed) if args.shuffle_dataset else packs


def build_collator(args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """The collator that SFTTrainer builds for these arguments."""
    pad_token: Any = tokenizer.convert_tokens_to_ids(str(args.pad_token or tokenizer.pad_token or tokenizer.eos_token))
    multiple: Any = args.pad_to_multiple_of
    return DataCollatorForLanguageModeling(
        pad_token_id=pad_token, padding_free=keeps_rows_apart(args), pad_to_multiple_of=multiple
    )
