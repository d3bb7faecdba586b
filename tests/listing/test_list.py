"""intern.runs lists runs of every state, and tells one run's whole story."""

import json
import os

import pytest
from helpers import run_directory

from intern.listing.run_list import in_order, list_runs, select


@pytest.fixture
def work(tmp_path):
    """Runs below outputs/, the oldest first."""
    outputs = tmp_path / "outputs"
    model = {"pretrained_model_name_or_path": "meta/Llama-8B"}
    runs = [
        run_directory(outputs / "a", 0.5, name="first try", model=model, lora={"r": 16}),
        run_directory(outputs / "b", 0.4, model={"pretrained_model_name_or_path": "/models/tiny"}, lora={"r": 4}),
        run_directory(outputs / "c", failure="lora.r=0: must be at least 1", name="first try"),
        run_directory(outputs / "d"),
    ]
    for age, run in enumerate(reversed(runs)):
        for file in run.path.iterdir():
            os.utime(file, (1e9 - age * 86400, 1e9 - age * 86400))
    return tmp_path


def names(runs):
    return [one.run.path.name for one in runs]


def test_the_table_has_a_line_for_every_run_the_newest_first(work, asked):
    lines = asked(work).stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        "outputs/d",
        "first try (outputs/c)",
        "outputs/b",
        "first try (outputs/a)",
    ]
    assert [line.split("|")[2].strip() for line in lines[2:6]] == ["interrupted", "failed", "finished", "finished"]
    assert "| Llama-8B |" in lines[5] and "| 16 | 0.500 |" in lines[5] and "2001-09-0" in lines[5]
    assert lines[7].startswith("2 finished, 1 failed, 1 interrupted; ")


def test_runs_are_filtered_and_sorted(work):
    runs = list_runs([str(work / "outputs")])
    assert names(select(runs, ["failed", "interrupted"], None)) == ["c", "d"]
    assert names(select(runs, [], "LLAMA")) == ["a"] and names(select(runs, ["finished"], "outputs/b")) == ["b"]
    assert names(in_order(runs, "score")) == ["b", "a", "c", "d"]
    assert names(in_order(runs, "rank"))[0] == "b" and names(in_order(runs, "date")) == ["d", "c", "b", "a"]
    assert names(in_order(runs, "size"))[-1] in "cd" and names(in_order(runs, "state"))[0] == "c"


def test_few_rows_an_interval_and_a_training_loss_are_marked(work, asked):
    content = {
        "schema_version": 1,
        "train_loss": 2.0,
        "eval_loss": 0.5,
        "eval_rows": 8,
        "eval_loss_low": 0.4,
        "eval_loss_high": 0.6,
    }
    (work / "outputs/a/metrics.json").write_text(json.dumps(content))
    (work / "outputs/b/metrics.json").write_text(json.dumps({"schema_version": 1, "train_loss": 2.0}))
    said = asked(work, "state=finished").stdout
    assert "| 0.500 [0.400, 0.600] ⚠ |" in said and "| 2.000 (training) |" in said
    assert "fewer than 30 golden rows" in said and "intern.compare groups the runs" in said


def test_a_story_says_why_a_run_failed_or_how_it_is_resumed(work, asked):
    failed, stopped = asked(work, "show=outputs/c").stdout, asked(work, "show=outputs/d").stdout
    assert "state         failed: lora.r=0: must be at least 1\n" in failed
    assert "state         interrupted\n" in stopped
    assert f"next          python -m intern.train resume={work}/outputs/d\n" in stopped


def test_a_story_of_a_run_without_a_readable_configuration_says_so(work, asked):
    (work / "outputs/d/config.yaml").write_text("a: [b")
    said = asked(work, "show=outputs/d").stdout
    assert (
        "configuration  config.yaml is missing or cannot be read" in said
        and "resume=" not in said
        and "None" not in said
    )


def test_a_story_tells_what_was_trained_and_what_came_of_it(trained_run, asked, tmp_path):
    said = asked(tmp_path, f"show={trained_run}").stdout
    for text in (
        "first try",
        "To share it.",
        "rank 16, alpha 32",
        "12 (",
        "lowest",
        "the base's is",
        "commit ",
        "wandb ",
    ):
        assert text in said, text
    assert f"pack={trained_run}" in said and "in 0 s" not in said


def test_an_empty_list_says_so(tmp_path, asked):
    assert "No runs below outputs/ or multirun/ in this folder" in asked(tmp_path).stdout
    assert "No run is like that" in asked(tmp_path, "state=failed").stdout
