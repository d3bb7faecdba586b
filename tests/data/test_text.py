"""One definition of the same text: what the preview calls a leak, the evaluation calls trained on."""

import pytest
from omegaconf import OmegaConf

from intern.data.files import DataFile, read_rows
from intern.data.text import comparable
from intern.evaluation.contamination import find_overlap
from intern.inspection.duplicate_checks import check_duplicates, check_leaks
from intern.inspection.near_duplicates import words
from intern.runs.directory import Run


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Straße", "STRASSE", True),
        ("ΟΔΟΣ", "οδος", True),
        ("caf\u00e9", "CAFE\u0301", True),
        ("  two\n\twords ", "Two words", True),
        ("ﬁne", "fine", True),
        ("cafe", "caf\u00e9", False),
        ("a b", "ab", False),
    ],
)
def test_texts_are_the_same_whatever_their_case_and_whitespace(one, other, same):
    assert (comparable(one) == comparable(other)) is same


@pytest.mark.parametrize(
    ("golden", "training"),
    [("Wie lang ist die Straße?", "WIE LANG IST DIE STRASSE?"), ("Où est le café?", "où est le cafe\u0301?")],
)
def test_preview_and_evaluation_agree_on_what_training_has_seen(rows_file, tmp_path, golden, training):
    row = {"question": golden, "answer": "Fünf Meter.", "chunk_text": "Die Straße ist fünf Meter lang."}
    train = rows_file(row | {"question": training}, name="train.jsonl")
    rows = read_rows(DataFile.find(str(rows_file(row, name="golden.jsonl")), "eval_file"), needs_material=False)
    file = DataFile.find(str(train), "data.train_file")
    trained = read_rows(file, needs_material=False)

    assert "1 of 1 golden rows are training rows" in check_leaks(trained, rows, shows_context=False)[0].found
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.write_config(OmegaConf.create({"data": {"train_file": str(train)}}))
    run.write_json(run.environment, {"data": {str(train): file.sha256}})
    assert find_overlap(run, rows, None).rows == [True]
    assert words(golden) == words(training)


def test_a_question_asked_twice_is_found_in_another_case(rows_file):
    row = {"question": "Wie lang ist die Straße?", "answer": "Fünf Meter."}
    rows = rows_file(row, row | {"question": "WIE LANG IST DIE STRASSE?"})
    checks = check_duplicates(read_rows(DataFile.find(str(rows), "eval_file"), needs_material=False), False)
    assert "1 row: 2" in checks[0].found
