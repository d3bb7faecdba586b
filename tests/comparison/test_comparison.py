"""Many runs in one table: the best is the one that run_dir takes, what differs is shown, what is broken is named."""

import csv
import json
import os
import re
import sys

import pytest
from helpers import command, made
from omegaconf import OmegaConf
from rich.console import Console

from intern.comparison.files import write_overview
from intern.comparison.groups import given_paths, read_runs, shown_keys
from intern.comparison.table import advice, narrowed, notes, table
from intern.comparison.terminal import show_runs
from intern.config.secrets import MASK
from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.find import resolve


@pytest.fixture
def opened():
    """A list of the files below a folder that are opened from now on."""
    wanted = []

    def start(folder):
        reads = []
        wanted.append((str(folder), reads))
        sys.addaudithook(note)
        return reads

    def note(event, arguments):
        for folder, reads in wanted:
            if event != "open" or (arguments[2] or 0) & os.O_DIRECTORY:
                continue
            path = str(arguments[0])  # relative to a folder's descriptor if intern.runs.files opens it
            if path.startswith(folder) or path in ("config.yaml", "metrics.json", "environment.json", "history.jsonl"):
                reads.append(path)

    yield start
    wanted.clear()  # the hook itself stays


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
        "killed": "interrupted; step 4 was the last one logged",
        "cut": "metrics.json: cannot be read (JSONDecodeError)",
        "lossless": "metrics.json has no loss that is a number",
        "unreadable": "config.yaml: cannot be read (ScannerError)",
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


def test_a_run_is_called_by_its_name_and_two_of_one_name_are_told_apart(sweep):
    made(sweep / "3", 0.95, name="try", notes="why")
    assert [one.name for one in read_runs([str(sweep)], "score", None).finished] == ["1", "2", "0", "try"]
    made(sweep / "4", 0.99, name="try", notes="another reason")
    runs = read_runs([str(sweep)], "score", None)
    assert [one.name for one in runs.finished][3:] == ["try (3)", "try (4)"]
    made(sweep / "5", 0.99, logger={"entity": "team"})
    assert not {"name", "notes", "logger.entity"} & set(shown_keys(read_runs([str(sweep)], "score", None)))


def test_golden_and_training_losses_on_the_same_file_are_not_ranked_together(tmp_path):
    made(tmp_path / "a", 0.5)
    made(tmp_path / "b", None, data={"train_file": "/g"})
    assert [len(group.runs) for group in read_runs([str(tmp_path)], "score", None).groups] == [1, 1]


def test_another_column_sorts_the_better_way_and_chooses_another_best(sweep):
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
    assert not only.finished and advice(only, [], everything=False) == [
        "Nothing can be compared: no run is finished, for the reasons above."
    ]
    stopped = read_runs([str(sweep / "killed")], "score", None)
    assert advice(stopped, [], everything=False)[0].endswith(
        f"1 run can be resumed, such as: python -m intern.train resume={sweep / 'killed'}"
    )


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


def test_scores_of_different_rows_are_drawn_apart_and_pictures_of_an_earlier_start_go(tmp_path):
    for name, rank, data in (("a", 4, "one"), ("b", 8, "one"), ("c", 4, "other"), ("d", 8, "other")):
        made(tmp_path / "runs" / name, 0.5, rank=rank, data=data)
    (tmp_path / "score_by_rank.png").write_bytes(b"of an earlier start")
    write_overview(read_runs([str(tmp_path / "runs")], "score", None), tmp_path, [], "score")
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "loss_curves", "score_by_rank_A", "score_by_rank_B", "quality_by_memory_A", "quality_by_memory_B"
    }  # fmt: skip


def test_a_mapping_is_one_value_and_not_columns_of_its_own(tmp_path):
    made(tmp_path / "a", 0.5, **{"quant": {"extra": {"api_key": "secret", "x": 1}}})
    made(tmp_path / "b", 0.6, **{"lora": {"rank_pattern": {"q_proj": 4, "v_proj": 8}}})
    runs = read_runs([str(tmp_path)], "score", None)
    assert [one.config.get("lora.rank_pattern") for one in runs.finished] == [None, "q_proj: 4, v_proj: 8"]
    assert runs.finished[0].config["quant.extra"] == f"api_key: {MASK}, x: 1"


def test_runs_and_sweeps_are_found_by_their_names(tmp_path, monkeypatch):
    for number in (0, 1):
        made(tmp_path / "multirun" / "day" / str(number), 0.5 + number, name=f"ranks/{number}")
    made(tmp_path / "outputs" / "first", 0.7, name="first try")
    monkeypatch.chdir(tmp_path)
    assert [one.name for one in read_runs(["ranks"], "score", None).finished] == ["ranks/0", "ranks/1"]
    assert [one.name for one in read_runs(["ranks/1", "first try"], "score", None).finished] == ["first try", "ranks/1"]
    with pytest.raises(
        UserError, match="runs=rank: no such folder, and no run below outputs/ or multirun/ has this name"
    ):
        read_runs(["rank"], "score", None)


@pytest.mark.parametrize(
    ("column", "said"),
    [("f1", "did you mean token_f1"), ("tokens", "did you mean tokens_per_second"), ("qqqq", "there are ")],
)
def test_a_column_that_no_run_has_is_named_with_the_one_that_was_meant(sweep, column, said):
    with pytest.raises(UserError, match=f"sort_by={column}: unknown key; {said}"):
        read_runs([str(sweep)], column, None)


def test_what_cannot_be_compared_is_named(tmp_path):
    made(tmp_path / "a", 0.5)
    made(tmp_path / "b", 0.4, data="other golden rows")
    assert "different golden files" in notes(read_runs([str(tmp_path)], "score", None))[0]
    made(tmp_path / "c", None)
    assert "no eval loss" in notes(read_runs([str(tmp_path)], "score", None))[1]


def test_few_rows_and_training_rows_are_marked(sweep):
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


def test_a_thousand_runs_are_read_with_a_few_reads_each(tmp_path, opened):
    model = made(tmp_path / "model", 1)
    for number in range(1000):
        run = tmp_path / "sweep" / str(number)
        (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        for file in model.iterdir():
            (run / file.name).write_bytes(file.read_bytes())
        (run / "config.yaml").write_text((model / "config.yaml").read_text().replace("seed: 1", f"seed: {number}"))
        (run / "metrics.json").write_text(json.dumps({"eval_loss": 1 + number * 37 % 1000}))
    reads = opened(tmp_path)
    runs = read_runs([str(tmp_path / "sweep")], "score", None)
    assert len(runs.finished) == 1000 and runs.best.values["eval_loss"] == 1.0
    assert 2000 <= len(reads) <= 4000  # configuration, metrics, score, environment; no history, no adapter
    write_overview(runs, tmp_path, [], "score")
    histories = [path for path in reads if path.endswith("history.jsonl")]
    assert 0 < len(histories) <= 12


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


def test_nothing_below_a_run_or_in_a_hidden_folder_is_a_run(sweep):
    made(sweep / "0" / "checkpoints" / "copy", 0.1)
    made(sweep / ".trash" / "copy", 0.1)
    (sweep / ".hydra").mkdir()  # of the sweep itself
    assert [one.name for one in read_runs([str(sweep)], "score", None).finished] == ["1", "2", "0"]


def test_the_evaluation_that_most_runs_have_is_shown_and_the_peak_is_the_gpus(sweep):
    other = sweep / "0" / "evaluation" / "a_rarer_one"
    other.mkdir()
    (other / "metrics.json").write_text('{"file_sha256": "x", "groups": []}')
    put(sweep / "0", peak_gpu_gib=7.5)
    runs = read_runs([str(sweep)], "score", None)
    assert runs.evaluation == "golden_test_set"
    assert {one.name: one.values["peak_memory_gib"] for one in runs.finished}["0"] == 7.5
    put(sweep / "1", eval_rows=29)
    assert {one.name: set(one.few) for one in read_runs([str(sweep)], "score", None).finished}["1"] == {
        "eval_loss",
        "score",
    }


def test_the_last_error_and_the_last_step_are_given_however_long_the_files_are(tmp_path):
    run = made(tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "history.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, 20_001)))
    assert (
        read_runs([str(tmp_path)], "score", None).others[0].reason == "interrupted; step 20000 was the last one logged"
    )
    line = "[t][intern][ERROR] "
    (run / "train.log").write_text(f"{line}first\n" + "x" * 200_000 + f"\n{line}second\n{line}third\n")
    assert read_runs([str(tmp_path)], "score", None).others[0].reason == "failed: third"
    (run / "train.log").unlink()
    (run / "train.log").symlink_to("/etc/passwd")
    assert "was the last one" in read_runs([str(tmp_path)], "score", None).others[0].reason


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


def put(run, **changes):
    """Changes values in a run's metrics.json."""
    stored = run / "metrics.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | changes))
    return run


def aliases(run):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (run / "config.yaml").write_text("\n".join(levels))


def pipe(run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)


def hostile(folder):
    """Runs that would stop a comparison or its machine: name -> the reason that is given for each."""
    aliases(made(folder / "aliases"))
    pipe(made(folder / "pipe"), "config.yaml")
    pipe(made(folder / "metrics_pipe"), "environment.json")
    deep = made(folder / "deep")
    (deep / "config.yaml").write_text("a: " + "[" * 5000 + "]" * 5000)
    put(made(folder / "digits"), train_seconds=int("9" * 400))
    put(made(folder / "huge"), train_loss=1e308, eval_loss=-1e308)
    (made(folder / "infinite") / "metrics.json").write_text('{"eval_loss": 1e999}')
    (made(folder / "nan") / "metrics.json").write_text('{"eval_loss": 1.0, "train_seconds": NaN}')
    (made(folder / "many") / "config.yaml").write_text("".join(f"k{n}: {n}\n" for n in range(5000)))
    (made(folder / "outside") / "metrics.json").unlink()
    (folder / "outside" / "metrics.json").symlink_to("/proc/self/environ")
    evaluated = made(folder / "evaluated", evaluation=0.5) / "evaluation" / "golden_test_set" / "metrics.json"
    evaluated.write_text(evaluated.read_text().replace("0.5", "1e300"))
    unfinished = made(folder / "unfinished")
    (unfinished / "metrics.json").unlink()
    pipe(unfinished, "history.jsonl")
    pipe(unfinished, "train.log")
    (unfinished / ".hydra").mkdir()
    pipe(unfinished / ".hydra", "overrides.yaml")
    return {
        "aliases": "config.yaml: holds YAML references",
        "pipe": "config.yaml: is not a regular file",
        "metrics_pipe": "environment.json: is not a regular file",
        "deep": "config.yaml: is nested deeper than 32 levels",
        "digits": "metrics.json: train_seconds is larger than 1e+15",
        "huge": "metrics.json: train_loss is larger than 1e+15",
        "infinite": "metrics.json: cannot be read (ValueError)",
        "nan": "metrics.json: cannot be read (ValueError)",
        "many": "config.yaml has 5,0",
        "outside": "is a link: links of a run directory are not followed",
        "evaluated": "token_f1 is larger than 1e+15",
        "unfinished": "interrupted",
    }


def test_a_hostile_run_is_one_row_with_its_reason_and_the_others_are_compared(sweep, tmp_path):
    reasons = hostile(sweep)
    history = made(sweep / "history", 0.6) / "history.jsonl"
    history.write_text(
        '{"step": 1, "optimizer_steps": 1, "loss": 1e308}\n{"step": 2, "optimizer_steps": %s}\n' % ("9" * 400)
    )
    pipe(made(sweep / "history_pipe", 0.65), "history.jsonl")
    runs = read_runs([str(sweep)], "score", None)
    assert {one.name for one in runs.others} == set(reasons)
    for one in runs.others:
        assert reasons[one.name] in one.reason and str(sweep) not in one.reason, one
    assert [one.name for one in runs.finished] == ["history", "history_pipe", "1", "2", "0"]
    write_overview(runs, tmp_path, [], "score")
    assert (tmp_path / "loss_curves.png").stat().st_size > 5000


def test_rank_alpha_and_scale_are_columns_if_they_differ(tmp_path):
    def lora(name, rank, **keys):
        run = made(tmp_path / name, 0.5, rank=rank)
        cfg = OmegaConf.load(run / "config.yaml")
        cfg.lora = {"r": rank, **keys}
        Run(run).write_config(cfg)

    lora("constant", 8, lora_alpha=32)
    lora("float", 16, lora_alpha=32.0)
    lora("doubled", 64, lora_alpha=None)
    lora("rooted", 16, lora_alpha=32, use_rslora=True)
    runs = read_runs([str(tmp_path)], "lora.r", None)
    assert shown_keys(runs)[:4] == ["lora.r", "trainer.learning_rate", "lora.lora_alpha", "lora.scale"]
    headings, rows = table(runs, runs.finished, brief=True)
    assert headings[:5] == ["run", "r", "learning_rate", "lora_alpha", "scale"]
    shown = {row[0].removeprefix("★ "): (row[1], row[3], row[4]) for row in rows}
    assert shown == {
        "constant": ("8", "32", "4"),
        "float": ("16", "32", "2"),
        "rooted": ("16", "32", "8"),
        "doubled": ("64", "128", "2"),
    }
    for name in ("constant", "rooted"):
        (tmp_path / name / "metrics.json").unlink()
    alike = read_runs([str(tmp_path)], "lora.scale", None)
    assert [one.name for one in alike.finished] == ["doubled", "float"] and "lora.scale" not in shown_keys(alike)


def test_runs_are_ranked_on_one_golden_file_only_and_the_groups_are_named(tmp_path):
    for name, loss in (("a", 0.5), ("b", 0.7)):
        made(tmp_path / name, loss)
    made(tmp_path / "recipes", 0.1, data="recipes")
    made(tmp_path / "closed", None)
    runs = read_runs([str(tmp_path)], "score", None)
    assert [(group.mark, [one.name for one in group.runs], group.best.name) for group in runs.groups] == [
        ("A", ["a", "b"], "a"),
        ("B", ["recipes"], "recipes"),
        ("C", ["closed"], "closed"),
    ]
    assert runs.best is None  # of all three none is the best
    headings, rows = table(runs, runs.finished, brief=True)
    assert headings[1] == "on"
    assert [row[:2] for row in rows] == [["★ a", "A"], ["b", "A"], ["★ recipes", "B"], ["★ closed", "C"]]
    said = advice(runs, [str(tmp_path)], everything=True)
    assert said[0].startswith("A: g (2 runs): ★ best by score 0.500: ")
    assert f"run_dir={tmp_path / 'a'} " in said[1] and "run_dir=best" not in "".join(said)
    write_overview(runs, tmp_path, said, "score")
    with (tmp_path / "compare.csv").open(encoding="utf-8", newline="") as file:
        assert [row["best"] for row in csv.DictReader(file)] == ["True", "False", "True", "True"]


def test_a_value_that_no_run_has_is_named_with_the_command_that_measures_it(tmp_path):
    made(tmp_path / "a", 0.5)
    made(tmp_path / "b", 0.7)
    runs = read_runs([str(tmp_path)], "token_f1", None)
    said = advice(runs, [str(tmp_path)], everything=False)
    assert said[0] == (
        f"sort_by=token_f1: none of the 2 finished runs has a token F1: python -m intern.evaluate "
        f"run_dir={tmp_path} measures it. Sorted by score instead."
    )
    assert said[1].startswith("★ best by eval loss 0.500") and [one.name for one in runs.finished] == ["a", "b"]
    judged = advice(read_runs([str(tmp_path)], "judged", None), [], everything=False)[0]
    assert "judge.url=... judge.model=..." in judged


def test_an_evaluation_that_no_run_has_is_refused_by_name(sweep, tmp_path):
    with pytest.raises(UserError, match=r"^evaluation=nope: no run has .*: there are golden_test_set$"):
        read_runs([str(sweep)], "score", "nope")
    made(tmp_path / "plain")
    with pytest.raises(UserError, match=r"evaluation=\.\./x: .* python -m intern.evaluate run_dir=... makes one"):
        read_runs([str(tmp_path / "plain")], "score", "../x")
    done = command("intern.compare", f"runs={sweep}", "evaluation=nope", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith("evaluation=nope: ") and done.stderr.count("\n") == 1


def test_formulas_are_quoted_and_markdown_is_escaped(tmp_path):
    names = ["=1+1", "+A2", "-A3", "@SUM(A1)", "<img src=x>", "![p](http:x)", "\x1b[31mred", "\t=4"]
    for name in names:
        made(tmp_path / "runs" / name, 0.5, note=f"={name}", rate=-0.5)
    failed = tmp_path / "runs" / "failed"
    failed.mkdir()
    (failed / "train.log").write_text("[t][intern][ERROR] =cmd|' /C calc'!A0 <img src=y> https://example.org\x1b[2J\n")
    runs = read_runs([str(tmp_path / "runs")], "score", None)
    write_overview(runs, tmp_path, notes(runs), "score")
    with (tmp_path / "compare.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    cells = {cell for row in rows for cell in row}
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+", "@"))]
    assert {cell for cell in cells if cell.startswith("-")} == {"-0.5"}  # a number stays one
    assert {"'=1+1", "'+A2", "'-A3", "'@SUM(A1)", "<img src=x>", "\\x1b[31mred", "\\t=4"} <= cells
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "<img" not in text and "&lt;img src=x>" in text and "&lt;img src=y>" in text
    assert not re.search(r"(?<!\\)\]\(http", text) and "https://" not in text
    assert not [c for c in text + "".join(cells) if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_tables_are_readable_at_every_width(tmp_path, monkeypatch, capsys, width):
    for number in range(3):
        run = made(
            tmp_path / f"a_rather_long_name_of_a_run_{number}",
            0.5 + number / 10,
            rank=8 * 2**number,
            evaluation=0.2 + number / 10,
            model={"pretrained_model_name_or_path": f"/a/very/long/folder/of/models/base{number}"},
            prompt={"system": "You are an assistant. " * 20 + str(number)},
        )
        assert Run(run).finished
    for number in range(2):
        failed = tmp_path / f"failed{number}"
        (failed / ".hydra").mkdir(parents=True)
        (failed / ".hydra" / "overrides.yaml").write_text(f"- experiment=tiny_cpu\n- lora.r={number}\n")
        (failed / "train.log").write_text(f"[t][intern][ERROR] {'the reason is a long text ' * 4}\n")
    # A terminal whatever other tests of this process have left behind.
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: True))
    monkeypatch.setattr(Console, "encoding", property(lambda console: "utf-8"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")  # rich takes a dumb terminal for 80 columns wide
    monkeypatch.setenv("COLUMNS", str(width))
    runs = read_runs([str(tmp_path)], "score", None)
    show_runs(runs, 20, tmp_path, notes(runs))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    drawn = [line for line in printed.splitlines() if line.startswith(("│", "┃", "┏", "└", "├", "┡"))]
    assert drawn, printed
    assert max(map(len, drawn)) <= width
    for number in range(3):  # no number is broken
        assert re.search(rf"\b0\.{5 + number}00\b", printed)
        assert f"base{number}" in printed or width < 80
        assert f"[0.{1 + number}00,0.{3 + number}00]" in printed.replace(", ", ",")
    assert "/a/very" not in printed and "You are" not in printed and "prompt.system" in printed
    assert "experiment=tiny_cpu" not in printed and "lora.r=1" in printed
    assert "★…0" in printed and "… is a_rather_long_name_of_a_run_\n" in printed
    assert ("Left out at this width" in printed) is (width < 140)
