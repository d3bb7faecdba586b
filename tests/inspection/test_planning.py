"""A run is planned for a card that is not here: within the stated errors of what was measured, and without the base's files."""

import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import datasets
import pytest
from helpers import ROOT, composed
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import intern.training.finetune  # noqa: F401  # loads every library once
from intern import doctor as command
from intern.cards import CARDS, find_card
from intern.errors import UserError
from intern.inspection import plan_display
from intern.inspection.check import AMBER, GREEN, RED
from intern.inspection.doctor import CHECKS, plan_for_card
from intern.inspection.plan_display import MEMORY_ERROR, show_plan
from intern.inspection.planned_rows import count_batches
from intern.inspection.planned_run import CardPieces, read_own_keys
from intern.inspection.published_shapes import SHAPES
from intern.memory.estimate import TrainingPeak
from intern.memory.expected_plan import expected_plan, fits
from intern.memory.plan import MemoryPlan
from intern.memory.speed import FASTEST, SLOWEST, Batch, Rates, Weights, batch_seconds
from intern.units import GIB

WHOLE = ("model=tiny", "logger=none")
TINY = (*WHOLE, "data.max_rows=40")


def load_script():
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "scripts" / "plan_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_table"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


plan_table = load_script()


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def planned(*overrides):
    """The checks by their names, and the run."""
    cfg = composed(*overrides, name="doctor")
    checks, run = plan_for_card(cfg, read_own_keys(cfg)[0])
    found = {check.name: check for check in checks}
    assert list(found) == list(CHECKS)
    return found, run


def pieces_of(*overrides):
    cfg = composed(*overrides, name="doctor")
    return CardPieces(cfg, read_own_keys(cfg)[0])


def exit_code(*arguments):
    """What the command's process would end with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["doctor", *arguments])
        try:
            command.main()
        except SystemExit as end:
            return end.code
    return 0


# --- against what was measured


def test_every_measured_run_is_within_the_error_that_is_stated():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    runs = list(plan_table.errors())
    assert len(runs) == len(plan_table.MEASURED) + len(plan_table.ON_H100) > 20
    for run, plan, speed in runs:
        assert f"{run.speed:,}" in page and (not run.peak or re.search(rf"\b{run.peak:g}0?\b", page)), run
        assert FASTEST <= speed / run.speed <= SLOWEST, run
        assert not run.peak or abs(plan.peak / GIB / run.peak - 1) <= MEMORY_ERROR, run
        assert fits(plan), run  # it did


def test_the_layers_that_were_checkpointed_are_planned():
    plans = {run.what: plan for run, plan, _ in plan_table.errors()}
    assert abs(plans["bf16, 8 x 8,192, rank 16"].checkpointed - 15) <= 2
    assert plans["imitated T4, one pack of 2,048"].checkpointed == 0
    assert plans["one row of 65,536 in 14.7 GiB"].tiled and not plans["one row of 40,960 in 14.7 GiB"].tiled
    # 3.1 GiB of weights were kept dequantized there, and all 13.0.
    assert plans["imitated T4, the default run"].unpacked / GIB == pytest.approx(3.1, abs=0.2)
    assert plans["bf16, the default run"].unpacked / GIB == pytest.approx(13.0, abs=0.1)


def test_the_tables_of_the_page_are_what_the_script_writes():
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert plan_table.page(text) == text, "run python scripts/plan_table.py"


# --- cards


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
def test_a_card_is_found_by_every_spelling_and_its_data_go_together(card):
    for name in (card.key, card.key.upper(), card.name, f" {card.name.lower()} ", *card.aliases):
        assert find_card(name) is card
    assert card.has_bf16 == (card.capability >= (8, 0)) and card.source
    assert card.bf16 in (None, card.fp16) and 10 < card.gib < 200 and 300 <= card.bandwidth < 9000


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
def test_the_default_model_is_planned_for_every_card(card):
    pieces = plan_table.of_shape("llama3_8b")
    plan, seconds = plan_table.planned(pieces, plan_table.Run("", 0, 0, 2048, 2048, 180, card=card.key))
    assert fits(plan) and plan.peak > pieces.sizes.weights
    operations = 4 * pieces.weights.matrices * 2048
    assert seconds > operations / (card.fp16 * 1e12)
    assert seconds > 2 * 2 * pieces.weights.matrices / (card.bandwidth * 1e9)  # all weights pass twice, in 16 bits


def test_a_batch_is_never_faster_than_its_memory_allows():
    weights = Weights(32, 7e9, 0, 0, 0, 4096, 0)
    slow = Rates(1e18, 1e11, cudnn=False)
    assert batch_seconds(weights, Batch(1, 1, 0), MemoryPlan(32, 0, 0, 0), slow) >= 2 * 2 * 7e9 / 1e11


def test_layers_that_are_computed_twice_take_longer():
    weights, batch, rates = (
        Weights(32, 7e9, 7e9, 5e8, 1e7, 4096, 55_000),
        Batch(2048, 800, 0.3),
        Rates(65e12, 3.2e11, False),
    )
    kept, half, none = (batch_seconds(weights, batch, MemoryPlan(32, count, 0, 0), rates) for count in (0, 16, 32))
    assert kept < half < none < 1.6 * kept


def test_a_plan_gives_up_more_the_less_memory_there_is():
    peak = TrainingPeak(6 * GIB, 32, 1 * GIB, 0.2 * GIB, 0.1 * GIB)
    plans = {gib: expected_plan(peak, gib * GIB, 1000, "auto", 13 * GIB, True) for gib in (80, 45, 30, 10, 8, 7, 6)}
    assert plans[80].unpacked == 13 * GIB and not plans[80].checkpointed
    assert not plans[45].checkpointed and plans[45].unpacked == 0
    assert 0 < plans[30].checkpointed < 32 and plans[30].peak <= 30 * GIB
    assert plans[8].offloaded and not plans[8].tiled and plans[8].attends_once
    assert plans[7].tiled and fits(plans[7]) and not fits(plans[6])
    assert expected_plan(peak, 80 * GIB, 1000, True, 0, False).checkpointed == 32
    assert not fits(expected_plan(peak, 30 * GIB, 1000, False, 0, False))


# --- bad values


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["gpu=t5"], "gpu=t5: no such card is known here; did you mean gpu=t4"),
        (["gpu=h1000"], "did you mean gpu=h100"),
        (["gpu=banana"], "gpu=banana: no such card is known here; known: t4, l4"),
        (["gpu=[t4,l4]"], "no such card"),
        (["gpu=t4", "price_per_hour=-1"], "price_per_hour=-1: must be"),
        (["gpu=t4", "price_per_hour=cheap"], "price_per_hour=cheap: must be"),
        (["gpu=t4", "price_per_hour=true"], "price_per_hour=True: must be"),
        (["gpu=t4", "price_per_hour=inf"], "price_per_hour=inf: must be"),
        (["gpu=t4", "price_per_hour=nan"], "price_per_hour=nan: must be"),
        (["price_per_hour=1"], "price_per_hour: needs the card"),
        (["gpu=t4", "experiment=tiny_cpu"], "gpu=t4 plans a run on a GPU, but trainer.use_cpu is true"),
    ],
)
def test_a_bad_value_is_one_line(overrides, said):
    with pytest.raises(UserError, match=re.escape(said)):
        read_own_keys(composed(*overrides, name="doctor"))


def test_a_bad_value_is_bad_input(capsys):
    assert exit_code("gpu=t5") == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "did you mean gpu=t4" in said.err


def test_bfloat16_on_a_t4_is_refused_as_training_would_refuse_it():
    found, run = planned("gpu=t4", "trainer=ampere", "quant=nf4_bf16", *TINY)
    assert run is None and found["precision"].status == RED
    assert "trainer.bf16=true, but NVIDIA T4 (gpu=t4) has no bfloat16" in found["precision"].found
    assert found["precision"].remedy == "use trainer=t4_min100 quant=nf4_fp16"
    assert found["GPU memory"].remedy == "fix precision first"


def test_float16_on_a_card_with_bfloat16_is_told():
    found, run = planned("gpu=l4", *TINY)
    assert found["precision"].status == AMBER and "trainer=ampere quant=nf4_bf16" in found["precision"].remedy
    assert run.hours > 0


# --- whole plans


def test_steps_are_those_of_the_training_run(capsys):
    assert exit_code("gpu=t4", "format=json", "price_per_hour=2", *WHOLE) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["gpu"] == "t4" and plan["fits"] and plan["steps"] == 174  # docs/benchmarks.md: the default run
    assert 1900 < plan["tokens_per_step"] <= 2048 and plan["layers_checkpointed"] == 0
    low, high = plan["hours_range"]
    assert low < plan["hours"] < high and plan["price"] == pytest.approx(2 * plan["hours"])


def test_a_gated_base_is_planned_without_its_files(capsys):
    assert exit_code("gpu=t4", "logger=none", "model=llama3_8b") == 0  # the default model; tests have no network
    out = capsys.readouterr().out
    assert "8,030.3 million parameters" in out and "as published" in out
    table = out[out.index("| plan | t4 |") : out.index("\n\nEstimated from")]
    assert table in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert "| peak memory | about 12.3 GiB (within 16%): fits |" in table and "bytes per token" in table
    assert "none of them on this card: NVIDIA T4" in out


def test_a_base_that_nobody_knows_is_red():
    found, run = planned("gpu=t4", "logger=none", "model.pretrained_model_name_or_path=someone/something")
    assert run is None and found["model"].status == RED and found["Python"].status == GREEN


def test_a_run_that_does_not_fit_is_red_and_takes_no_time(capsys):
    arguments = ["gpu=t4", "logger=none", "model=llama3_8b", "quant=none", "format=json", "price_per_hour=1"]
    assert exit_code(*arguments) == 1
    told = json.loads(capsys.readouterr().out)
    lines = {line["name"]: line for line in told["checks"]}
    assert lines["GPU memory"]["status"] == RED and "does not fit" in lines["GPU memory"]["found"]
    assert "lower trainer.per_device_train_batch_size" in lines["GPU memory"]["remedy"]
    assert told["plan"]["fits"] is False and told["plan"]["hours"] is None and told["plan"]["price"] is None


def test_full_precision_has_no_estimate_of_time():
    values = ("trainer.fp16=false", "trainer.bf16=false", "quant.bnb_4bit_compute_dtype=float32")
    _, run = planned("gpu=t4", *values, *TINY)
    assert (
        run.hours is None and dict(plan_display.plan_rows(run))["time"] == "not estimated: its speed was never measured"
    )


def test_every_base_of_the_hub_has_its_shape():
    names = [OmegaConf.load(file).pretrained_model_name_or_path for file in (ROOT / "conf" / "model").glob("*.yaml")]
    assert {name for name in names if not (ROOT / name).exists()} <= SHAPES.keys()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, parameters):
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    assert model.num_parameters() == parameters


def test_batches_are_counted_with_and_without_padding():
    rows = ("trainer.packing=false", "trainer.per_device_train_batch_size=2")
    apart = pieces_of("gpu=t4", *rows, *TINY).planned_rows
    padded = pieces_of("gpu=t4", *rows, "model.attn_implementation=eager", *TINY).planned_rows
    assert apart.units == padded.units == 40
    assert padded.batch > apart.batch and padded.largest >= apart.largest and padded.row == apart.row < apart.batch
    assert 0.05 < apart.scored < 0.9 and not apart.basis


def test_long_data_are_sampled(monkeypatch):
    whole = pieces_of("gpu=t4", *WHOLE).planned_rows
    monkeypatch.setattr("intern.inspection.planned_rows.LONG_DATA", 300)
    part = pieces_of("gpu=t4", *WHOLE).planned_rows
    assert part.basis == "from 300 of 1,166 rows" and part.units == pytest.approx(whole.units, rel=0.1)


def test_tokens_are_estimated_from_the_bytes_of_texts(rows_file):
    row = {"question": "q" * 37, "answer": "ä" * 37, "chunk_text": "c" * 3700}
    path = rows_file(*(row | {"question": row["question"] + str(index)} for index in range(8)))
    values = ("trainer.packing=false", "data.context=never", f"data.train_file={path}", *TINY)
    pieces = pieces_of("gpu=t4", *values)
    found = count_batches(pieces.read_rows[0], pieces.data, pieces.tokenizer, pieces.prompt, pieces.args, is_own=False)
    assert found.batch == 40 and found.scored == pytest.approx(
        20 / 40
    )  # 10 + 20 + 10 of the template; the context is not shown
    assert "3.7 bytes per token" in found.basis


@pytest.fixture(scope="module")
def a_plan():
    return planned("gpu=4090", "price_per_hour=0.35", *TINY)[1]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_table_fits_any_terminal(width, a_plan, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=width)
    monkeypatch.setattr("intern.display.table.Console", lambda: terminal)
    monkeypatch.setattr("intern.inspection.plan_display.Console", lambda: terminal)
    show_plan(a_plan)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    assert max(map(len, lines)) <= width and "4090" in "".join(lines) and "estimated" in "".join(lines)


def test_the_page_says_the_errors_that_the_command_says():
    text = Path(ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert (
        f"Memory is within {MEMORY_ERROR * 100:.0f} %" in text
        and f"took {FASTEST:g} to {SLOWEST:g} times as long" in text
    )
