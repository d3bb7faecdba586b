"""A run that is refused changes nothing in its folder, and leaves no folder that was not there."""

import hashlib
import logging
import shutil

import pytest
from helpers import ROOT, SHORT, command, train

from intern.cli.start import RunLog
from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.lock import lock

SAME = (*SHORT, "logger.sample_answers=2")  # the command line of trained_run


def fingerprint(folder):
    """A hash of each file below a folder, by its path, and None for each folder."""
    found = sorted(folder.rglob("*"))
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in found}


@pytest.fixture(scope="module")
def runs(trained_run, tmp_path_factory):
    """The finished run, and the same as a kill after its last checkpoint would have left it, in the folders of a sweep."""
    folder = tmp_path_factory.mktemp("started")
    for job in ("0", "1"):
        shutil.copytree(trained_run, folder / job)
    Run(folder / "0").metrics.unlink()
    (folder / "multirun.yaml").write_text("of the first start")
    return folder


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ((*SAME, "lora.r=4", "hydra.run.dir={}/0"), "differs from what {}/0 was started with"),
        (("resume={}/0", "lora.r=4"), "differs from what {}/0 was started with"),
        (("--multirun", *SAME, "seed=1,2", "hydra.sweep.dir={}"), "seed differs from what {}/0 was started with"),
    ],
    ids=["start", "resume", "sweep"],
)
def test_a_refused_start_changes_no_file_of_the_run_that_is_there(start, message, runs):
    before = fingerprint(runs)
    assert len(before) > 80
    done = command("intern.train", *(part.replace("{}", str(runs)) for part in start), check=False)
    assert done.returncode == 2 and message.replace("{}", str(runs)) in done.stderr
    assert fingerprint(runs) == before


@pytest.mark.parametrize(
    "start",
    [
        ("experiment=tiny_cpu", "lora.r=0"),
        ("--multirun", "experiment=tiny_cpu", "lora.r=0", "seed=1,2"),
        ("--multirun", "experiment=tiny_cpu", "lora.rr=4,8"),
    ],
    ids=["run", "all jobs", "a sweep's key"],
)
def test_a_mistake_leaves_no_folder_not_even_that_of_the_date(start, tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = command("intern.train", *start, cwd=tmp_path, check=False, **environment)
    assert done.returncode == 2 and done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_base_without_weights_changes_nothing_either(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "data" / "tiny_llama3", base, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=str(base)):
        train(tmp_path / "run", f"model.pretrained_model_name_or_path={base}", "data.eval_file=null")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_started_run_has_its_command_line_and_every_message(trained_run):
    assert "- trainer.max_steps=12" in (trained_run / ".hydra" / "overrides.yaml").read_text()
    assert {path.name for path in (trained_run / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    lines = (trained_run / "train.log").read_text().splitlines()
    assert "golden rows" in lines[0] and "next: python -m intern.compare" in lines[-1]
    assert any(line.endswith(f"saved first try ({trained_run})") for line in lines), lines[-6:]


def test_a_log_keeps_messages_until_it_is_opened(tmp_path):
    log = RunLog(str(tmp_path / "train.log"))
    log.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.Logger("run")
    logger.addHandler(log)
    logger.warning("first")
    assert list(tmp_path.iterdir()) == []
    log.open()
    log.open()
    logger.info("second")
    log.close()
    assert (tmp_path / "train.log").read_text() == "WARNING first\nINFO second\n"


@pytest.mark.parametrize("was_there", [True, False])
def test_a_refused_start_leaves_no_lock_file_where_there_was_none(was_there, tmp_path):
    if was_there:
        (tmp_path / "run.lock").touch()
    with pytest.raises(UserError), lock(Run(tmp_path)):
        assert (tmp_path / "run.lock").exists()
        raise UserError("refused")
    assert (tmp_path / "run.lock").exists() is was_there
