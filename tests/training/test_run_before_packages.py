"""A run directory that was written before intern/ had packages: every command that reads one works on it, and training resumes in it.

tests/fixtures/run_before_packages is that run, finished after 8 steps, with its checkpoint of step 4 and its data. Paths in it are
placeholders, and the tokenizer is that of data/tiny_llama3.
"""

import json
import shutil
import warnings

import pytest
import torch
from helpers import ROOT, command
from safetensors.torch import load_file

from intern.runs.directory import Run
from intern.training.checkpoint_state import find_state

FIXTURE = ROOT / "tests" / "fixtures" / "run_before_packages"
TIMES = ("tokens_per_second", "train_seconds", "peak_host_rss_gib")


@pytest.fixture
def old_run(tmp_path):
    """A copy of the run with the paths of this machine."""
    run = Run(tmp_path / "old" / "run")
    shutil.copytree(FIXTURE, run.path.parent)
    places = {"{PROJECT}": str(ROOT), "{RUN}": str(run.path), "{FOLDER}": str(run.path.parent)}
    for path in [run.config, *run.path.rglob("*.json")]:
        text = path.read_text(encoding="utf-8")
        for placeholder, place in places.items():
            text = text.replace(placeholder, place)
        path.write_text(text, encoding="utf-8")
    for folder in (run.adapter, run.checkpoints / "checkpoint-4"):
        shutil.copy(ROOT / "data" / "tiny_llama3" / "tokenizer.json", folder)
    return run


def without_times(entries):
    return [
        {
            name: value
            for name, value in entry.items()
            if name not in TIMES and not name.endswith(("runtime", "_per_second"))
        }
        for entry in entries
    ]


def test_no_file_of_it_names_a_machine():
    texts = [path for path in FIXTURE.rglob("*") if path.suffix in {".json", ".yaml", ".jsonl"}]
    assert len(texts) > 8
    for path in texts:
        content = path.read_text(encoding="utf-8")
        assert not any(f'"{root}' in content or f" {root}" in content for root in ("/home/", "/tmp/", "/root/")), path
    assert sum(path.stat().st_size for path in FIXTURE.rglob("*") if path.is_file()) < 500_000


def test_it_answers(old_run, tmp_path):
    done = command(
        "intern.query", f"run_dir={old_run.path}", "question=How many cities?", "generation.max_new_tokens=8"
    )
    assert done.stdout.strip() and done.stderr == ""


def test_it_is_evaluated_and_compared(old_run, tmp_path):
    command(
        "intern.evaluate", f"run_dir={old_run.path}", "generation.max_new_tokens=4", cwd=tmp_path, PYTHONPATH=str(ROOT)
    )
    [metrics] = old_run.evaluation.glob("*/metrics.json")
    groups = {group["name"]: group for group in json.loads(metrics.read_text())["groups"]}
    after = groups["all"]["scores"]["loss"]["after"]["value"]
    assert after == pytest.approx(old_run.score(), rel=0.05)  # each row counts the same here, each token there
    folder = tmp_path / "comparison"
    done = command("intern.compare", f"runs={old_run.path}", f"output_dir={folder}", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "2.858" in done.stdout


def test_it_resumes_and_ends_as_it_did(old_run):
    expected = Run(old_run.path.parent / "expected")
    shutil.copytree(old_run.path, expected.path)
    old_run.metrics.unlink()  # as a kill after step 4 would have left it
    # The run was made with two threads, whose sums differ from those of one: by up to 5e-8 in the adapter.
    done = command("intern.train", f"resume={old_run.path}", OMP_NUM_THREADS="2")
    assert f"resuming from {old_run.checkpoints}/checkpoint-4" in done.stderr
    assert done.stderr.count("checkpoint-4: an earlier version wrote no manifest, so its files cannot be verified") == 1
    assert (old_run.checkpoints / "checkpoint-8" / "manifest.json").is_file()
    state = old_run.read_json(old_run.checkpoints / "checkpoint-8" / "trainer_state.json")["stateful_callbacks"]
    assert set(state) == {"LoggingWindow", "OptimizerSteps", "ResumableEarlyStopping", "TrainerControl"}
    assert find_state(state, "optimizer_steps")["attributes"]["taken"] == 8

    ours, theirs = (without_times(run.read_history()) for run in (old_run, expected))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == [2, 4, 4, 6, 8, 8]
    metrics, before = (without_times([run.read_json(run.metrics)])[0] for run in (old_run, expected))
    metrics = {key: metrics[key] for key in before}  # the base's loss, the interval and the epochs came later
    adapter, trained = (load_file(run.adapter / "adapter_model.safetensors") for run in (old_run, expected))
    same = ours == theirs and metrics == before and all(torch.equal(adapter[name], trained[name]) for name in trained)
    if not same:
        warnings.warn(
            "equal within 1e-5, not bit for bit: sums have another order than where the run was made", stacklevel=1
        )
        for mine, other in zip([*ours, metrics], [*theirs, before], strict=True):
            assert mine.keys() == other.keys()
            for key, value in other.items():
                assert mine[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
        for name, tensor in trained.items():
            torch.testing.assert_close(adapter[name], tensor, atol=1e-5, rtol=1e-5)
    assert adapter.keys() == trained.keys()
