"""intern.runs removes what it lists and nothing else: no link's target, no running run, no file that no run wrote."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers import run_directory as made

from intern.comparison.groups import run_folders
from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.removal import is_ours, of_checkpoints, of_run, remove, size_of
from intern.runs.state import State, is_locked, state_of


@pytest.fixture
def work(tmp_path):
    """Runs of every state below outputs/."""
    outputs = tmp_path / "outputs"
    made(outputs / "good", 0.5, name="the good one")
    made(outputs / "bad", 0.9)
    made(outputs / "worse", 1.5)
    made(outputs / "other", 3.0, golden="harder")
    made(outputs / "failed", failure="lora.r=0: must be at least 1")
    made(outputs / "stopped")
    return tmp_path


def there(work):
    return sorted(path.name for path in (work / "outputs").iterdir())


def test_a_list_says_what_goes_and_nothing_goes_without_an_answer(work, asked):
    done = asked(work, "remove=failed", check=False)
    assert done.returncode == 2 and done.stderr == "nothing was removed: add yes=true to remove what is listed\n"
    assert "| outputs/failed | the run | nothing |" in done.stdout and "1 of 6 runs" in done.stdout
    assert "failed" in there(work)


def test_failed_runs_are_removed_whole_and_no_others(work, asked):
    asked(work, "remove=failed", "yes=true")
    assert there(work) == ["bad", "good", "other", "stopped", "worse"]


def test_checkpoints_of_finished_runs_are_removed_and_those_of_the_best_kept_if_asked(work, asked):
    done = asked(work, "remove=checkpoints", "keep_best=1", "yes=true")
    with_checkpoints = [name for name in there(work) if (work / "outputs" / name / "checkpoints").exists()]
    assert with_checkpoints == ["failed", "good", "other", "stopped"], done.stdout
    assert (work / "outputs/bad/adapter/weights").is_file() and "Removed from 2 of 2 runs." in done.stdout
    assert "There is nothing to remove." in asked(work, "remove=checkpoints", "match=worse", "yes=true").stdout


def test_the_best_runs_on_each_golden_file_are_kept(work, asked):
    asked(work, "keep_best=2", "yes=true")
    assert there(work) == ["bad", "failed", "good", "other", "stopped"]


def test_links_are_not_followed_and_what_no_run_wrote_stays(tmp_path):
    run = made(tmp_path / "run", failure="x")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("keep")
    (run.path / "evaluation").symlink_to(victim)
    (run.path / "checkpoints" / "linked").symlink_to(victim)
    (run.path / "notes.txt").write_text("mine")
    removal = of_run(run)
    assert removal.left == ["evaluation", "notes.txt", "checkpoints/linked"]
    assert removal.size == sum(size_of(path) for path in removal.paths) and 5000 < removal.size < 10_000
    remove(removal)
    assert (victim / "file").read_text() == "keep"
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "evaluation", "notes.txt"]


def test_what_no_training_wrote_stays_in_the_checkpoints_folder_too(tmp_path):
    run = Run(tmp_path)
    for name in ("checkpoint-2", "damaged-checkpoint-4", "live", "checkpoint-old"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (run.checkpoints / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "config.yaml").write_text("")
    mine = ["checkpoint-6", "checkpoint-old", "live", "notes.txt"]
    removal = of_checkpoints(run)
    assert removal.left == [f"checkpoints/{name}" for name in mine]
    assert of_run(run).left == ["elsewhere", *removal.left] and run.checkpoints not in of_run(run).paths
    remove(removal)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == mine and (tmp_path / "elsewhere").is_dir()


def test_a_link_that_a_glob_finds_leads_to_no_run(tmp_path):
    (tmp_path / "foreign" / "x").mkdir(parents=True)
    (tmp_path / "foreign" / "x" / "config.yaml").write_text("")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "lnk").symlink_to(tmp_path / "foreign" / "x")
    with pytest.raises(UserError, match="no such folder"):
        list(run_folders(f"{tmp_path}/outputs/*"))
    assert list(run_folders(f"{tmp_path}/outputs/lnk")) == [tmp_path / "foreign" / "x"]


def test_a_folder_that_has_become_a_link_is_left(tmp_path):
    run, victim = made(tmp_path / "run", 0.5), tmp_path / "victim"
    removal = of_checkpoints(run)
    run.checkpoints.rename(victim)
    run.checkpoints.symlink_to(victim)
    with pytest.raises(UserError, match="checkpoints: has become a link"):
        remove(removal)
    assert (victim / "checkpoint-2").is_dir() and of_checkpoints(run) is None


def test_a_run_in_which_a_process_trains_is_running_and_is_not_removed(tmp_path, asked):
    run = made(tmp_path / "outputs" / "run", failure="of an earlier attempt")
    code = "import sys; from pathlib import Path; from intern.runs.lock import lock; from intern.runs.directory import Run\n"
    code += "with lock(Run(Path(sys.argv[1]))): print('locked', flush=True); sys.stdin.read()"
    line = [sys.executable, "-c", code, str(run.path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "locked\n"
        assert state_of(run) is State.RUNNING
        with pytest.raises(UserError, match="another process trains in it"):
            remove(of_run(run))
        assert "There is nothing to remove." in asked(tmp_path, "remove=failed", "yes=true").stdout
        process.stdin.close()
    assert state_of(run) is State.FAILED and not is_locked(run)


def test_another_programs_folder_is_never_removed(work, asked):
    other = work / "outputs" / "project"
    (other / "checkpoints").mkdir(parents=True)
    (other / "train.log").write_text("[2024][x][ERROR] failed\n")
    (other / "config.yaml").write_text("lr: 1\n")
    assert state_of(Run(other)) is State.FAILED and not is_ours(Run(other))
    asked(work, "remove=failed", "yes=true")
    assert (other / "checkpoints").is_dir()


def test_a_run_that_a_full_disk_stopped_counts_as_interrupted(tmp_path):
    run = made(tmp_path / "run", failure="no space")
    run.write_json(run.failure, {"exit_code": 1, "error": "no space left", "begins_anew": False})
    assert state_of(run) is State.INTERRUPTED
    assert state_of(made(tmp_path / "early", checkpoints=False, failure="x")) is State.FAILED


def test_one_failure_does_not_keep_the_rest_from_being_removed(work, asked):
    held = Run(work / "outputs" / "bad")
    (held.path / "run.lock").unlink()
    (held.path / "run.lock").symlink_to(work / "victim")
    done = asked(work, "remove=checkpoints", "yes=true", check=False)
    assert done.returncode == 1 and "run.lock: is a link" in done.stderr and done.stderr.count("\n") == 1
    assert held.checkpoints.is_dir() and not (work / "outputs/good/checkpoints").exists()
    assert not (work / "victim").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remove=all"], "remove=all: must be checkpoints or failed"),
        (["keep_best=0"], "keep_best=0: must be a number of runs, at least 1"),
        (["remove=failed", "keep_best=1"], "failed runs have no score"),
        (["show=x", "remove=failed"], "show= and remove=: give one of them at a time"),
        (["yes=perhaps", "remove=failed"], "yes=perhaps: must be true or false"),
        (["state=broken"], "state=broken: unknown state; the known states are failed, finished, interrupted, running"),
        (["sort_by=colour"], "sort_by=colour: must be one of date, name"),
        (["out=x.zip"], "out=x.zip: only pack= writes a file"),
        (["show=nowhere"], "no such folder, and no run below outputs/ or multirun/ has this name"),
    ],
)
def test_a_mistake_is_one_line_and_removes_nothing(arguments, message, tmp_path, asked):
    made(tmp_path / "outputs" / "run", failure="x")
    done = asked(tmp_path, *arguments, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "outputs" / "run" / "failure.json").is_file()


def test_a_terminal_is_asked(work):
    import pty

    for answer in ("n\n", "y\n"):
        parent, child = pty.openpty()
        line = [sys.executable, "-m", "intern.runs", "remove=failed"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        process = subprocess.Popen(line, cwd=work, stdin=child, stdout=child, stderr=child, env=environment)
        os.close(child)
        os.write(parent, answer.encode())
        said = b""
        try:
            while part := os.read(parent, 4096):
                said += part
        except OSError:  # the terminal's other end was closed
            pass
        process.wait()
        os.close(parent)
        assert b"Remove this for good, " in said
        assert ("failed" in there(work)) is (answer == "n\n")


def test_a_story_of_hostile_files_has_no_traceback(work, asked):
    run = Run(work / "outputs" / "good")
    run.metrics.write_text(
        json.dumps({"train_loss": "x", "eval_loss": 1, "train_tokens": "y", "peak_gpu_gib": [], "best_step": {}})
    )
    run.environment.write_text(
        json.dumps({"gpu": "x", "git": [], "packages": 3, "command": [1, "\x1b[31m"], "data": 7})
    )
    run.history.write_text('{"step": 1, "loss": 1e300}\n{"step": 2, "loss": "x"}\n')
    (run.evaluation / "g").mkdir(parents=True)
    (run.evaluation / "g" / "metrics.json").write_text(
        '{"groups": [{"scores": {"token_f1": {"before": 1, "after": {"value": "x"}}}}]}'
    )
    done = asked(work, "show=the good one")
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout and "overrides" in done.stdout
