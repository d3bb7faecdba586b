"""Files of a run directory are opened without following links, are regular, have a bounded size, and are replaced by rename."""

import os
import shutil
import socket

import pytest
from helpers import composed

from intern.errors import UserError
from intern.evaluation.evaluate import evaluate
from intern.runs.directory import Run
from intern.runs.files import append_text, check_folder, exists, make_folder, read_bytes, remove_file, write_text


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run/evaluation/gold8").mkdir(parents=True)
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / "elsewhere/gold8").mkdir(parents=True)
    return Run(tmp_path / "run")


def lay(kind, path, victim):
    """Puts something else than an ordinary file at `path`."""
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "link that leads nowhere":
        path.symlink_to(victim.with_name("new"))
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link inside the run":
        (path.parent / "other").write_text("{}")
        path.symlink_to("other")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # the path of a socket is short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.fchdir(here)


KINDS = (
    *("link", "link that leads nowhere", "link to itself", "link inside the run", "pipe", "device", "folder", "socket"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "act",
    [
        lambda run, path: read_bytes(path, run.path, 100),
        lambda run, path: write_text(path, run.path, "mine"),
        lambda run, path: append_text(path, run.path, "mine"),
        lambda run, path: exists(path, run.path),
        lambda run, path: run.read_json(path),
        lambda run, path: run.write_json(path, {}),
        lambda run, path: run.prepare_evaluation(path.parent.name),
    ],
    ids=["read", "write", "append", "exists", "read_json", "write_json", "prepare_evaluation"],
)
def test_only_regular_files_are_opened(kind, act, run, tmp_path, request):
    path = run.evaluation / "gold8" / "report.html"
    lay(kind, path, tmp_path / "victim")
    if kind == "folder" and "prepare" in request.node.name:
        return  # an evaluation may have folders
    with pytest.raises(UserError) as caught:
        act(run, path)
    assert str(path) in str(caught.value)
    assert (tmp_path / "victim").read_text() == "untouched" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", ["evaluation", "evaluation/gold8"])
@pytest.mark.parametrize("act", ["read", "write", "append", "make", "remove", "evaluate", "config"])
def test_no_folder_of_a_run_leads_out_of_it(where, act, run, tmp_path):
    folder = run.path / where
    (run.evaluation / "gold8").rmdir()
    if where == "evaluation":
        run.evaluation.rmdir()
    folder.symlink_to(tmp_path / "elsewhere" / ("gold8" if where.endswith("gold8") else ""))
    file = run.evaluation / "gold8" / "metrics.json"
    (tmp_path / "elsewhere/gold8/metrics.json").write_text("{}")
    with pytest.raises(UserError, match=f"{folder}: is a link"):
        {
            "read": lambda: read_bytes(file, run.path, 100),
            "write": lambda: write_text(file, run.path, "mine"),
            "append": lambda: append_text(file, run.path, "mine"),
            "make": lambda: make_folder(run.evaluation / "gold8" / "inner", run.path),
            "remove": lambda: remove_file(file, run.path),
            "evaluate": lambda: run.prepare_evaluation("gold8"),
            "config": lambda: run.write_json(file, {}),
        }[act]()
    assert (tmp_path / "elsewhere/gold8/metrics.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "elsewhere/gold8").iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("path", ["../victim", "evaluation/../../victim", "/etc/hostname", "."])
def test_no_path_leads_out_of_the_run(path, run):
    for act in (lambda file: read_bytes(file, run.path, 100), lambda file: write_text(file, run.path, "")):
        with pytest.raises(UserError, match="leads out|is the run directory"):
            act(run.path / path)


@pytest.mark.parametrize(
    "place", ["evaluation", "evaluation/golden", "evaluation/golden/report.html", "evaluation/golden/.scores.png"]
)
def test_an_evaluation_writes_through_no_link(place, trained_run, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(trained_run, run.path, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    victim = tmp_path / "victim"
    if place.endswith(("html", "png")):
        victim.write_text("untouched")
    else:
        victim.mkdir()
    (run.path / place).parent.mkdir(parents=True, exist_ok=True)
    (run.path / place).symlink_to(victim)
    with pytest.raises(UserError, match=f"{run.path / place}: is a link"):
        evaluate(composed(f"run_dir={run.path}", "name=golden", name="evaluate"), run, None)
    assert victim.read_text() == "untouched" if victim.is_file() else not list(victim.iterdir())


def test_a_file_that_is_too_large_is_refused_without_reading_it(run, monkeypatch):
    with (run.path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"large: 1,048,576 MiB, and nothing that training writes there is larger"):
        read_bytes(run.path / "large", run.path, 2**20)


def test_the_draft_of_a_file_is_not_written_through_a_link_either(run, tmp_path):
    draft = run.path / f".metrics.json.{os.getpid()}"
    draft.symlink_to(tmp_path / "victim")
    run.write_json(run.metrics, {"a": 1})
    assert run.read_json(run.metrics) == {"a": 1} and (tmp_path / "victim").read_text() == "untouched"
    assert not draft.is_symlink()


def test_a_hard_link_keeps_the_other_file_as_it_was(run, tmp_path):
    os.link(tmp_path / "victim", run.history)
    run.append_history({"step": 1})
    run.append_history({"step": 2})
    assert (tmp_path / "victim").read_text() == "untouched"
    assert run.history.read_text() == 'untouched{"step": 1}\n{"step": 2}\n'
    os.link(tmp_path / "victim", run.evaluation / "gold8/predictions.jsonl")
    with pytest.raises(UserError, match="predictions.jsonl: is a hard link"):
        run.prepare_evaluation("gold8")


def test_a_plot_replaces_its_file_and_follows_no_link(run, tmp_path):
    with run.new_file(run.loss_plot) as file:
        file.write_bytes(b"first")
    with pytest.raises(RuntimeError), run.new_file(run.loss_plot) as file:
        file.write_bytes(b"half")
        raise RuntimeError
    assert run.loss_plot.read_bytes() == b"first"
    run.loss_plot.unlink()
    run.loss_plot.symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="loss.png: is a link"), run.new_file(run.loss_plot) as file:
        file.write_bytes(b"second")
    assert (tmp_path / "victim").read_text() == "untouched"


def test_a_lock_is_not_created_through_a_link(run, tmp_path):
    from intern.runs.lock import lock

    (run.path / "run.lock").symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match=r"run.lock: is a link"), lock(run):
        pass
    assert not (tmp_path / "new").exists()


def test_the_run_itself_may_be_reached_by_a_link(run, tmp_path):
    (tmp_path / "latest").symlink_to(run.path)
    linked = Run(tmp_path / "latest")
    linked.write_json(linked.metrics, {"a": 1})
    assert linked.read_json(linked.metrics) == run.read_json(run.metrics) == {"a": 1}


def test_a_folder_is_listed_without_what_is_not_regular(run):
    (run.evaluation / "gold8/a").write_text("")
    (run.evaluation / "gold8/inner").mkdir()
    assert check_folder(run.evaluation / "gold8", run.path) == ["a", "inner"]
    os.mkfifo(run.evaluation / "gold8/b")
    with pytest.raises(UserError, match="gold8/b: is not a regular file"):
        check_folder(run.evaluation / "gold8", run.path)
