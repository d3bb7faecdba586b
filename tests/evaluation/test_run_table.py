"""Many runs in one table: the best is what run_dir=best takes, what differs is shown, what is broken is named."""

import csv
import json
from pathlib import Path

import pytest
from helpers import command
from omegaconf import OmegaConf

from intern.errors import UserError
from intern.evaluation.run_report import advice, narrowed, notes, table, write_overview
from intern.evaluation.run_table import given_paths, read_runs, shown_keys
from intern.runs.directory import Run, resolve


def made(path, eval_loss=1.0, rank=8, rate=0.001, evaluation=None, data="golden", **extra):
    """A finished run as intern.train leaves one, without its weights."""
    path.mkdir(parents=True)
    run = Run(path)
    config = {
        "seed": 1,
        "lora": {"r": rank, "target_modules": ["q_proj", "v_proj"]},
        "trainer": {"learning_rate": rate},
    }
    run.write_config(OmegaConf.merge(OmegaConf.create(config | {"data": {"eval_file": "/g"}}), OmegaConf.create(extra)))
    metrics = {"train_loss": 2.0, "tokens_per_second": 900.0, "trainable_parameters": 1000 * rank}
    metrics |= {"peak_host_rss_gib": 1 + rank / 100, "train_seconds": 60.5}
    run.write_json(run.metrics, metrics | ({"eval_loss": eval_loss} if eval_loss is not None else {}))
    run.write_json(run.environment, {"data": {"/g": data}, "gpu": None})
    for step in (2, 4):
        run.append_history({"step": step, "optimizer_steps": step, "loss": 3.0 / step})
    if evaluation is not None:
        folder = run.evaluation / "golden_test_set"
        folder.mkdir(parents=True)
        after = {"value": evaluation, "low": evaluation - 0.1, "high": evaluation + 0.1}
        group = {"name": "all", "scores": {"token_f1": {"rows": 100, "before": after, "after": after}}}
        (folder / "metrics.json").write_text(json.dumps({"file_sha256": "g", "groups": [group]}))
    return path


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "multirun" / "day" / "time"
    made(folder / "0", 0.9, rank=4, evaluation=0.5)
    made(folder / "1", 0.7, rank=8, evaluation=0.3)
    made(folder / "2", 0.8, rank=16, quant={"bnb_4bit_quant_type": "fp4"})
    (folder / "multirun.yaml").write_text("hydra: {}\n")
    return folder


def broken(folder):
    """One run for each way in which a run can be no good: name -> the reason that must be given."""
    failed = folder / "failed"
    (failed / ".hydra").mkdir(parents=True)
    (failed / ".hydra" / "overrides.yaml").write_text("- lora.r=0\n- seed=2\n")
    (failed / "train.log").write_text("[2024-01-01 10:00:00,1][intern.cli][ERROR] lora.r=0: must be at least 1\n")
    crashed = folder / "crashed"
    crashed.mkdir()
    (crashed / "train.log").write_text(
        "[t][intern.cli][ERROR] ValueError\nTraceback (most recent call last):\n  File x\nValueError: no such thing\n"
    )
    killed = made(folder / "killed")
    (killed / "metrics.json").unlink()
    cut = made(folder / "cut")
    (cut / "metrics.json").write_text('{"eval_loss": 0.')
    lossless = made(folder / "lossless")
    (lossless / "metrics.json").write_text('{"eval_loss": null}')
    unreadable = made(folder / "unreadable")
    (unreadable / "config.yaml").write_text("a: b: c")
    return {
        "failed": "failed: lora.r=0: must be at least 1",
        "crashed": "failed: ValueError: no such thing",
        "killed": "unfinished: no metrics.json, last step 4",
        "cut": "metrics.json cannot be read (JSONDecodeError)",
        "lossless": "metrics.json has no loss that is a number",
        "unreadable": "config.yaml cannot be read (ScannerError)",
    }


def test_the_best_run_is_the_one_that_run_dir_takes(sweep, tmp_path, monkeypatch):
    runs = read_runs([str(sweep)], "score", None)
    assert runs.best.run.path == resolve(sweep).path == sweep / "1"
    assert [one.name for one in runs.finished] == ["1", "2", "0"]
    assert (
        advice(runs, [str(sweep)], everything=False)[1]
        == f"use it: python -m intern.query run_dir={sweep} question='...'"
    )
    made(tmp_path / "outputs" / "day" / "one", 0.6)
    monkeypatch.chdir(tmp_path)
    everything = read_runs(given_paths(None), "score", None)
    assert everything.best.run.path == resolve("best").path == tmp_path / "outputs/day/one"
    assert "run_dir=best" in advice(everything, given_paths(None), everything=True)[1]


def test_another_figure_sorts_the_better_way_and_chooses_another_best(sweep):
    runs = read_runs([str(sweep)], "token_f1", None)
    assert [one.name for one in runs.finished] == ["0", "1", "2"] and runs.best.name == "0"
    assert f"run_dir={sweep / '0'} " in advice(runs, [str(sweep)], everything=False)[1]
    by_rank = read_runs([str(sweep)], "lora.r", None)
    assert [one.config["lora.r"] for one in by_rank.finished] == ["4", "8", "16"] and by_rank.best.name == "1"
    with pytest.raises(UserError, match=r"sort_by=lora.rr: unknown key; did you mean lora.r"):
        read_runs([str(sweep)], "lora.rr", None)


def test_every_key_that_differs_is_a_column_and_no_other(sweep):
    runs = read_runs([str(sweep)], "score", None)
    assert shown_keys(runs) == ["lora.r", "trainer.learning_rate", "quant.bnb_4bit_quant_type"]
    columns, rows = table(runs, runs.finished, brief=False)
    assert "seed" not in columns and rows[1][columns.index("quant.bnb_4bit_quant_type")] == "fp4"
    assert [row[columns.index("token F1")] for row in rows] == ["0.300 [0.200, 0.400]", "", "0.500 [0.400, 0.600]"]
    assert rows[0][0] == "★ 1"


def test_broken_and_unfinished_runs_are_named_and_the_others_compared(sweep):
    reasons = broken(sweep)
    runs = read_runs([str(sweep)], "score", None)
    assert {one.name: one.reason for one in runs.others} == reasons
    assert next(one.overrides for one in runs.others if one.name == "failed") == "lora.r=0 seed=2"
    assert len(runs.finished) == 3 and runs.best.name == "1"
    only = read_runs([str(sweep / "failed")], "score", None)
    assert not only.finished and advice(only, [], everything=False) == ["No run is finished."]


def test_files_hold_every_run_and_the_plots(sweep, tmp_path):
    reasons = broken(sweep)
    runs = read_runs([str(sweep)], "score", None)
    write_overview(runs, tmp_path, ["said"], "score")
    with (tmp_path / "compare.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows if row["best"] == "True"] == ["1"]
    assert {row["run"]: row["state"] for row in rows if row["state"] != "finished"} == reasons
    assert float(rows[0]["eval_loss"]) == 0.7 and float(rows[0]["token_f1_low"]) == pytest.approx(0.2)
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert all(f"![{name}]({name}.png)" in text for name in ("score_by_rank", "loss_curves", "quality_by_memory"))
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("score_by_rank", "loss_curves"))
    assert all(reason in text for reason in reasons.values()) and "said" in text


def test_what_cannot_be_compared_is_said(tmp_path):
    made(tmp_path / "a", 0.5)
    made(tmp_path / "b", 0.4, data="other golden rows")
    assert "different golden files" in notes(read_runs([str(tmp_path)], "score", None))[0]
    made(tmp_path / "c", None)
    assert "no eval loss" in notes(read_runs([str(tmp_path)], "score", None))[1]


def test_few_rows_and_rows_of_training_are_marked_here_too(sweep):
    assert notes(read_runs([str(sweep)], "score", None)) == []
    stored = sweep / "1" / "evaluation" / "golden_test_set" / "metrics.json"
    evaluated = json.loads(stored.read_text())
    evaluated["groups"][0]["trained_rows"] = 3
    evaluated["groups"][0]["scores"]["token_f1"]["rows"] = 29
    stored.write_text(json.dumps(evaluated))
    runs = read_runs([str(sweep)], "score", None)
    columns, rows = table(runs, runs.finished, brief=True)
    assert [row[columns.index("token F1")] for row in rows] == ["0.300 [0.200, 0.400] ⚠", "", "0.500 [0.400, 0.600]"]
    assert "fewer than 30 rows" in notes(runs)[0] and notes(runs)[1].endswith("trained on, among others: 1.")


def test_hostile_names_and_values_stay_in_their_cells(tmp_path):
    made(tmp_path / "a", 0.5, data="x", note="plain")
    made(tmp_path / "b|$\\x$\x1b[31m", 0.6, note="one | two\nthree")
    runs = read_runs([str(tmp_path)], "score", None)
    write_overview(runs, tmp_path, [], "score")
    lines = (tmp_path / "compare.md").read_text(encoding="utf-8").split("\n\n")[1].splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1 and len(lines) == 4
    assert "\x1b" not in "".join(lines)


def test_a_narrow_terminal_loses_the_least_telling_columns(sweep):
    runs = read_runs([str(sweep)], "score", None)
    columns, rows = table(runs, runs.finished, brief=True)
    fewer, cells = narrowed(columns, rows, 80)
    assert set(columns) - set(fewer) >= {"trainable", "train loss"} and {"run", "r", "eval loss"} <= set(fewer)
    assert all(len(row) == len(fewer) for row in cells)
    assert narrowed(columns, rows, 500) == (columns, rows)


def test_a_thousand_runs_are_read_with_a_few_reads_each(tmp_path, monkeypatch):
    model = made(tmp_path / "model", 1)
    for number in range(1000):
        run = tmp_path / "sweep" / str(number)
        (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        for file in model.iterdir():
            (run / file.name).write_bytes(file.read_bytes())
        (run / "config.yaml").write_text((model / "config.yaml").read_text().replace("seed: 1", f"seed: {number}"))
        (run / "metrics.json").write_text(json.dumps({"eval_loss": 1 + number * 37 % 1000}))
    reads = []
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **kwargs: reads.append(path) or read_text(path, **kwargs))
    runs = read_runs([str(tmp_path / "sweep")], "score", None)
    assert len(runs.finished) == 1000 and runs.best.figures["eval_loss"] == 1.0
    assert len(reads) <= 4000  # configuration, figures, score, environment; no history, no adapter
    write_overview(runs, tmp_path, [], "score")
    assert len(reads) <= 4012


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a,b", ["a", "b"]),
        ("[a, 'b c']", ["a", "b c"]),
        ("lora.r=8,seed=1", ["lora.r=8,seed=1"]),
        ("x/*,y", ["x/*", "y"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_paths_are_given_as_a_list_or_as_one_that_has_a_comma_itself(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.r=8,seed=1").mkdir()
    assert given_paths(given) == expected


def test_globs_and_folders_give_each_run_once(sweep, tmp_path):
    assert [one.name for one in read_runs([str(sweep / "[01]"), str(sweep / "0")], "score", None).finished] == [
        "1",
        "0",
    ]
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_runs([str(tmp_path / "nowhere")], "score", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run there"):
        read_runs([str(tmp_path / "empty")], "score", None)


def test_the_command_prints_the_table_the_broken_ones_and_the_best(sweep):
    broken(sweep)
    done = command("intern.compare", "runs=day/*", "top=2", cwd=sweep.parent.parent)
    printed = done.stdout.splitlines()
    assert printed[0].startswith("| run | r | learning_rate | bnb_4bit_quant_type | trainable |")
    assert printed[2].startswith("| ★ 1 | 8 |") and "1 more runs in comparison/compare.md" in printed
    assert "6 of 9 runs cannot be compared:" in printed and done.stderr == ""
    assert printed[-3].startswith("★ best by eval loss 0.700: ") and printed[-1] == "files: comparison"
    again = command("intern.compare", "runs=day/time", cwd=sweep.parent.parent)
    assert again.stdout.splitlines()[-1] == "files: day/time/comparison"  # and its own files are no run
