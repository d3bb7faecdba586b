"""intern.export as a user calls it, and what it refuses."""

import json

import pytest
from conftest import settings_of
from helpers import command

from intern.errors import RunError, UserError
from intern.exporting.export import export
from intern.exporting.exported_model import ExportedModel
from intern.runs.directory import Run


def test_an_export_lands_proven_and_is_asked_like_the_run(job, tmp_path):
    out = tmp_path / "shipped" / "mine"
    done = export(job.run, settings_of(job.run, out, prompts=3, max_new_tokens=8))
    record = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert record == done.record
    assert record["proven"] is True
    assert record["figures"]["mean_kl"] < record["limit_mean_kl"] == 0.001
    assert {"model.safetensors", "config.json", "README.md", "prompt.json"} <= set(done.sizes)
    asked = ExportedModel(out, {"max_new_tokens": 24})
    question = "How many trips were there in 2024?"
    assert asked.answer(question) == job.loaded.answer(question) != ""
    with pytest.raises(UserError, match="is not empty"):
        export(job.run, settings_of(job.run, out))


def test_an_export_that_is_not_the_evaluated_model_leaves_nothing(job, tmp_path):
    with pytest.raises(
        RunError, match=r"the export is not the model that was evaluated: weights: .* Nothing was written"
    ):
        export(job.run, settings_of(job.run, tmp_path / "out", weights="original", prompts=3, max_new_tokens=8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_shows_what_it_wrote(trained_run, tmp_path):
    out = tmp_path / "mine"
    line = ("intern.export", f"run_dir={trained_run}", f"out={out}", "prompts=3", "max_new_tokens=8")
    done = command(*line)
    assert "model.safetensors" in done.stdout
    assert "mean KL divergence" in done.stderr
    question = ("question=How many trips were there?", "generation.max_new_tokens=8")
    answers = [command("intern.query", f"run_dir={folder}", *question).stdout for folder in (trained_run, out)]
    assert answers[0] == answers[1] != ""
    refused = command(*line, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "is not empty" in refused.stderr


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"out": None}, "out: give the folder to write"),
        ({"dtype": "float8"}, "dtype='float8': must be 'bfloat16' or 'float16'"),
        ({"prompts": 0}, "prompts=0: must be at least 1"),
        ({"max_mean_kl": 0}, "max_mean_kl=0: must be above 0"),
        ({"license": "my own"}, "license=my own: give a name of the hub's list"),
        ({"format": "hub"}, "format=hub: give repo=OWNER/NAME"),
        ({"repo": "mine"}, "repo=mine: must be OWNER/NAME"),
        ({"repo": "a/b/c"}, "repo=a/b/c: "),
        ({"prove": "x"}, "prove: give server="),
    ],
)
def test_wrong_values_are_named(trained_run, tmp_path, keys, message):
    out = keys.pop("out", tmp_path / "out")
    with pytest.raises(UserError) as raised:
        settings_of(Run(trained_run), out, **keys)
    assert str(raised.value).startswith(message)


def test_an_export_into_the_run_or_through_a_link_is_refused(trained_run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("x")
    for out, message in (
        (trained_run / "merged", "lies in the run"),
        (tmp_path / "link", "is a link"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            settings_of(Run(trained_run), out)
