"""Base against adapter, and run against run: repeatable, resumable, labelled with what training saw, and safe to open."""

import errno
import json
import math
import os
import re
import shutil

import pytest
import torch
from helpers import ROOT, Server, command
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from intern.comparison.groups import read_runs
from intern.comparison.table import table
from intern.data.files import DataFile, read_rows
from intern.errors import RunError, UserError
from intern.evaluation.contamination import find_overlap
from intern.evaluation.evaluate import as_json, evaluate
from intern.evaluation.metrics import METRICS, Answer, Metric, Place, mean_score, training_metrics
from intern.evaluation.predictions import Predictions
from intern.evaluation.report import write_report
from intern.evaluation.report_view import notes
from intern.evaluation.terminal import show_evaluation
from intern.evaluation.text_scores import exact_match, rouge_l, token_f1
from intern.inference.answer import Intern
from intern.inference.losses import answer_losses
from intern.paths import CONF_DIR
from intern.runs.directory import Run
from intern.runs.disk import explain_disk_errors

HOSTILE = (
    "<script>alert('x')</script> ![p](http://example.org/p.png) | [l](javascript:x) <img src=x onerror=y> & `c` $\\x$"
)
REFUSAL = "The material does not say."


def configured(*overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(
            "evaluate", overrides=["generation.max_new_tokens=6", "resamples=200", "batch_size=4", *overrides]
        )


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A copy that may be written into."""
    target = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained_run, target, ignore=shutil.ignore_patterns("checkpoints", "wandb", "evaluation"))
    return Run(target)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Three rows of training, three on its chunks, three on others, one hostile one."""
    train = lines(ROOT / "data/train.jsonl")[:3]
    shipped = lines(ROOT / "data/golden_test_set.jsonl")
    rows = (
        train
        + [row for row in shipped if row["seen_chunk"]][:3]
        + [row for row in shipped if not row["seen_chunk"]][:3]
    )
    rows[3] = rows[3] | {"answer": REFUSAL}
    rows.append({"question": HOSTILE, "answer": HOSTILE, "chunk_text": HOSTILE, "topic": HOSTILE})
    path = tmp_path_factory.mktemp("golden") / "small.jsonl"
    path.write_text("".join(json.dumps({**row, "seen_chunk": None}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def first(run, golden):
    return evaluate(configured(f"eval_file={golden}", "name=first"), run, None)


def without_times(evaluation):
    metrics = as_json(evaluation)
    for model in metrics["models"]:
        del model["seconds"], model["tokens_per_second"]
    return metrics


def test_the_answer_loss_is_the_models_own_on_the_answer_alone(trained_run):
    intern = Intern(Run(trained_run), {"max_new_tokens": 8})
    rows = intern.prompt.encode(
        intern.tokenizer, ["Why?", "How much did it grow in the year?"], ["So.", "It grew 18% as reported."]
    )
    inputs = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    together = answer_losses(intern.model, inputs, intern.tokenizer.pad_token_id)
    for row, (loss, tokens) in zip(rows, together, strict=True):
        expected = intern.model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
        assert tokens == sum(label != -100 for label in row.labels)
        assert math.isclose(loss / tokens, expected, rel_tol=1e-4)


def test_the_command_compares_base_and_adapter_on_both_halves(run, tmp_path):
    done = command("intern.evaluate", f"run_dir={run.path}", "generation.max_new_tokens=16", cwd=tmp_path)
    folder = run.evaluation / "golden_test_set"
    printed = done.stdout.splitlines()
    assert printed[5:] == ["", f"report: {folder / 'report.html'}"] and done.stderr.count("\n") == 1
    assert "was trained elsewhere" in done.stderr  # a copy of the run
    assert [line.split(" |")[0] for line in printed[2:5]] == [
        "| all (64)",
        "| on chunks that training saw (32)",
        "| on chunks that it never saw (32)",
    ]
    for line in printed[2:5]:
        base, adapter = (float(cell) for cell in line.split(" | ")[1:3])
        assert adapter < base
    metrics = run.read_json(run.metrics)
    assert f"{metrics['eval_loss']:.2f}" == printed[2].split(" | ")[2]
    assert list(tmp_path.iterdir()) == []
    made = {path.name for path in folder.iterdir()}
    plots = {"scores.png", "rows.png", "topics.png", "scores_narrow.png", "topics_narrow.png"}
    assert made == {"inputs.json", "predictions.jsonl", "metrics.json", "report.md", "report.html", *plots}
    kept = [(one["row"], one["model"]) for one in lines(folder / "predictions.jsonl")]
    assert kept == [(row, model) for row in range(1, 65) for model in ("base", "adapter")]


def test_scores_are_means_over_the_rows_of_the_answers_that_are_kept(first):
    answers = {(one["row"], one["model"]): one for one in lines(first.folder / "predictions.jsonl")}
    rows = lines(first.file.path)
    everything = first.groups[0]
    for name, score in (("token_f1", token_f1), ("rouge_l", rouge_l), ("exact_match", exact_match)):
        mean = sum(score(answers[n, "adapter"]["answer"], row["answer"]) for n, row in enumerate(rows, 1)) / len(rows)
        assert math.isclose(everything.scores[name].after.value, mean)
    of_base = [one for one in answers.values() if one["model"] == "base"]
    loss = sum(one["loss"] for one in of_base) / sum(one["loss_tokens"] for one in of_base)
    assert math.isclose(everything.scores["loss"].before.value, loss)
    assert math.isclose(everything.scores["perplexity"].before.value, math.exp(loss))
    assert everything.scores["loss"].difference.value < 0
    assert everything.counted["refused_rightly"] == 1 and everything.counted["refused_wrongly"] == 9


def test_a_second_evaluation_gives_the_same_scores(first, run, golden):
    again = evaluate(configured(f"eval_file={golden}", "name=second"), run, None)
    assert without_times(again) == without_times(first)


def test_an_interrupted_evaluation_resumes_with_the_same_scores(first, run, golden):
    folder = run.evaluation / "cut"
    shutil.copytree(first.folder, folder)
    kept = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    marked = [line.replace('"answer": "', '"answer": "kept ') for line in kept if '"model": "base"' in line]
    (folder / "predictions.jsonl").write_text("".join(marked) + kept[-1][:40], encoding="utf-8")
    resumed = evaluate(configured(f"eval_file={golden}", "name=cut"), run, None)
    assert all(row.before.prediction.answer.startswith("kept ") for row in resumed.rows)  # not made again
    for mine, theirs in zip(resumed.rows, first.rows, strict=True):
        assert mine.after.prediction.answer == theirs.after.prediction.answer
        assert mine.after.prediction.loss == theirs.after.prediction.loss


def test_sampled_answers_are_the_same_after_an_interruption(run, golden):
    def sampled(name):
        settings = ["generation=sample", "generation.temperature=1.5", "generation.max_new_tokens=6"]
        return evaluate(configured(f"eval_file={golden}", f"name={name}", *settings), run, None)

    def answers(evaluation):
        return [(row.before.prediction.answer, row.after.prediction.answer) for row in evaluation.rows]

    torch.manual_seed(1)
    whole = sampled("sampled")
    folder = run.evaluation / "sampled_again"
    shutil.copytree(whole.folder, folder)
    stored = lines(folder / "predictions.jsonl")
    longest = [one for one in stored if one["model"] == "base" and one["row"] == 4]  # one row of one batch is left
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in longest), encoding="utf-8")
    torch.manual_seed(2)
    assert answers(sampled("sampled_again")) == answers(whole)
    other = evaluate(
        configured(
            f"eval_file={golden}", "name=other_seed", "generation=sample", "generation.temperature=1.5", "seed=7"
        ),
        run,
        None,
    )
    assert answers(other) != answers(whole)


def test_answers_made_from_other_inputs_are_made_again(first, run, golden, caplog):
    shutil.copytree(first.folder, run.evaluation / "changed")
    changed = evaluate(configured(f"eval_file={golden}", "name=changed", "generation.max_new_tokens=3"), run, None)
    assert max(row.before.prediction.tokens for row in changed.rows) == 3
    assert "made from other inputs, starting again" in caplog.text


def test_rows_and_chunks_of_training_are_labelled_by_content(first):
    assert [row.trained for row in first.rows] == [True] * 3 + [False] * 7
    assert [row.seen for row in first.rows] == [True] * 6 + [False] * 4
    assert [group.label for group in first.groups[:4]] == [
        "all (10 ⚠, 3 trained on)",
        "on chunks that training saw (6 ⚠, 3 trained on)",
        "on chunks that it never saw (4 ⚠)",
        "identical to training rows (3 ⚠)",
    ]
    assert any("3 of 10 golden rows are training rows" in note for note in notes(first))
    write_report(first)
    for name in ("report.html", "report.md"):
        text = (first.folder / name).read_text(encoding="utf-8")
        assert all(group.label in text for group in first.groups[:4]) and "What this does not measure" in text
        assert "3 of 10 golden rows are training rows, 6 are on its chunks." in text


def test_what_training_saw_is_unknown_without_its_file(run, golden, tmp_path):
    rows = read_rows(DataFile.find(str(golden), "eval_file"), needs_material=False)
    moved = Run(tmp_path / "moved")
    shutil.copytree(run.path, moved.path, ignore=shutil.ignore_patterns("evaluation"))
    cfg, environment = moved.read_config(), moved.read_json(moved.environment)
    recorded = cfg.data.train_file
    elsewhere = tmp_path / "train.jsonl"
    shutil.copy(recorded, elsewhere)
    cfg.data.train_file = str(elsewhere)
    moved.write_config(cfg)
    moved.write_json(moved.environment, environment | {"data": {str(elsewhere): environment["data"][recorded]}})
    assert sum(map(bool, find_overlap(moved, rows, None).rows)) == 3
    with elsewhere.open("a") as file:
        file.write('{"question": "q", "answer": "a"}\n')
    changed = find_overlap(moved, rows, None)
    assert "has changed since the run" in changed.told_by and set(changed.rows) == set(changed.chunks) == {None}
    elsewhere.unlink()
    assert "is gone" in find_overlap(moved, rows, None).told_by
    assert sum(map(bool, find_overlap(moved, rows, recorded).rows)) == 3
    with pytest.raises(UserError, match="not the file that"):
        find_overlap(moved, rows, str(golden))


def test_hostile_answers_are_text_in_both_reports(first, run, golden):
    folder = run.evaluation / "hostile"
    shutil.copytree(first.folder, folder)
    hostile = [one | {"answer": HOSTILE} for one in lines(folder / "predictions.jsonl")]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in hostile), encoding="utf-8")
    evaluation = evaluate(configured(f"eval_file={golden}", "name=hostile"), run, None)
    write_report(evaluation)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") >= 3
    assert "<script" not in page and "<img src=x" not in page and "default-src 'none'" in page
    assert {
        piece.split('"')[1][:22] for piece in page.split("<img ")[1:] for piece in ["src=" + piece.split("src=")[1]]
    } == {"data:image/png;base64,"}
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "&lt;script" in text and "<script" not in text and "](http" not in text and "](javascript" not in text


def test_closed_book_and_with_context_are_both_measured(first, run, golden):
    read = evaluate(configured(f"eval_file={golden}", "context=always"), run, None)
    assert read.folder.name == "small-context_always"
    assert [side.with_context for side in (*first.sides, *read.sides)] == [False, False, True, True]
    assert [row.after.prediction.loss for row in read.rows] != [row.after.prediction.loss for row in first.rows]


def test_two_runs_are_compared_row_by_row(first, run, golden, tmp_path):
    other = Run(tmp_path / "other")
    shutil.copytree(run.path, other.path, ignore=shutil.ignore_patterns("evaluation"))
    weights = other.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(weights).items()}, weights)
    both = evaluate(configured(f"eval_file={golden}"), run, other)
    assert both.folder.parent == run.evaluation and both.folder.name.startswith("small-against-")
    loss, own = both.groups[0].scores["loss"], first.groups[0].scores["loss"]
    assert loss.after.value == own.after.value
    assert loss.before.value not in (own.before.value, own.after.value)  # half an adapter is neither base nor adapter
    assert math.isclose(loss.difference.value, loss.after.value - loss.before.value)
    with pytest.raises(UserError, match="is the run itself"):
        evaluate(configured(f"eval_file={golden}"), run, run)


def test_a_judge_scores_answers_and_rows_without_verdict_are_left_out(first, run, golden):
    shutil.copytree(first.folder, run.evaluation / "judged")
    server = Server((200, "CORRECT"), (400, ""), (200, "WRONG"))
    settings = [f"judge.url={server.url}", "judge.model=referee", "judge.workers=1", "judge.retries=0"]
    judged = evaluate(configured(f"eval_file={golden}", "name=judged", *settings), run, None)
    server.shutdown()
    server.server_close()
    assert judged.groups[0].counted["judged"] == 9 and first.groups[0].counted["judged"] == 0
    assert judged.groups[0].scores["judged"].before.value == pytest.approx(1 / 9)
    write_report(judged)
    assert "right, as judged by a model" in (judged.folder / "report.html").read_text(encoding="utf-8")


def test_an_adapter_whose_loss_is_nan_is_named(run, golden, tmp_path):
    broken = Run(tmp_path / "broken")
    shutil.copytree(run.path, broken.path, ignore=shutil.ignore_patterns("evaluation"))
    weights = broken.adapter / "adapter_model.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="adapter_model.safetensors: .* has value"):
        evaluate(configured(f"eval_file={golden}"), broken, None)
    assert not (broken.evaluation / "small" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval_file=nowhere.jsonl", "eval_file=nowhere.jsonl: no such file, neither in the working directory"),
        ("name=a/b", "name=a/b: give the name of a folder"),
        ("name='..'", "give the name of a folder"),
        ("refusal_pattern='('", "not a regular expression"),
        ("context=maybe", "context=maybe: must be never, always"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("judge.url=ftp://x", "judge.url=ftp://x: give an http"),
        ("judge.workers=many", "judge.workers"),
        ("judge.url=http://me:hunter2@x", "judge.url: holds a password or key"),
        ("resamples=many", "resamples must be at least 100"),
        ("seed=-1", "seed=-1: seed must be"),
        ("harness.tasks=hellaswag", "harness.tasks=hellaswag: must be a list: harness.tasks=[hellaswag]"),
        ("harness.limit=0", "harness.limit=0: must be a whole number"),
        ("harness.tasks=[hellaswog]", "harness.tasks: the harness has no hellaswog"),
    ],
)
def test_a_wrong_setting_is_named_before_a_model_loads(run, override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(configured(override), run, None)


def test_a_metric_from_outside_the_package_is_scored_shown_and_compared(first, run, golden, monkeypatch):
    """What a contributor adds: one entry. Predictions that exist already are scored with it, no model is loaded."""
    words = Metric(
        "words of the answer",
        None,
        ".1f",
        lambda answer: float(len(answer.text.split())),
        places=frozenset(Place),
        training_name="words",
    )
    monkeypatch.setitem(METRICS, "answer_words", words)
    monkeypatch.setattr("intern.evaluation.evaluate._answer", None)
    shutil.copytree(first.folder, run.evaluation / "outside")
    evaluation = evaluate(configured(f"eval_file={golden}", "name=outside"), run, None)
    stored = [one["answer"] for one in lines(evaluation.folder / "predictions.jsonl") if one["model"] == "adapter"]
    mean = sum(len(answer.split()) for answer in stored) / len(stored)
    assert evaluation.groups[0].scores["answer_words"].after.value == pytest.approx(mean) and mean > 0
    write_report(evaluation)
    run.write_json(Run(evaluation.folder).metrics, as_json(evaluation))
    for name in ("report.html", "report.md"):
        assert "words of the answer" in (evaluation.folder / name).read_text(encoding="utf-8")
    compared = read_runs([str(run.path)], "score", "outside")
    assert compared.finished[0].values["answer_words"] == pytest.approx(mean)
    headings, rows = table(compared, compared.finished, brief=False)
    assert rows[0][headings.index("words of the answer")].startswith(f"{mean:.1f} [")
    assert training_metrics()["eval_words"] == "answer_words"
    assert mean_score("answer_words", [Answer("two words", ""), Answer("", "")]) == 1


def test_an_evaluation_made_before_metrics_were_renamed_is_read_and_its_answers_are_kept(
    first, run, golden, monkeypatch
):
    folder = run.evaluation / "older"
    shutil.copytree(first.folder, folder)
    older = as_json(first)
    for group in older["groups"]:
        group["scores"]["figures_right"] = group["scores"].pop("numbers_right")
    run.write_json(folder / "metrics.json", older)
    for sort_by in ("numbers_right", "figures_right"):
        [found] = read_runs([str(run.path)], sort_by, "older").finished
        assert found.values["numbers_right"] == first.groups[0].scores["numbers_right"].after.value
    assert (
        '"with_material": false' in (folder / "inputs.json").read_text()
    )  # as before the move: answers are not made again
    monkeypatch.setattr("intern.evaluation.evaluate._answer", None)
    again = evaluate(configured(f"eval_file={golden}", "name=older"), run, None)
    assert [row.after.prediction for row in again.rows] == [row.after.prediction for row in first.rows]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_scores_are_readable_at_every_width(first, monkeypatch, capsys, width):
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    show_evaluation(first)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    drawn = [line for line in printed.splitlines() if line.startswith(("│", "┃", "┏", "└"))]
    assert drawn and max(map(len, drawn)) <= width
    loss, f1 = (first.groups[0].scores[name] for name in ("loss", "token_f1"))
    for score, form in ((loss, ".2f"), (f1, ".3f")):
        assert f"{score.before.value:{form}}" in printed and f"{score.after.value:{form}}" in printed
    assert "on chunks that never" not in printed and printed.count("┏") == (4 if width == 40 else 1)


def test_control_characters_of_answers_are_shown_in_both_reports(first, run, golden):
    folder = run.evaluation / "control"
    shutil.copytree(first.folder, folder)
    sent = [one | {"answer": "a\x1b[2J\x07b\nc"} for one in lines(folder / "predictions.jsonl")]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sent), encoding="utf-8")
    write_report(evaluate(configured(f"eval_file={golden}", "name=control"), run, None))
    page, text = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "a\\x1b[2J\\x07b\nc" in page and "\\x1b" in text
    assert not [c for c in page + text if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_line_and_finished_answers_stay(run, golden, monkeypatch, number):
    """Fails at the third batch, as a disk does that has room for two."""
    written = []
    add = Predictions.add

    def until_full(self, batch):
        if len(written) == 2:
            raise OSError(number, os.strerror(number), str(self.path))
        written.append(len(batch))
        add(self, batch)

    folder = run.evaluation / f"full{number}"
    monkeypatch.setattr(Predictions, "add", until_full)
    with (
        pytest.raises(RunError, match=f"predictions.jsonl: {os.strerror(number)}: free some space$"),
        explain_disk_errors(run.evaluation, "free some space"),
    ):
        evaluate(configured(f"eval_file={golden}", f"name={folder.name}"), run, None)
    assert len(lines(folder / "predictions.jsonl")) == sum(written) == 8
    with pytest.raises(ValueError, match="not about a disk"), explain_disk_errors(run.evaluation, ""):
        raise ValueError("not about a disk")
