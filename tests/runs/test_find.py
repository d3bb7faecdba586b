"""run_dir= and resume= find the run that is meant, and no other."""

import os

import pytest
from omegaconf import OmegaConf

from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.find import find_unfinished, resolve


def finished(path, loss, age=0):
    path.mkdir(parents=True)
    run = Run(path)
    run.write_config(OmegaConf.create({"seed": 1}))
    run.write_json(run.metrics, {"eval_loss": loss, "train_loss": 9.0})
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


def test_an_unfinished_run_is_never_taken_for_a_finished_one(tmp_path):
    unfinished = tmp_path / "outputs/2024-01-03/10-00-00"
    unfinished.mkdir(parents=True)
    Run(unfinished).write_config(OmegaConf.create({"seed": 1}))
    with pytest.raises(UserError, match="this run is unfinished"):
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
