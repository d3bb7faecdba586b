"""A conversation file without golden rows, from the file to scores and a resumed run."""

import json

import pytest
from helpers import composed, train
from omegaconf import OmegaConf

from intern.errors import UserError
from intern.evaluation.evaluate import evaluate
from intern.inspection.preview import look, prepare
from intern.training.resume import check_same


def talk(number):
    texts = ("Hi!", "Hello.", f"What is the number of shop {number}?", f"It is {number}.")
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)]


@pytest.fixture
def settings(rows_file):
    path = rows_file(*({"messages": talk(number), "chunk_id": number // 2} for number in range(40)), name="talk.jsonl")
    return [f"data.train_file={path}", "data.eval_file=auto", "data.eval_share=0.2", "data.context=never"]


def test_a_conversation_file_is_trained_on_scored_and_previewed(settings, tmp_path, caplog):
    caplog.set_level("INFO")
    few = ["trainer.max_steps=2", "trainer.min_steps=0", "trainer.save_steps=1", "trainer.eval_strategy=steps"]
    run = train(tmp_path / "run", *settings, *few, "trainer.eval_steps=2", "trainer.eval_answers=2")
    assert (
        "talk.jsonl: 32 rows, messages (messages, document: chunk_id); held-out rows of talk.jsonl: 8 golden rows"
        in caplog.text
    )
    metrics = run.read_json(run.metrics)
    assert (metrics["train_rows"], metrics["eval_rows"]) == (32, 8)
    stored = run.read_config().data
    assert (stored.eval_share, stored.eval_file, stored.system_prompt) == (0.2, None, "")

    cfg = composed("name=first", "generation.max_new_tokens=2", "batch_size=4", "resamples=100", name="evaluate")
    evaluation = evaluate(cfg, run, None)
    # Both answers of each conversation are scored; all conversations, the trained ones too, begin with the same greeting.
    greetings = [row for row in evaluation.rows if row.question == "Hi!"]
    last = [row for row in evaluation.rows if row.question != "Hi!"]
    assert len(greetings) == len(last) == 8 and len(evaluation.rows) == 16
    assert evaluation.overlap.told_by.startswith("By content, against the 32 rows")
    assert all(row.trained for row in greetings) and not any(row.trained for row in last)
    [prediction] = [row.before.prediction for row in last if row.reference == last[0].reference]
    assert prediction.loss is not None

    material = prepare(composed("experiment=tiny_cpu", *settings, name="preview"))
    preview = look(material, 1, None, None)
    assert material.data.found.startswith("talk.jsonl: 32 rows, messages")
    assert {check.name: check.status for check in preview.checks}["loss mask"] == "green"
    [row] = preview.rows
    assert sum(piece.loss for piece in row.pieces) > 4 and "Hello." in "".join(piece.text for piece in row.pieces)


def test_a_run_from_before_a_key_was_there_is_the_same_run(settings, tmp_path):
    cfg = OmegaConf.to_container(composed("experiment=tiny_cpu", *settings[:1]), resolve=True)
    cfg["data"] |= {"eval_file": None, "system_prompt": ""}
    del cfg["data"]["sample"]
    old = json.loads(json.dumps(cfg))
    for key in ("format", "columns", "loss_on", "eval_share", "weights", "max_rows", "seed", "split", "streaming"):
        del old["data"][key]
    from intern.runs.directory import Run

    run = Run(tmp_path)
    run.write_config(OmegaConf.create(old))
    run.write_json(run.environment, {"data": {}})
    check_same(OmegaConf.create(cfg), run, {})
    cfg["data"]["loss_on"] = "last"
    with pytest.raises(UserError, match="data.loss_on differs from what"):
        check_same(OmegaConf.create(cfg), run, {})
