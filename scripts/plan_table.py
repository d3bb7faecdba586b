"""python scripts/plan_table.py

Writes the tables of docs/planning.md: every base of conf/model on the usual cards, the cards themselves, and the estimates next to every
measured run of docs/benchmarks.md. With --check it only compares.
"""

import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig

from intern.cards import CARDS, find_card
from intern.inspection.planned_run import CardPieces
from intern.inspection.published_shapes import SHAPES
from intern.memory.estimate import training_peak
from intern.memory.expected_plan import expected_plan, fits
from intern.memory.plan import LONG_ROW_TOKENS, MemoryPlan
from intern.memory.speed import FASTEST, SLOWEST, Batch, Rates, batch_seconds
from intern.model.base import Base
from intern.paths import CONF_DIR, PROJECT
from intern.units import GIB

PAGE = PROJECT / "docs" / "planning.md"
SHOWN = ("t4", "l4", "a10", "4090", "a100", "a100-80gb", "h100", "h200")
MODELS = ("smollm2_135m", "llama32_1b", "llama3_8b")
MILLION = 1_000_000
# The benchmark's rows (random_rows of scripts/bench_train.py, 600 of at most 2,048 tokens): tokens of the average row, of the row that an
# average token is in, and the share of tokens with loss. The largest of 40 batches of eight such rows has 7,500 tokens.
MEAN, ROW, SCORED, EIGHT = 555, 883, 0.25, 7500
SAMPLE_ROW = 180  # the same of data/train.jsonl


@dataclass(frozen=True)
class Run:
    """A measured run of docs/benchmarks.md: the 8B shape in NF4.

    Args:
        what: the run, as the table calls it.
        speed: tokens/s; and peak: GiB at the peak of the tensors. Both are figures of that page.
        batch: tokens of the average batch; largest: of the largest one; row: of the row that an average token is in.
        peak: GiB.
        card: the card; and cap: the GiB that the process could use, if it was limited.
        t4: whether flash and cuDNN attention were switched off.
        rank, all_linear: of the adapter.
        states: bytes of optimizer states per trainable parameter.
        checkpointing: trainer.activation_checkpointing.
    """

    what: str
    speed: int
    peak: float
    batch: float
    largest: int
    row: float
    card: str = "h200"
    cap: float | None = None
    t4: bool = False
    rank: int = 16
    all_linear: bool = False
    states: int = 8
    checkpointing: object = "auto"


def _cost(rows: int, length: int, rank: int, speed: int, peak: float) -> Run:
    tokens = rows * length
    what = f"bf16, {rows} x {length:,}, rank {rank}"
    return Run(what, speed, peak, tokens, tokens, length, rank=rank, states=2)


MEASURED = (
    Run("imitated T4, the default run", 10_810, 12.34, 1024, 1024, SAMPLE_ROW, cap=14.7, t4=True),
    Run("imitated T4, one pack of 2,048", 10_493, 12.8, 2048, 2048, ROW, cap=14.7, t4=True),
    Run("imitated T4, one row", 4205, 13.9, MEAN, 2048, ROW, cap=14.7, t4=True),
    Run("imitated T4, eight rows", 11_415, 12.9, 4338, EIGHT, ROW, cap=14.7, t4=True),
    Run("imitated T4, one pack, every layer checkpointed", 7263, 5.95, 2048, 2048, ROW, cap=14.7, t4=True, states=2, checkpointing=True),
    Run("bf16, the default run", 18_134, 31.4, 4096, 4096, SAMPLE_ROW),
    Run("bf16, 8 packs of 2,048", 20_047, 69.8, 16_384, 16_384, ROW),
    Run("the same, another machine", 19_720, 69.8, 16_384, 16_384, ROW),
    Run("the same, a third machine", 20_316, 69.8, 16_384, 16_384, ROW),
    Run("bf16, 8 packs of 2,048, every layer checkpointed", 13_306, 8.2, 16_384, 16_384, ROW, checkpointing=True),
    Run("one row of 40,960 in 14.7 GiB", 6552, 13.26, 40_960, 40_960, 40_960, cap=14.7, rank=32, all_linear=True, states=2, checkpointing=True),
    Run("one row of 65,536 in 14.7 GiB", 5150, 12.45, 65_536, 65_536, 65_536, cap=14.7, rank=32, all_linear=True, states=2),
    _cost(1, 512, 16, 6897, 20.5),
    _cost(1, 2048, 16, 13_303, 26.6),
    _cost(1, 8192, 16, 15_387, 46.2),
    _cost(1, 32_768, 16, 9239, 116.7),
    _cost(8, 512, 16, 18_104, 36.0),
    _cost(8, 2048, 16, 18_565, 74.2),
    _cost(8, 8192, 16, 12_884, 128.3),
    _cost(8, 512, 64, 17_639, 38.4),
    _cost(8, 2048, 64, 18_616, 77.5),
    _cost(8, 8192, 64, 12_697, 126.0),
)  # fmt: skip
# Speeds of the same settings on an H100, for which the page has no peaks.
ON_H100 = (
    Run("bf16, 8 packs of 2,048, H100", 19_438, 0, 16_384, 16_384, ROW, card="h100"),
    Run("imitated T4, one pack of 2,048, H100", 10_200, 0, 2048, 2048, ROW, card="h100", cap=14.7, t4=True),
)


class ShapePieces(CardPieces):
    """The pieces of a run of a published shape: no file of the base is looked for, so the tables are the same everywhere."""

    def __init__(self, *overrides: str) -> None:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            super().__init__(compose("doctor", list(overrides)), find_card("t4"))
        config = AutoConfig.for_model(**SHAPES[self.cfg.model.pretrained_model_name_or_path])
        self.made["found_base"] = (Base(self.cfg.model, config), ""), None
        self.made["adapter"] = self.lora, None  # without the checks of an adapter, which take longer than the rest


def planned(pieces: CardPieces, run: Run) -> tuple[MemoryPlan, float]:
    """The expected plan and the seconds of a batch, of a run of which only the tokens are known."""
    card = find_card(run.card)
    cudnn, budget = card.is_hopper and not run.t4, int((run.cap or card.gib) * GIB)
    peak = training_peak(pieces.sizes, run.largest, 2, True, run.states, cudnn)
    weights = pieces.weights
    once = cudnn and run.row >= LONG_ROW_TOKENS
    plan = expected_plan(peak, budget, run.largest, run.checkpointing, 2 * weights.quantized, once)
    rates = Rates(card.fp16 * 1e12, card.bandwidth * 1e9, cudnn)
    return plan, batch_seconds(weights, Batch(run.batch, run.row, SCORED), plan, rates)


@functools.cache
def of_shape(model: str, lora: str = "qkvo", rank: int = 16) -> ShapePieces:
    """The pieces of a model and its adapter, whose sizes are the same for all cards and both 16-bit precisions."""
    return ShapePieces(f"model={model}", f"lora={lora}", f"lora.r={rank}")


@functools.cache
def tokens_of_batch(trainer: str) -> int:
    """The tokens of a full batch of a group file of conf/trainer."""
    values: Any = OmegaConf.load(CONF_DIR / "trainer" / f"{trainer}.yaml")
    return int(values["max_length"] * values["per_device_train_batch_size"])


def models() -> Iterator[list[str]]:
    """A row for each base: what the default run takes on each card, with packs of full length and rows like the sample's."""
    yield ["", *(find_card(key).name.removeprefix("NVIDIA ") for key in SHOWN)]
    for model in MODELS:
        cells = []
        for key in SHOWN:
            card = find_card(key)
            tokens = tokens_of_batch("ampere" if card.has_bf16 else "t4_min100")
            run = Run(model, 0, 0, tokens, tokens, SAMPLE_ROW, card=key, t4=not card.is_hopper)
            plan, seconds = planned(of_shape(model), run)
            assert fits(plan), f"{model} on {key}"
            minutes = MILLION / tokens * seconds / 60
            given_up = f", {plan.checkpointed}/{plan.layers} layers" if plan.checkpointed else ""
            cells.append(
                f"{plan.peak / GIB:.1f} GiB{given_up}<br>{_short(minutes * FASTEST)} to {_short(minutes * SLOWEST)} min"
            )
        yield [f"`{model}`", *cells]


def _short(minutes: float) -> str:
    return f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}"


def cards() -> Iterator[list[str]]:
    """A row for each card."""
    yield ["`gpu=`", "card", "usable GiB", "fp16 TFLOP/s", "bf16 TFLOP/s", "GB/s", "compute capability", "source"]
    for card in CARDS:
        bf16 = f"{card.bf16:g}" if card.bf16 is not None else "none"
        capability = ".".join(map(str, card.capability))
        rates = [f"{card.gib:.1f}", f"{card.fp16:g}", bf16, f"{card.bandwidth:,g}", capability]
        yield [f"`{card.key}`", card.name, *rates, card.source]


def errors() -> Iterator[tuple[Run, MemoryPlan, float]]:
    """Every measured run with the expected plan and the estimated tokens/s."""
    for run in (*MEASURED, *ON_H100):
        pieces = of_shape("llama3_8b", "all_linear" if run.all_linear else "qkvo", run.rank)
        plan, seconds = planned(pieces, run)
        yield run, plan, run.batch / seconds


def measured() -> Iterator[list[str]]:
    """A row for each measured run."""
    yield [
        "run",
        "peak GiB: measured",
        "estimated",
        "error",
        "tokens/s: measured",
        "estimated",
        "time: measured / estimated",
    ]
    for run, plan, speed in errors():
        peak = plan.peak / GIB
        memory = (
            [f"{run.peak:g}", f"{peak:.1f}", f"{peak / run.peak - 1:+.0%}"] if run.peak else ["", f"{peak:.1f}", ""]
        )
        yield [run.what, *memory, f"{run.speed:,}", f"{speed:,.0f}", f"{speed / run.speed:.2f}"]


def table(rows: Iterator[list[str]], texts: int) -> str:
    head, *body = rows
    rule = ["---" if index < texts else "---:" for index in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *body))


def page(text: str) -> str:
    """The page with its tables as they are now."""
    for name, rows, texts in (("models", models(), 1), ("cards", cards(), 2), ("measured", measured(), 1)):
        begin, end = f"<!-- {name}: python scripts/plan_table.py -->\n", f"<!-- end of {name} -->\n"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        assert pattern.search(text), f"docs/planning.md has no place for {name}"
        made = f"{begin}\n{table(rows, texts)}\n{end}"
        text = pattern.sub(lambda _, made=made: made, text)  # type: ignore[misc]
    return text


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text)
    if sys.argv[1:] == ["--check"]:
        if text != wanted:
            sys.exit("docs/planning.md does not show the tables as they are: run python scripts/plan_table.py")
    elif text != wanted:
        PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
