"""Rows are read, checked and tokenized; a fault is named by file and row."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from intern.data.files import DataFile, checked_row, read_rows
from intern.data.prompt import IGNORED, Prompt
from intern.data.tokenize import tokenize
from intern.errors import UserError

GOOD = {"question": "How much?", "answer": "18%.", "chunk_text": "It rose 18%."}


def read(path, needs_material=False):
    return read_rows(DataFile.find(str(path), "data.train_file"), needs_material)


def test_good_rows_arrive_with_their_row_numbers(rows_file):
    rows = read(rows_file(GOOD, "", GOOD | {"question": "Why?", "topic": "bookings", "extra": [1, {"a": 2}]}))
    assert list(rows["row"]) == [1, 3]
    assert list(rows["question"]) == ["How much?", "Why?"]
    assert list(rows["topic"]) == [None, "bookings"]


def test_material_may_be_missing_where_it_is_not_shown(rows_file):
    path = rows_file({"question": "q", "answer": "a"})
    assert len(read(path)) == 1
    with pytest.raises(UserError, match=r"rows.jsonl:1: field 'chunk_text' is missing"):
        read(path, needs_material=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "a JSON list"),
        ('"text"', "a JSON str"),
        (json.dumps({"answer": "a"}), "field 'question' is missing"),
        (json.dumps({"question": "q"}), "field 'answer' is missing"),
        (json.dumps({"question": "q", "answer": None}), "field 'answer' is missing"),
        (json.dumps({"question": "q", "answer": "  "}), "field 'answer' is empty"),
        (json.dumps({"question": True, "answer": "a"}), "field 'question' is bool, not text"),
        (json.dumps({"question": "q", "answer": ["a"]}), "field 'answer' is list, not text"),
        (json.dumps({"question": "q", "answer": "a", "chunk_text": {}}), "field 'chunk_text' is dict"),
        (json.dumps({"question": "q", "answer": "a", "seen_chunk": "yes"}), "field 'seen_chunk' is str"),
        ('{"question": "q", "answer": "half \\ud83d"}', "half a surrogate pair"),
        ('{"question": "q", "answer": "a\\u0000b"}', "NUL"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(rows_file, bad, message):
    path = rows_file(GOOD, GOOD, bad)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_is_named():
    with pytest.raises(UserError, match=r"here:1: not UTF-8 \(byte 14\)"):
        checked_row(b'{"question": "\xff"}', "here:1", False)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read(path)) == 1


@pytest.mark.parametrize("rows", [(), ("", "  ")])
def test_a_file_without_rows_is_named(rows_file, rows):
    with pytest.raises(UserError, match="has no rows"):
        read(rows_file(*rows))


def test_a_missing_file_is_named_with_its_key():
    with pytest.raises(UserError, match=r"data.train_file=nowhere.jsonl: no such file"):
        DataFile.find("nowhere.jsonl", "data.train_file")


def test_a_changed_file_is_read_anew(rows_file):
    assert len(read(rows_file(GOOD))) == 1
    assert len(read(rows_file(GOOD, GOOD))) == 2


def test_tokenized_rows_follow_the_context_mode(rows_file, tokenizer):
    rows = read(rows_file(*[GOOD | {"question": f"How much {number}?"} for number in range(40)]))
    lengths = {}
    for context in ("never", "mixed", "always"):
        prompt = Prompt.from_tokenizer(tokenizer, "Be brief.", context)
        tokens = tokenize(rows, tokenizer, prompt, 512, None)
        shown = ["It rose" in tokenizer.decode(ids) for ids in tokens.rows["input_ids"]]
        lengths[context] = sum(shown)
        assert all(
            label in (IGNORED, token)
            for row in tokens.rows
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
        )
    assert lengths["never"] == 0 and lengths["always"] == 40 and 8 < lengths["mixed"] < 32


def test_rows_that_do_not_fit_are_dropped_counted_and_named(rows_file, tokenizer, caplog):
    rows = read(
        rows_file(GOOD, GOOD | {"question": "word " * 300}, GOOD | {"chunk_text": "It rose 18%. " * 100}),
        needs_material=True,
    )
    prompt = Prompt.from_tokenizer(tokenizer, "Be brief.", "always")
    tokens = tokenize(rows, tokenizer, prompt, 200, None, "my.jsonl")
    assert (len(tokens.rows), tokens.dropped, tokens.shortened) == (2, [2], 1)
    assert max(map(len, tokens.rows["input_ids"])) == 200
    assert "my.jsonl: 1 rows dropped" in caplog.text and "rows 2" in caplog.text
    assert "1 rows lost the end of their context" in caplog.text


def test_no_row_that_fits_is_an_error(rows_file, tokenizer):
    rows = read(rows_file(GOOD))
    with pytest.raises(UserError, match="trainer.max_length=10: no row of rows fits"):
        tokenize(rows, tokenizer, Prompt.from_tokenizer(tokenizer, "Be brief.", "never"), 10, None)


def test_parallel_tokenizing_gives_the_same_rows_and_leaves_the_environment(rows_file, tokenizer):
    environment = os.environ
    rows = read(rows_file(*[GOOD | {"question": f"How much {number}?"} for number in range(50)]))
    one = tokenize(rows, tokenizer, Prompt.from_tokenizer(tokenizer, "Be brief.", "never"), 512, 1)
    two = tokenize(rows, tokenizer, Prompt.from_tokenizer(tokenizer, "Be very brief.", "never"), 512, 2)
    again = tokenize(rows, tokenizer, Prompt.from_tokenizer(tokenizer, "Be very brief.", "never"), 512, 1)
    assert two.rows.to_list() == again.rows.to_list()
    assert one.rows.to_list() != two.rows.to_list()
    assert os.environ is environment  # datasets leaves a copy in its place, which a library that holds it never sees


def test_the_sample_data_keeps_its_promises():
    checked = subprocess.run(
        [sys.executable, "scripts/check_data.py", "data/train.jsonl", "data/golden_test_set.jsonl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    words = checked.stdout.split()
    assert int(words[0]) >= 350 and int(words[3]) >= 80 and "no fault" in checked.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "It rose 19%."}, "numbers of the answer that its chunk does not have: 19"),
        ({"answer": ""}, "answer is missing"),
        ({"question": "Why?"}, "question has 1 words"),
        ({"chunk_text": "Too short 18."}, "chunk_text has 3 words"),
        ({"question": "How much did it rise in\u0000 2024?"}, "not clean text"),
    ],
)
def test_the_data_check_finds_a_faulty_row(change, message):
    sys.path.insert(0, str(ROOT / "scripts"))
    import check_data

    row = {
        "question": "How much did it rise in 2024?",
        "answer": "It rose 18%.",
        "chunk_text": "It rose 18%. " + "word " * 70,
        "chunk_id": "a-1",
        "topic": "a",
    }
    row["chunk_text"] = row["chunk_text"].strip()
    assert check_data.row_faults(row) == []
    assert any(message in fault for fault in check_data.row_faults(row | change))


def test_the_data_check_finds_faults_between_rows():
    sys.path.insert(0, str(ROOT / "scripts"))
    import check_data

    def row(question, chunk, seen=None):
        return {"question": question, "answer": "a", "chunk_text": f"text {chunk}", "chunk_id": chunk, "topic": "t"} | (
            {} if seen is None else {"seen_chunk": seen}
        )

    train = [row("How much did bookings grow in 2024?", "a"), row("Who leads?", "b")]
    assert check_data.set_faults(train, [row("What is sold?", "c", False)]) == []
    assert (
        "is near training question"
        in check_data.set_faults(train, [row("How much did the bookings grow in 2024?", "c", False)])[0]
    )
    assert "marked wrongly" in check_data.set_faults(train, [row("What is sold?", "a", False)])[0]
    assert "rows ask: who leads?" in check_data.set_faults(train, [row("who leads?", "c", False)])[0]
    other = row("What else?", "a") | {"chunk_text": "changed"}
    assert "has two texts" in check_data.set_faults([*train, other], [])[0]
