"""What several tests share: a finished run of the tiny base, made once for the whole suite."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import absl.logging
import pytest
from helpers import SHORT, command

# No test asks a network for anything; a W&B key of the person who runs the tests must not be used either.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
# Two workers on two cores: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# rouge-score brings this logger: at the next configuration of logging it closes the stream that it found when it was imported.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def the_environment_stays_the_same_object() -> Iterator[None]:
    """Libraries hold `os.environ` from their import: a test that leaves another one behind breaks others, far from itself."""
    environment = os.environ
    yield
    replaced, os.environ = os.environ is not environment, environment
    assert not replaced, "os.environ is another object than before this test"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default length of the tests, with an offline W&B run."""
    target = tmp_path_factory.mktemp("run") / "first"
    command(
        "intern.train",
        *SHORT,
        "logger.sample_answers=2",
        "name=first try",
        "notes=To share it.",
        f"hydra.run.dir={target}",
    )
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
