"""The end of a run says what came of it, what is doubtful about it, and what to type next."""

import json
import logging
import shlex
from types import SimpleNamespace

import pytest
from helpers import ROOT, composed, train

from intern.runs.directory import Run
from intern.training import golden_loss
from intern.training.outcome import next_commands, result_lines, warn_after_training, warn_before_training
from intern.training.plan import build_plan

METRICS = {
    "optimizer_steps": 100,
    "skipped_steps": 2,
    "epochs": 1.37,
    "train_loss": 1.5,
    "train_tokens": 204_800,
    "train_seconds": 512.3,
    "tokens_per_second": 399.8,
    "peak_host_rss_gib": 5.0,
    "peak_gpu_gib": 7.62,
    "best_step": None,
}
GOLDEN = {"eval_loss": 1.2, "eval_loss_low": 1.1, "eval_loss_high": 1.3, "base_eval_loss": 2.4, "eval_rows": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps on ten rows, scored on the same ten rows, and the messages of it and of a second one."""
    folder = tmp_path_factory.mktemp("outcome")
    lines = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[::110][:10]
    (folder / "mine.jsonl").write_text("".join(lines), encoding="utf-8")
    given = (
        f"data.train_file={folder}/mine.jsonl",
        f"data.eval_file={folder}/mine.jsonl",
        "trainer.eval_strategy=steps",
    )
    steps = (
        "trainer.max_steps=12",
        "trainer.min_steps=12",
        "trainer.eval_steps=6",
        "trainer.packing=false",
        "name=ten rows",
    )
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("intern")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(golden_loss, "_STORED", folder / "stored")
            done = train(folder / "run", *given, *steps, "trainer.per_device_train_batch_size=10")
            first = list(messages)
            train(folder / "again", *given, *steps, "trainer.per_device_train_batch_size=10", "lora.r=4")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return done, first, messages[len(first) :]


def test_the_golden_loss_is_told_with_its_interval_and_next_to_the_bases(run):
    done, messages, _ = run
    metrics = done.read_json(done.metrics)
    assert metrics["eval_loss_low"] < metrics["eval_loss"] < metrics["eval_loss_high"]
    assert metrics["eval_loss"] < metrics["base_eval_loss"] < 9 and metrics["epochs"] == 12
    said = [message for _, message in messages]
    assert f"saved ten rows ({done.path})" in said
    assert any(
        line.startswith(f"golden loss {metrics['eval_loss']:.3f} [") and "10 rows of mine.jsonl" in line
        for line in said
    )
    assert "12 steps (12 epochs), " in " ".join(said)
    assert said[-3].startswith(f'next: python -m intern.query run_dir={done.path} question="')


def test_the_base_is_scored_once_for_the_same_golden_rows(run):
    done, first, second = run
    note = ("INFO", "scoring them with the base too, to compare with")
    assert note in first and note not in second
    again = Run(done.path.parent / "again")
    assert again.read_json(again.metrics)["base_eval_loss"] == done.read_json(done.metrics)["base_eval_loss"]


def test_few_rows_many_times_and_golden_rows_that_are_trained_on_are_warned_of(run):
    warnings = [message for level, message in run[1] if level == "WARNING"]
    assert warnings[:2] == [
        "12 steps over 10 training rows are 12 epochs: the model will repeat the rows rather than learn from them; "
        "use more rows, or trainer.min_steps=3 trainer.max_steps=3 for 3 epochs",
        "data.eval_file is also trained on (mine.jsonl): the golden loss will show what the model repeats, not what it has learned; "
        "data.eval_file=null data.eval_share=0.1 holds rows out",
    ]


def test_a_warm_up_without_an_end_and_a_learning_rate_of_nothing_are_warned_of(tmp_path, caplog):
    given = ("data.eval_file=null", "trainer.max_steps=40", "trainer.min_steps=3", "data.context=never")
    for values, said in (
        (
            ("trainer.warmup_steps=40",),
            "trainer.warmup_steps=40: training ends after 40 steps, before the learning rate",
        ),
        (("trainer.learning_rate=0",), "trainer.learning_rate=0: the adapter stays as it is"),
        ((), None),
    ):
        plan = build_plan(composed("experiment=tiny_cpu", *given, *values), Run(tmp_path))
        caplog.clear()
        warn_before_training(SimpleNamespace(train_dataset=plan.train.rows), plan)
        assert (said in caplog.text) if said else caplog.text == ""


def test_the_result_of_a_run_in_words():
    assert list(result_lines(METRICS | GOLDEN, "golden.jsonl")) == [
        "golden loss 1.200 [1.100, 1.300] on 64 rows of golden.jsonl; the base's is 2.400 (-50%)",
        "100 steps (1.4 epochs, 2 more skipped by fp16), 204,800 tokens in 512 s (400 tokens/s), at most 7.6 GiB of GPU memory",
    ]
    assert " on 64 held-out rows of a.jsonl; " in next(result_lines(METRICS | GOLDEN, "held-out rows of a.jsonl"))
    few = METRICS | GOLDEN | {"eval_rows": 1, "eval_loss_low": None, "eval_loss_high": None, "base_eval_loss": None}
    assert next(result_lines(few, "g")) == "golden loss 1.200 on 1 rows of g, fewer than 30 and too few to rely on"
    assert next(result_lines(METRICS, None)).startswith("training loss 1.500; what was learned is not measured")


@pytest.mark.parametrize(
    ("losses", "more", "warned"),
    [
        ([2.0, 1.5, 1.6], {}, "the golden loss rose since step 20: 1.500 there, 1.600 at step 30"),
        ([2.0, 1.5, 1.501], {}, None),
        ([2.0, 1.5, 1.6], {"best_step": 20}, None),
        ([2.0], {"eval_loss": 2.5}, "the golden loss is higher than the base's"),
    ],
)
def test_a_golden_loss_that_rose_is_warned_of(losses, more, warned, caplog):
    history = [{"step": 10 * (1 + index), "eval_loss": loss} for index, loss in enumerate(losses)]
    warn_after_training(METRICS | GOLDEN | more, history)
    assert len(caplog.messages) == (1 if warned else 0)
    assert not warned or caplog.messages[0].startswith(warned)


@pytest.mark.parametrize("question", ["What's new?", 'Say "no" to $HOME `x` \\ !1', "a" * 300, "two\nlines"])
def test_the_next_commands_are_single_lines_that_a_shell_reads_as_they_are_meant(question, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = next_commands(Run(tmp_path / "it's" / "0"), question, needs_context=True)
    words = [shlex.split(command) for command in commands]
    asked = question if len(question) <= 200 and "\n" not in question else "..."
    assert words[0] == ["python", "-m", "intern.query", "run_dir=it's/0", f"question={asked}", "context=..."]
    assert [line[3:] for line in words[1:]] == [["run_dir=it's/0"], ["runs=it's"]]
    assert next_commands(Run(tmp_path / "outputs/day/time"), question, False)[2] == "python -m intern.compare"


def test_stored_losses_that_cannot_be_read_or_written_stop_nothing(tmp_path):
    golden_loss._store(tmp_path / "full" / "a.json", [(1.0, 2)])
    assert json.loads((tmp_path / "full" / "a.json").read_text()) == [[1.0, 2]]
    (tmp_path / "file").write_text("")
    golden_loss._store(tmp_path / "file" / "a.json", [(1.0, 2)])  # its folder cannot be made
