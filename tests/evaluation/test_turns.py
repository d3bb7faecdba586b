"""Every answer of a golden conversation is asked after the turns before it, and scored."""

import json
import shutil

import pytest
from helpers import composed

from intern.data.files import DataFile, read_rows
from intern.evaluation.evaluate import as_json, evaluate
from intern.evaluation.turns import each_answer
from intern.runs.directory import Run

PAIRS = [("Who leads Uber?", "Dara Khosrowshahi."), ("Since when?", "Since 2017."), ("And before?", "Travis Kalanick.")]
MESSAGES = [
    {"role": role, "content": text} for pair in PAIRS for role, text in zip(("user", "assistant"), pair, strict=True)
]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "talks.jsonl"
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES[:2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_conversation_is_one_row_for_each_answer_with_the_turns_before_it(golden):
    rows = each_answer(read_rows(DataFile.find(str(golden), "x"), False), "all")
    assert [(row["row"], row["turn"], row["question"], len(row["history"] or [])) for row in rows] == [
        (1, 1, PAIRS[0][0], 0),
        (1, 2, PAIRS[1][0], 1),
        (1, 3, PAIRS[2][0], 2),
        (2, 0, PAIRS[0][0], 0),
    ]


def test_only_the_last_answer_counts_if_only_it_was_learned(golden):
    rows = each_answer(read_rows(DataFile.find(str(golden), "x"), False), "last")
    assert [(row["row"], row["turn"]) for row in rows] == [(1, 0), (2, 0)]


def test_an_evaluation_scores_every_answer_and_finds_them_again(golden, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "wandb", "evaluation"))
    cfg = composed("generation.max_new_tokens=2", "resamples=100", f"eval_file={golden}", name="evaluate")
    first = evaluate(cfg, Run(tmp_path / "run"), None)
    assert [(row.number, row.turn, row.reference) for row in first.rows] == [
        *((1, turn, answer) for turn, (_, answer) in enumerate(PAIRS, 1)),
        (2, 0, PAIRS[0][1]),
    ]
    assert first.rows[0].after.loss == pytest.approx(first.rows[3].after.loss, rel=1e-5)  # the same question, alone
    assert as_json(first)["rows"] == 4
    written = (first.folder / "predictions.jsonl").read_bytes()
    assert written.count(b"\n") == 8
    evaluate(cfg, Run(tmp_path / "run"), None)
    assert (first.folder / "predictions.jsonl").read_bytes() == written
