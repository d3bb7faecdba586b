"""Data files -> checked rows in a dataset of `datasets`, cached by the files' content."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from intern.data.formats import FORMATS, Layout, RowSettings, conversation_row, detect
from intern.data.readers import lines, parse_json
from intern.display.progress import hidden_bars
from intern.errors import RunError, UserError
from intern.paths import find

log = logging.getLogger(__name__)

ROW = Features(
    {
        "row": Value("int64"),
        "seen_chunk": Value("bool"),
        "history": List({"question": Value("string"), "answer": Value("string")}),
        **{name: Value("string") for name in ("system", "question", "answer", "chunk_text", "chunk_id", "topic")},
    }
)
FORM = 2  # of cached rows: raised with every change of how they are read that is outside of intern/data/formats.py
_LONG_FILE = 2**25  # bytes from which reading is worth a progress bar


@dataclass(frozen=True)
class DataFile:
    """A data file (or a folder, or a dataset of the hub as `hub:owner/name`) and the SHA-256 of its content.

    The hash names it in caches and in the run's environment.json.
    """

    path: Path
    sha256: str

    @classmethod
    def find(cls, path: str, key: str) -> "DataFile":
        """Find a file in the working directory, then in the project.

        Raises:
            UserError: naming the config key, if there is no such file.
        """
        found = find(path)
        if found is None or not found.is_file():
            raise UserError(f"{key}={path}: no such file, neither in the working directory nor in the project")
        try:
            with found.open("rb") as file:
                return cls(found, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserError(f"{key}={path}: cannot be read ({error.strerror})") from error


def read_rows(file: DataFile, needs_material: bool) -> Dataset:
    """Read and check the rows of a file whose format is detected.

    Args:
        file: the file.
        needs_material: whether every row must have a context (data.context is always or mixed).

    Returns:
        A dataset as `read_file` makes it.

    Raises:
        UserError: naming file and row, if a row is not as it must be.
        RunError: the cache cannot be written.
    """
    return read_file(file, RowSettings(needs_context=needs_material))[0]


def read_file(file: DataFile, settings: RowSettings, first: int = 0) -> tuple[Dataset, str]:
    """Read and check the rows of a file; memory-mapped, and cached by content.

    Args:
        file: the file.
        settings: how a row is read.
        first: added to the row numbers, so that rows of several files have different ones.

    Returns:
        A dataset with the columns of `ROW`, and the row format that was found, for a person. `row` is 1 for the first line of a file;
        `question` and `answer` are the last turn of a conversation, `history` the turns before it (None for a single one); the other
        columns are None if a row has none.

    Raises:
        UserError: a row that cannot be read, lacks a field or has one of the wrong type, or a file without rows.
        RunError: the cache cannot be written.
    """
    start = next(lines(file.path), None)
    if start is None:
        raise UserError(f"{file.path}: has no rows: one JSON object with question and answer on each line")
    layout = detect(start.row, settings, start.place)
    arguments = {
        "path": str(file.path),
        "sha256": file.sha256,
        "format_name": layout.format.name,
        "columns": dict(settings.columns),
        "needs_context": settings.needs_context,
        "first": first,
        "identity": layout.format.identity,
        "form": FORM,
    }
    with quiet(file.path.stat().st_size < _LONG_FILE), writing_the_cache():
        try:
            rows = Dataset.from_generator(_checked_rows, features=ROW, gen_kwargs=arguments)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError | OSError):
                raise error.__cause__ from None
            raise
    return rows, layout.describe(start.row)


def _checked_rows(
    path: str,
    sha256: str,
    format_name: str,
    columns: Mapping[str, str],
    needs_context: bool,
    first: int,
    identity: str,
    form: int,
) -> Iterator[dict[str, Any]]:
    """All rows of a file; sha256, identity and form only make the key of the cache."""
    layout = Layout(FORMATS[format_name], RowSettings(format_name, columns, needs_context))
    for line in lines(Path(path)):
        yield {"row": first + line.number} | conversation_row(layout, line.row, line.place)


def checked_row(line: bytes, place: str, needs_material: bool) -> dict[str, Any]:
    """The fields of a line with question and answer; UserError, beginning with `place`, if one is not as it must be."""
    layout = Layout(FORMATS["qa"], RowSettings("qa", needs_context=needs_material))
    return conversation_row(layout, parse_json(line, place), place)


@contextmanager
def quiet(few: bool) -> Iterator[None]:
    """Keep `datasets` from logging, and from showing progress bars if there is little to do; both are as before afterwards."""
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        with hidden_bars(few):
            yield
    finally:
        datasets.utils.logging.set_verbosity(level)


@contextmanager
def writing_the_cache() -> Iterator[None]:
    """Turn a cache that cannot be written into one line that names it, and keep `os.environ` the object that it is.

    With several processes, datasets puts a copy in its place: whoever holds the first one, as rich does for the width of
    a terminal, would never see a change again.

    Raises:
        RunError: instead of an OSError, such as a full disk.
    """
    environment = os.environ
    try:
        yield
    except OSError as error:
        reason = error.strerror or (os.strerror(error.errno) if error.errno else " ".join(str(error).split()))
        raise RunError(
            f"{datasets.config.HF_DATASETS_CACHE}: the cache of rows cannot be written ({reason}): free some space, or set "
            "HF_DATASETS_CACHE to a folder elsewhere"
        ) from error
    finally:
        os.environ = environment  # noqa: B003
