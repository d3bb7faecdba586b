"""run_dir= and resume= find the run that is meant, and no other."""

import os
import time

import pytest
from omegaconf import OmegaConf

from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.find import find_unfinished, resolve, resolve_all
from intern.runs.lock import lock


def finished(path, loss, age=0, golden="golden", **config):
    """A finished run; `golden` is the content of its golden file, None: it has none."""
    path.mkdir(parents=True)
    run = Run(path)
    run.write_config(OmegaConf.create({"seed": 1, "data": {"eval_file": f"/data/{golden}.jsonl"}, **config}))
    run.write_json(run.environment, {"data": {f"/data/{golden}.jsonl": f"digest of {golden}"}})
    run.write_json(run.metrics, {"train_loss": 0.1} | ({"eval_loss": loss} if golden else {}))
    os.utime(run.metrics, (1e9 - age, 1e9 - age))
    return path


def test_latest_best_sweeps_and_paths_are_found(tmp_path):
    old_best = finished(tmp_path / "outputs/2024-01-01/10-00-00", 0.5, age=100)
    newest = finished(tmp_path / "outputs/2024-01-02/10-00-00", 0.9)
    job0 = finished(tmp_path / "multirun/2024-01-01/11-00-00/0", 0.8, age=50)
    job1 = finished(tmp_path / "multirun/2024-01-01/11-00-00/1", 0.7, age=60)
    assert resolve("latest", tmp_path).path == newest
    assert resolve("best", tmp_path).path == old_best
    assert resolve("multirun/2024-01-01/11-00-00", tmp_path).path == job1
    assert resolve(job0, tmp_path).path == job0
    assert resolve("outputs/2024-01-02/10-00-00", tmp_path).path == newest


def test_a_line_says_which_run_was_chosen(tmp_path, caplog):
    caplog.set_level("INFO", "intern.runs.find")
    finished(tmp_path / "outputs/a", 0.5, age=100, name="first try")
    finished(tmp_path / "outputs/b", 0.9)
    finished(tmp_path / "multirun/c/0", 0.7, age=50)
    finished(tmp_path / "multirun/c/1", 0.8, age=50)
    for asked in ("latest", "best", "multirun/c", "outputs/a"):
        resolve(asked, tmp_path)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(1e9))
    assert caplog.messages == [
        f"run_dir=latest: outputs/b, finished {when}",
        "run_dir=best: first try (outputs/a), golden loss 0.5000 on golden.jsonl, the best of 4",
        "run_dir=multirun/c: multirun/c/0, golden loss 0.7000 on golden.jsonl, the best of 2",
    ]


def test_a_run_is_found_by_its_name_and_a_sweep_by_that_of_its_jobs(tmp_path):
    named = finished(tmp_path / "outputs/a", 0.5, name="rank 8: a try")
    jobs = [finished(tmp_path / f"multirun/c/{job}", 0.9 - job / 10, name=f"ranks/{job}") for job in range(2)]
    assert resolve("rank 8: a try", tmp_path).path == named
    assert resolve("ranks", tmp_path).path == jobs[1] and resolve("ranks/0", tmp_path).path == jobs[0]
    assert [run.path for run in resolve_all("ranks", tmp_path)] == jobs
    finished(tmp_path / "outputs/b", 0.5, name="rank 8: a try")
    with pytest.raises(UserError, match=r"2 runs have this name: give the folder of one: outputs/a, outputs/b"):
        resolve("rank 8: a try", tmp_path)
    with pytest.raises(UserError, match="no such folder, and no run below outputs/ or multirun/ has this name"):
        resolve("rank", tmp_path)


def test_an_unfinished_run_is_resumed_by_its_name(tmp_path):
    (path := finished(tmp_path / "outputs/a", 0.5, name="first") / "metrics.json").unlink()
    assert find_unfinished("first", tmp_path).path == path.parent
    with pytest.raises(UserError, match="this run is not finished"):
        resolve("first", tmp_path)


def test_the_best_run_is_chosen_among_those_with_the_same_golden_rows_only(tmp_path):
    finished(tmp_path / "outputs/a", 0.9)
    best = finished(tmp_path / "outputs/b", 0.8)
    finished(
        tmp_path / "outputs/trained", None, golden=None
    )  # a training loss of 0.1, which says nothing about golden rows
    assert resolve("best", tmp_path).path == resolve("outputs", tmp_path).path == best
    finished(tmp_path / "outputs/other", 0.2, golden="easy")
    with pytest.raises(UserError, match="the 3 finished runs were scored on different rows") as caught:
        resolve("best", tmp_path)
    assert str(caught.value).endswith(
        "The best of 2 on golden.jsonl: run_dir=outputs/b; the best of 1 on easy.jsonl: run_dir=outputs/other"
    )


def test_held_out_rows_are_the_same_only_with_the_same_share_and_seed(tmp_path):
    def held(name, loss, **data):
        return finished(tmp_path / "outputs" / name, loss, data={"train_file": "/t", "eval_file": None, **data})

    held("a", 0.5, eval_share=0.1, seed=42)
    best = held("b", 0.4, eval_share=0.1, seed=42)
    assert resolve("best", tmp_path).path == best
    held("c", 0.3, eval_share=0.1, seed=43)
    with pytest.raises(UserError, match="scored on different rows"):
        resolve("best", tmp_path)


def test_runs_without_golden_rows_are_ranked_by_their_training_loss(tmp_path):
    only = finished(tmp_path / "outputs/a", None, golden=None)
    assert resolve("best", tmp_path).path == only
    (only / "metrics.json").write_text('{"train_loss": null}')
    with pytest.raises(UserError, match="none of the 1 finished runs has a score that can be read"):
        resolve("best", tmp_path)


def test_a_mistyped_name_and_a_packed_run_say_what_to_give(tmp_path):
    for place in ("outputs/a", "multirun/b/0"):
        (tmp_path / place).mkdir(parents=True)
        name = "first try" if place == "outputs/a" else "ranks/0"
        Run(tmp_path / place).write_config(OmegaConf.create({"name": name}))
    with pytest.raises(UserError, match=r"has this name; did you mean first try\?"):
        resolve("frist try", tmp_path)
    with pytest.raises(UserError, match=r"did you mean ranks\?"):
        resolve("rank", tmp_path)
    (tmp_path / "run.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="is a file; unpack a packed run and give the folder that was in it"):
        resolve("run.zip", tmp_path)


def test_a_run_that_is_not_finished_says_what_to_do_about_it(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.write_config(OmegaConf.create({"seed": 1}))
    run.append_history({"step": 3})
    with pytest.raises(
        UserError,
        match=r"\(interrupted; step 3 was the last one logged\): to resume it: python -m intern.train resume=",
    ):
        resolve(run.path)
    with lock(run), pytest.raises(UserError, match=r"\(still training; step 3 .*\): wait until it has finished"):
        resolve(run.path)
    run.write_json(run.failure, {"error": "no more disk", "begins_anew": True})
    with pytest.raises(UserError, match=r"\(failed: no more disk\): fix the cause and train again"):
        resolve(run.path)


def test_an_unfinished_run_is_never_taken_for_a_finished_one(tmp_path):
    unfinished = tmp_path / "outputs/2024-01-03/10-00-00"
    unfinished.mkdir(parents=True)
    Run(unfinished).write_config(OmegaConf.create({"seed": 1}))
    with pytest.raises(UserError, match="this run is not finished"):
        resolve(unfinished)
    with pytest.raises(UserError, match="no finished run below"):
        resolve("latest", tmp_path)


@pytest.mark.parametrize(
    ("given", "message"), [("nowhere", "no such folder"), (".", "neither a run"), ("best", "no finished run")]
)
def test_what_is_no_run_is_named(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        resolve(given, tmp_path)


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    finished(tmp_path / "outputs/a", 2.0)
    broken = finished(tmp_path / "outputs/0", 1.0)
    (broken / "metrics.json").write_text('{"eval_loss": null}')
    assert resolve("best", tmp_path).path == tmp_path / "outputs/a"


def test_links_are_not_followed_in_the_search_for_runs(tmp_path):
    finished(tmp_path / "elsewhere/run", 0.1)
    kept = finished(tmp_path / "outputs/day/run", 0.9)
    (tmp_path / "outputs/day/linked").symlink_to(tmp_path / "elsewhere")
    linked = tmp_path / "outputs/day/metrics by a link"
    linked.mkdir()
    (linked / "config.yaml").write_text("seed: 1")
    (linked / "metrics.json").symlink_to(tmp_path / "elsewhere/run/metrics.json")
    assert resolve("best", tmp_path).path == resolve("latest", tmp_path).path == kept


def test_the_search_ends_in_a_ring_of_links_and_in_folders_without_end(tmp_path, monkeypatch):
    kept = finished(tmp_path / "outputs/run", 0.5)
    (tmp_path / "outputs/ring").symlink_to(tmp_path / "outputs")
    finished(tmp_path / "outputs" / "/".join("abcdefghij"), 0.1)
    assert resolve("best", tmp_path).path == kept
    monkeypatch.setattr("intern.runs.find._MOST_FOLDERS", 1)
    with pytest.raises(UserError, match="no finished run"):
        resolve("best", tmp_path)


def test_what_lies_inside_a_run_is_not_another_run(tmp_path):
    kept = finished(tmp_path / "outputs/run", 0.5)
    for inside in ("evaluation/gold8", "checkpoints/checkpoint-2", "wandb/run"):
        finished(kept / inside, 0.1)
    assert resolve("best", tmp_path).path == resolve("latest", tmp_path).path == kept


@pytest.mark.parametrize(
    "metrics", ['{"eval_loss": 1e999}', '{"eval_loss": ' + "9" * 400 + "}", "[", '{"eval_loss": 1e308}']
)
def test_a_run_whose_metrics_cannot_be_read_does_not_keep_others_from_being_found(metrics, tmp_path):
    kept = finished(tmp_path / "outputs/a", 2.0)
    (finished(tmp_path / "outputs/b", 1.0) / "metrics.json").write_text(metrics)
    assert resolve("best", tmp_path).path == kept


@pytest.mark.parametrize("name", ["train.log", "checkpoints", "wandb", "history.jsonl", "adapter", ".hydra"])
def test_a_run_with_a_link_in_it_is_not_resumed(name, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    Run(run).write_config(OmegaConf.create({"seed": 1}))
    assert find_unfinished(run).path == run
    (run / name).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=f"{run / name}: is a link"):
        find_unfinished(run)
