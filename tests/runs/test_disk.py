"""Full, read-only and slow disks outside of training: one line, and nothing that was written before is lost."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from helpers import GOLDEN, command, composed, made

from intern.comparison.files import write_overview
from intern.comparison.groups import read_runs
from intern.errors import RunError
from intern.evaluation.evaluate import as_json, evaluate
from intern.evaluation.report import write_report
from intern.runs.directory import Run
from intern.runs.disk import explain_disk_errors, unwritable


class Disk:
    """A small file system."""

    def __init__(self, path, size):
        self.path, self.filler = path, path / "filler"
        path.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if os.geteuid() != 0 or subprocess.run(line, check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")

    def fill(self, left=0):
        found = os.statvfs(self.path)
        with self.filler.open("wb") as file:
            file.write(b"x" * max(0, found.f_bavail * found.f_frsize - left))

    def remount(self, how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    disks = []

    def mount(size):
        disks.append(Disk(tmp_path / f"disk{len(disks)}", size))
        return disks[-1]

    yield mount
    for one in disks:
        subprocess.run(["umount", "-l", str(one.path)], check=True)


def contents(folder):
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "filler"}


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_an_earlier_evaluation_stays_whole(how, disk, trained_run, tmp_path):
    small = disk("64m")
    run = Run(small.path / "run")
    shutil.copytree(trained_run, run.path, ignore=shutil.ignore_patterns("checkpoints", "wandb", "evaluation"))
    golden = tmp_path / "golden.jsonl"
    golden.write_text("".join(GOLDEN.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))

    def evaluated(*more):
        cfg = composed(f"eval_file={golden}", "resamples=100", "generation.max_new_tokens=2", *more, name="evaluate")
        with explain_disk_errors(run.evaluation, "free some space"):
            evaluation = evaluate(cfg, run, None)
            write_report(evaluation)
            run.write_json(Run(evaluation.folder).metrics, as_json(evaluation))

    evaluated()
    before = contents(run.evaluation)
    assert len(before) >= 6
    small.fill(left=0)
    if how == "read-only":
        small.remount("ro")
    for more in ([], ["batch_size=2"], ["name=other"]):
        with pytest.raises((RunError, ValueError), match=f"{small.path}.*({os.strerror(errno.ENOSPC)}|Read-only)"):
            evaluated(*more)
        assert contents(run.evaluation) == before
    if how == "read-only":
        small.remount("rw")
    small.filler.unlink()
    evaluated()
    assert contents(run.evaluation).keys() == before.keys()


def test_an_earlier_comparison_stays_whole(disk, tmp_path):
    for number in range(3):
        made(tmp_path / f"runs/{number}", 1.0 + number, rank=2**number)
    small = disk("8m")
    runs = read_runs([str(tmp_path / "runs")], "score", None)
    write_overview(runs, small.path, [], "score")
    before = contents(small.path)
    assert {"compare.csv", "compare.md", "loss_curves.png"} <= {Path(name).name for name in before}
    for left in (0, 8192, 40_000):
        small.fill(left)
        made(tmp_path / f"runs/more{left}", 0.5, rank=64)
        with (
            pytest.raises(RunError, match="No space left on device: free some"),
            explain_disk_errors(small.path, "free some"),
        ):
            write_overview(read_runs([str(tmp_path / "runs")], "score", None), small.path, ["x" * 50_000], "score")
        after = contents(small.path)
        assert after.keys() == before.keys() and all(after[name] for name in after)
        small.filler.unlink()


@pytest.mark.parametrize("size", ["4k", "64k", "900k", "4m"])
def test_a_datasets_cache_on_a_small_disk_is_one_line(size, disk, monkeypatch):
    from intern.inspection.preview import prepare

    small = disk(size)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(small.path))
    with pytest.raises(RunError, match=f"{small.path}: the cache of rows cannot be written .*set HF_DATASETS_CACHE"):
        prepare(composed("experiment=tiny_cpu", "logger=none", "lengths=null", name="preview"))


def test_a_preview_on_a_full_disk_is_one_line(disk, tmp_path):
    small = disk("64k")
    small.fill()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a?", "answer": "b"}\n' * 3)
    line = [
        "intern.preview",
        "experiment=tiny_cpu",
        f"data.train_file={rows}",
        "data.context=never",
        f"lengths={small.path}/lengths.png",
    ]
    done = command(*line, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No space left on device: free some space or make it writable, then run the same command" in done.stderr
    assert [file.name for file in small.path.iterdir()] == ["filler"]


def test_the_reason_is_found_in_whatever_a_library_raises():
    for error in (
        OSError(errno.EROFS, "x", "/a"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file"),
        ValueError("I/O error: No space left on device (os error 28)"),
        ValueError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.EIO, "Input/output error"),
    ):
        try:
            try:
                raise error
            except Exception as inner:
                raise KeyError("of a library") from inner
        except KeyError as outer:
            assert unwritable(outer)[1] in {os.strerror(n) for n in (errno.EROFS, errno.ENOSPC, errno.EFBIG, errno.EIO)}
    assert unwritable(FileNotFoundError(errno.ENOENT, "x")) is None and unwritable(KeyError("x")) is None


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path):
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from pathlib import Path\n"
        "from intern.runs.directory import Run\n"
        "from intern.runs.disk import explain_disk_errors\n"
        f"run = Run(Path({str(tmp_path)!r}))\n"
        "run.write_text(run.history, 'first')\n"
        "try:\n"
        "    with explain_disk_errors(run.path, 'remedy'): run.write_text(run.history, 'x' * 5000)\n"
        "except Exception as error: print(type(error).__name__, error, run.history.read_text(), len(list(run.path.iterdir())))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"RunError {tmp_path}/history.jsonl: File too large: remedy first 1\n"
