"""run_dir=SWEEP evaluates every finished job of it; their base answers once."""

import json
import shutil
import sys

import pytest
from helpers import ROOT
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from intern.evaluate import main
from intern.runs.directory import Run


@pytest.fixture(scope="module")
def sweep(trained_run, tmp_path_factory):
    """Two finished jobs, one without its weights, and one that was interrupted."""
    folder = tmp_path_factory.mktemp("sweep") / "ranks"
    for job in range(4):
        shutil.copytree(
            trained_run, folder / str(job), ignore=shutil.ignore_patterns("checkpoints", "wandb", "evaluation")
        )
        config = (folder / str(job) / "config.yaml").read_text()
        (folder / str(job) / "config.yaml").write_text(config.replace("name: first try", f"name: ranks/{job}"))
    metrics = json.loads((folder / "1" / "metrics.json").read_text())
    (folder / "1" / "metrics.json").write_text(json.dumps(metrics | {"eval_loss": 0.1}))
    weights = folder / "1" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    (folder / "2" / "adapter" / "adapter_model.safetensors").unlink()
    (folder / "3" / "metrics.json").unlink()
    return folder


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    rows = (ROOT / "data" / "golden_test_set.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path_factory.mktemp("golden") / "four.jsonl"
    path.write_text("".join(rows[::50][:4]), encoding="utf-8")
    return path


@pytest.fixture
def evaluated(monkeypatch, capsys, golden):
    """Runs intern.evaluate in this process; returns its exit code, standard output and standard error."""

    def run(*arguments):
        short = [f"eval_file={golden}", "generation.max_new_tokens=4", "resamples=100"]
        monkeypatch.setattr(sys, "argv", ["intern-evaluate", *short, *arguments])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def test_every_finished_job_is_evaluated_and_a_broken_one_does_not_end_the_others(sweep, evaluated):
    code, table, said = evaluated(f"run_dir={sweep}")
    assert code == 1 and "1 of 3 runs could not be evaluated: 2: " in said
    assert "1 of 3: ranks/0\n" in said and "3 of 3: ranks/2\n" in said and "Traceback" not in said
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert sorted(rows[2:4]) == ["ranks/0", "ranks/1"] and rows[4] == "base"
    assert rows[0].startswith("all (4 ⚠) golden rows of four.jsonl")
    assert f"python -m intern.compare runs={sweep} sort_by=token_f1" in table
    made = [(sweep / job / "evaluation" / "four" / "report.html").is_file() for job in "0123"]
    assert made == [True, True, False, False]


def test_the_base_has_answered_once_and_each_adapter_for_itself(sweep, evaluated):
    evaluated(f"run_dir={sweep}")
    kept = [(sweep / job / "evaluation/four/predictions.jsonl").read_text().splitlines() for job in "01"]
    base, adapter = (
        [[line for line in lines if f'"model": "{name}"' in line] for lines in kept] for name in ("base", "adapter")
    )
    assert base[0] == base[1] and len(base[0]) == 4  # with the same seconds of answering: they were not made twice
    assert adapter[0] != adapter[1]


def test_only_the_best_job_is_evaluated_if_asked_and_it_is_named(sweep, evaluated):
    code, table, said = evaluated(f"run_dir={sweep}", "best_only=true", "name=only")
    assert code == 0 and "ranks/1 (" in said and "the best of 3" in said
    assert [(sweep / job / "evaluation" / "only").exists() for job in "012"] == [False, True, False]
    assert table.startswith("| golden rows |")


@pytest.mark.parametrize(
    ("override", "message"),
    [("best_only=perhaps", "best_only=perhaps: must be true or false"), ("harness.tasks=[x]", "for one run at a time")],
)
def test_a_mistake_is_one_line_before_a_model_loads(sweep, evaluated, override, message):
    code, _, said = evaluated(f"run_dir={sweep}", override)
    assert code == 2 and message in said and said.count("\n") == 1


def test_the_runs_are_compared_with_another_run_which_is_left_out_itself(sweep, evaluated):
    (sweep / "2").rename(sweep.parent / "broken")
    code, table, said = evaluated(f"run_dir={sweep}", f"against={sweep / '0'}")
    (sweep.parent / "broken").rename(sweep / "2")
    assert code == 0 and "left out: it is the run that the others are compared with" in said
    assert "| ranks/1 |" in table and "| other run |" in table
    assert Run(sweep / "1").finished
