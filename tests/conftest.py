"""What several tests share: a finished run of the tiny base, made once for the whole suite."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import absl.logging
import pytest

ROOT = Path(__file__).resolve().parent.parent
# No test asks a network for anything; a W&B key of the person who runs the tests must not be used either.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
# Two workers on two cores: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# rouge-score brings this logger: at the next configuration of logging it closes the stream that it found when it was imported.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


def command(
    *arguments: str | Path, cwd: Path = ROOT, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ...` as a user would."""
    line = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert not check or done.returncode == 0, f"{' '.join(line)}\n{done.stdout}\n{done.stderr}"
    return done


def _few_golden_rows() -> Path:
    """32 rows of each half: scoring all of them after every short run would take most of the suite's time."""
    folder = Path(tempfile.mkdtemp(prefix="intern-tests-"))
    atexit.register(shutil.rmtree, folder)
    lines = (ROOT / "data" / "golden_test_set.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    halves = [[line for line in lines if json.loads(line)["seen_chunk"] is seen] for seen in (True, False)]
    (folder / "golden_test_set.jsonl").write_text("".join(halves[0][:32] + halves[1][:32]), encoding="utf-8")
    return folder / "golden_test_set.jsonl"


GOLDEN = _few_golden_rows()
SHORT = (
    "experiment=tiny_cpu",
    f"data.eval_file={GOLDEN}",
    "data.context=never",
    "trainer.max_steps=12",
    "trainer.min_steps=12",
    "trainer.save_steps=6",
    "trainer.logging_steps=2",
)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default length of the tests, with an offline W&B run."""
    target = tmp_path_factory.mktemp("run") / "first"
    command("intern.train", *SHORT, "logger.sample_answers=2", f"hydra.run.dir={target}")
    return target


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a JSONL file of the given rows (dicts, or text as it stands)."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
        )
        return path

    return write
