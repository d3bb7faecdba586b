"""What is previewed is what is trained on, and a fault in the data shows as its line and exit code."""

import json
import math
import re
import shutil
import sys
from html import unescape
from io import StringIO

import datasets
import helpers
import numpy as np
import pytest
from helpers import ROOT
from rich.console import Console

from intern import preview as command
from intern.data.packing import build_collator
from intern.data.prompt import IGNORED
from intern.data.tokenize import Tokenized
from intern.errors import UserError
from intern.inspection.check import AMBER, GREEN, RED
from intern.inspection.duplicate_checks import NEAR
from intern.inspection.near_duplicates import NearTexts, words
from intern.inspection.preview import examine, look, prepare
from intern.inspection.preview_display import page, plain_rows, show_rows
from intern.inspection.token_checks import check_packing, check_tokens
from intern.runs.directory import Run
from intern.training.plan import build_plan
from intern.training.trainer import InternTrainer

TINY = "experiment=tiny_cpu"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def composed(*overrides, name="preview"):
    given = ["lengths=null"] if name == "preview" else []
    return helpers.composed(TINY, "data.context=never", *given, *overrides, name=name)


def row(question, answer="It rose 18%.", **others):
    return {"question": question, "answer": answer, "chunk_text": "Bookings rose 18%.", "chunk_id": "a"} | others


TRAIN = [
    row("How much did gross bookings grow in the year 2024?"),
    row("Who leads the company today?", "Its chief executive."),
    row("Which segment is the largest one by revenue?", "Mobility."),
]
GOLDEN = [row("What is sold in Freight?", "Loads.", chunk_id="b", chunk_text="Freight sells loads.", seen_chunk=False)]


@pytest.fixture
def files(rows_file):
    """Overrides for a training and a golden file of these rows."""

    def write(train=TRAIN, golden=GOLDEN):
        paths = rows_file(*train, name="train.jsonl"), rows_file(*golden, name="golden.jsonl")
        return [f"data.train_file={paths[0]}", f"data.eval_file={paths[1]}"]

    return write


def checks(*overrides):
    found = {check.name: check for check in look(prepare(composed(*overrides)), 1, None, None).checks}
    assert len(found) == 11
    return found


def test_good_rows_have_only_green_lines(files):
    assert {check.status for check in checks(*files()).values()} == {GREEN}


@pytest.mark.parametrize(
    ("train", "golden", "name", "status", "found"),
    [
        # a golden question that is a training question: written alike, and nearly alike
        ([row("WHAT is  sold in Freight?")], GOLDEN, "golden questions", RED, "1 of 1 golden rows are training rows: golden 1 = training 4"),
        ([row("What is then sold in Freight?")], GOLDEN, "near golden questions", AMBER, "1 of 1: golden 1 ~ training 4 (0.83)"),
        ([row("What then is usually sold in Freight?")], GOLDEN, "near golden questions", GREEN, ""),
        ([TRAIN[0]], GOLDEN, "same answer", AMBER, "1 row: 4"),
        ([row("who leads the company  TODAY?", "Another one.")], GOLDEN, "same question", AMBER, "1 row: 4"),
        ([row("Is this it?", "Is this it?")], GOLDEN, "odd fields", AMBER, "answer equal to its question (1 row: 4)"),
        ([row("Is it profitable, yes or no?", "Yes")], GOLDEN, "odd fields", AMBER, "answer contained in its question (1 row: 4)"),
        ([row("Is it rising fast?", "It\u001b[31m rose.")], GOLDEN, "odd fields", AMBER, "answer with control characters (1 row: 4)"),
        ([row("Is it rising fast?", "It rose 18\ufffd.")], GOLDEN, "odd fields", AMBER, "answer with replacement characters"),
        ([row("Is it rising<|eot_id|>?")], GOLDEN, "odd fields", AMBER, "question with the text of a special token"),
        ([row("Why?")], GOLDEN, "odd fields", AMBER, "question shorter than 8 characters (1 row: 4)"),
        ([row("What is the letter?", "B")], GOLDEN, "odd fields", AMBER, "answer shorter than 2 characters (1 row: 4)"),
        ([row("Tell it all, please?", "word " * 60)], GOLDEN, "odd fields", AMBER, "answer more than 10 times as long as the median (1 row: 4)"),
        ([row("Is it very long? " * 400)], GOLDEN, "fit", AMBER, "dropped 1 row: 4"),
        ([], [GOLDEN[0] | {"chunk_id": "a"}], "golden chunks", AMBER, "1 of 1 golden rows are on chunks that training has; seen_chunk is wrong in 1 row: 1"),
        ([], [GOLDEN[0] | {"chunk_text": "Bookings rose 18%."}], "golden chunks", AMBER, "seen_chunk is wrong"),
        ([], [GOLDEN[0] | {"chunk_id": "a", "seen_chunk": None}], "golden chunks", AMBER, "without seen_chunk: 1 row: 1"),
        ([], [GOLDEN[0] | {"chunk_id": "a", "seen_chunk": True}], "golden chunks", GREEN, "all marked seen_chunk"),
        ([], [GOLDEN[0] | {"seen_chunk": True}], "golden chunks", AMBER, "seen_chunk is wrong in 1 row: 1"),
    ],
)  # fmt: skip
def test_each_fault_has_its_line(files, train, golden, name, status, found):
    all_checks = checks(*files([*TRAIN, *train], golden))
    assert all_checks[name].status == status and found in all_checks[name].found, all_checks[name]
    assert bool(all_checks[name].remedy) == (status != GREEN)


def test_a_question_on_other_material_is_another_question(files):
    same = [row("What does it say?", "One thing."), row("What does it say?", "Another.", chunk_text="Other text.")]
    golden = [row("What does it say?", "A third.", chunk_text="Third text.", chunk_id="c", seen_chunk=False)]
    assert checks(*files(same, golden), "data.context=always")["same question"].status == GREEN
    assert checks(*files(same, golden), "data.context=always")["golden questions"].status == GREEN
    assert checks(*files(same, golden))["same question"].status == AMBER
    assert checks(*files(same, golden))["golden questions"].status == RED


def test_shortened_rows_are_counted_and_the_cut_tokens_shown_where_they_stood(files):
    long = row("How is it?", chunk_text="It rose 18%. " * 60 + "Its end.")
    material = prepare(composed(*files([*TRAIN, long]), "data.context=always", "trainer.max_length=200"))
    preview = look(material, 3, 4, None)
    [shown] = preview.rows
    assert shown.title == "train.jsonl:4" and "200 tokens" in shown.note and "cut off" in shown.note
    cut = "".join(piece.text for piece in shown.pieces if piece.cut)
    assert cut.endswith("Its end.") and {piece.kind for piece in shown.pieces if piece.cut} == {"material"}
    whole = "".join(piece.text for piece in shown.pieces)
    assert f"Material:\n{long['chunk_text']}\n\nQuestion: How is it?" in whole
    assert "material cut off" in plain_rows(preview)
    assert "shortened 1 row: 4" in {check.name: check for check in preview.checks}["fit"].found


def test_a_dropped_row_is_shown_as_dropped(files):
    [shown] = look(prepare(composed(*files([*TRAIN, row("Is it long? " * 400)]))), 1, 4, None).rows
    assert "dropped, longer than trainer.max_length=1,024" in shown.note
    assert not any(piece.loss for piece in shown.pieces)


def test_a_row_without_loss_on_its_end_of_turn_is_red(files):
    material = prepare(composed(*files()))

    def broken(row):
        return row | {"labels": [*row["labels"][:-1], IGNORED]}

    def check(change):
        rows = material.train.rows.map(change)
        tokens = Tokenized(rows, material.train.origins, [], 0)
        _, found = check_tokens(tokens, material.prompt, material.tokenizer, 1024)
        return {one.name: (one.status, one.found) for one in found}

    assert {status for status, _ in check(lambda row: row).values()} == {GREEN}
    status, found = check(broken)["end of turn"]
    assert status == RED and "3 rows: 1, 2, 3" in found
    assert check(lambda row: row | {"labels": row["input_ids"]})["loss mask"][0] == RED
    assert (
        check(lambda row: row | {"input_ids": [0, *row["input_ids"]], "labels": [IGNORED, *row["labels"]]})["BOS"][0]
        == RED
    )


def test_a_template_without_bos_is_red_and_exit_code_1(files, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "data/tiny_llama3", base)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", "").replace("{{- bos_token }}", ""))
    overrides = [*files(), f"model.pretrained_model_name_or_path={base}"]
    assert checks(*overrides)["BOS"].status == RED
    assert exit_code(TINY, "lengths=null", *overrides) == 1


def exit_code(*arguments):
    """What the command's process would end with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["preview", *map(str, arguments)])
        try:
            command.main()
        except SystemExit as end:
            return end.code
    return 0


def test_exit_codes_tell_good_from_faulty_from_unreadable(files, tmp_path, capsys):
    picture, target = tmp_path / "new/lengths.png", tmp_path / "new/preview.html"
    assert exit_code(TINY, *files(), f"lengths={picture}", f"html={target}", "rows=2") == 0
    said = capsys.readouterr()
    assert said.out.count("## train.jsonl:") == 2 and "11 green" in said.out
    assert said.err == f"wrote {picture}\nwrote {target}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert exit_code(TINY, *files([*TRAIN, GOLDEN[0]]), "lengths=null") == 1
    assert "preview: 1 of 11 checks red: golden questions" in capsys.readouterr().err
    assert exit_code(TINY, *files([*TRAIN, "{"]), "lengths=null") == 2
    assert "train.jsonl:4: not JSON" in capsys.readouterr().err
    assert exit_code(TINY, *files(), "row=9", "lengths=null") == 2
    assert "row=9: train.jsonl has no row on this line (its last is 3)" in capsys.readouterr().err
    assert exit_code(TINY, "rows=x") == 2


@pytest.mark.parametrize("packing", ["true", "false"])
def test_what_is_shown_is_what_the_trainers_collator_gives(packing, tmp_path):
    overrides = [
        f"trainer.packing={packing}",
        "trainer.per_device_train_batch_size=2",
        "data.context=mixed",
        "trainer.max_length=300",
    ]
    material = prepare(composed(*overrides))
    cfg = composed(*overrides, name="train")
    plan = build_plan(cfg, Run(tmp_path))
    model = plan.base.load(plan.quant, plan.precision)
    trainer = InternTrainer(
        rules=plan.rules, model=model, args=plan.args, train_dataset=plan.train.rows, processing_class=plan.tokenizer, peft_config=plan.lora
    )  # fmt: skip
    assert material.packs.to_list() == trainer.train_dataset.to_list()
    assert material.packs._fingerprint == trainer.train_dataset._fingerprint  # so training finds them in the cache
    ours, theirs = build_collator(material.args, material.tokenizer), trainer.data_collator.collate
    assert ours == theirs
    batch = theirs([trainer.train_dataset[0], trainer.train_dataset[1]])
    again = ours([material.packs[0], material.packs[1]])
    assert batch.keys() == again.keys()
    tokens = sum(len(trainer.train_dataset[row]["input_ids"]) for row in (0, 1))
    assert batch["input_ids"].shape == (1, tokens)  # no padding
    assert plan.args.max_length == 300
    assert all(np.array_equal(batch[key], again[key]) for key in batch)
    # Every token of a shown row stands in the batch that the trainer makes of it, at the place that is shown, with the same loss.
    for number in (1, 7):
        preview = look(material, 1, number, None)
        [segment] = [one for one in preview.batch.segments if one.row == str(number)] or [None]
        if packing == "false" and number == 7:
            assert segment is None  # it is not in the first batch
            continue
        places = [place for place, one in enumerate(trainer.train_dataset) if contains(one["input_ids"], preview)]
        batch = theirs([trainer.train_dataset[places[0]]])
        ids = batch["input_ids"][0, segment.start : segment.end].tolist()
        labels = batch["labels"][0, segment.start : segment.end].tolist()
        shown = [piece for piece in preview.rows[0].pieces if not piece.cut]
        assert [token for piece in shown for token in piece.ids] == ids
        assert [piece.loss for piece in shown for _ in piece.ids] == [label != IGNORED for label in labels]
        if packing == "true":
            positions = batch["position_ids"][0, segment.start : segment.end].tolist()
            assert positions == list(range(len(ids)))  # they begin anew in every row
            assert segment.start in batch["cu_seq_lens_q"].tolist()


def contains(ids, preview):
    row = [token for piece in preview.rows[0].pieces if not piece.cut for token in piece.ids]
    return any(ids[start : start + len(row)] == row for start in range(len(ids) - len(row) + 1))


def test_packing_that_loses_tokens_is_red(files):
    material = prepare(composed(*files()))
    lengths, _ = check_tokens(material.train, material.prompt, material.tokenizer, 1024)
    assert check_packing(material.packs, lengths, material.args)[1].status == GREEN
    shorter = material.packs.map(lambda pack: {name: pack[name][:-1] for name in ("input_ids", "labels")})
    _, check = check_packing(shorter, lengths, material.args)
    assert check.status == RED and "1 of" in check.found


def test_lengths_are_those_of_the_rows(files):
    material = prepare(composed())
    lengths, _ = check_tokens(material.train, material.prompt, material.tokenizer, 1024)
    every = sorted(len(row["input_ids"]) for row in material.train.rows)
    assert lengths.tokens == sum(every) and lengths.rows == len(every)
    assert [lengths.percentile(percent) for percent in (50, 90, 99, 100)] == [
        every[math.ceil(len(every) * percent / 100) - 1] for percent in (50, 90, 99, 100)
    ]
    with_loss = sum(label != IGNORED for row in material.train.rows for label in row["labels"])
    assert lengths.tokens_with_loss == with_loss


def test_near_texts_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(7)
    vocabulary = [f"w{number}" for number in range(30)]

    def text():
        return " ".join(rng.choice(vocabulary, size=rng.integers(1, 9)))

    indexed, asked = [text() for _ in range(300)], [text() + rng.choice(["", " new", " x y z"]) for _ in range(300)]
    index = NearTexts(indexed, NEAR)
    found = {(place, one) for one, ask in enumerate(asked) for place, _ in index.near(ask)}
    wanted = {
        (place, one)
        for place, text in enumerate(indexed)
        for one, ask in enumerate(asked)
        if len(words(text) & words(ask)) >= NEAR * len(words(text) | words(ask))
    }
    assert len(wanted) > 20 and found == wanted
    assert index.near("?!") == [] and NearTexts(["?!"], NEAR).near("?!") == []


def test_a_page_and_a_terminal_obey_nothing_that_stands_in_the_data(files):
    material = prepare(composed(*files([row("<script>alert(1)</script>\u001b[31m\u202e|", "<b>&amp;\u009b2J")])))
    preview = look(material, 1, None, None)
    html = page(preview, "<title>")
    assert not re.search(r"<script|<b>|https?:|\bsrc=", html) and "&lt;title&gt;" in html
    assert "<script>alert(1)</script>" in unescape(re.sub(r"<[^>]+>", "", html))
    terminal = Console(force_terminal=True, width=200, record=True, file=StringIO())
    show_rows(preview, terminal)
    text = terminal.export_text()
    assert not any({"\x1b", "\u202e", "\x9b"} & set(told) for told in (html, plain_rows(preview), text))
    assert "\\x1b" in text and "\\x1b" in html
    # In a pipe each token is a JSON string: what stands in one can be had back exactly.
    [line] = [line for line in plain_rows(preview).splitlines() if line.strip().startswith("question")]
    decoder, tokens, rest = json.JSONDecoder(), [], line.partition(": ")[2]
    while rest:
        token, end = decoder.raw_decode(rest)
        tokens, rest = [*tokens, token], rest[end:].strip()
    assert "".join(tokens) == "<script>alert(1)</script>\u001b[31m\u202e|"


def test_a_character_of_several_tokens_is_shown_whole(files):
    [shown] = look(prepare(composed(*files([row("Wie groß ist 🚕 heute?")]))), 1, None, None).rows
    assert "🚕" in [piece.text.strip() for piece in shown.pieces] and "\ufffd" not in "".join(
        p.text for p in shown.pieces
    )


def test_preview_composes_the_groups_of_train():
    assert composed().keys() - composed(name="train").keys() == {"rows", "row", "html", "lengths"}


def test_packs_that_stay_empty_are_named(files):
    rows = [row("How much? " * 60 + str(number)) for number in range(4)]
    assert "4 rows in 4 packs" in checks(*files(rows), "trainer.max_length=500")["packing"].found
    assert checks(*files(rows), "trainer.max_length=500")["packing"].status == AMBER


def test_examine_shows_and_returns_the_checks(files, capsys):
    found = examine(composed(*files(), "rows=0"), Console())
    shown = capsys.readouterr().out
    assert (
        len(found) == 11
        and shown.startswith("train.jsonl: ")
        and " rows, qa (question, answer" in shown.split("\n")[0]
        and "## train.jsonl:" not in shown
    )
    with pytest.raises(UserError, match="rows=-1: must be a whole number"):
        examine(composed("rows=-1"), Console())
