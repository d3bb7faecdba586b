"""A data file's bytes -> its rows as Python objects, each with its number; a fault names the file and the row.

The rows go into `datasets` one by one (intern/data/files.py): its own readers guess types from blocks of rows, so that a number among texts,
a repeated key or a bad byte would change values silently, or end in an error that names no row.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from intern.errors import UserError

LONGEST_ROW = 2**24  # bytes: far more than any model's positions
_LONGEST_ARRAY = 2**30  # bytes of a JSON array, which is read as a whole
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_JSON_NAMES = {".jsonl", ".ndjson", ".json", ""}
_COMPRESSED_NAMES = {".gz", ".gzip", ".zst", ".zstd"}
_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
_PARQUET = b"PAR1"
_FOREIGN = {
    b"%PDF": "a PDF document: write its questions and answers into a table such as rows.csv",
    b"PK\x03\x04": "a ZIP archive, or a document of Excel or Word: export the table as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: export it as CSV",
    b"ARROW1": "an Arrow file: give the folder that it is in, or export it as Parquet",
    b"SQLite": "an SQLite database: export the table as CSV",
    b"BZh": "compressed with bzip2: take gzip or zstd",
    b"\xfd7zXZ": "compressed with xz: take gzip or zstd",
}
_DELIMITERS = ",;\t|"


class Number(str):
    """A number of a JSON file, as the text that it was written with: 18.50 stays 18.50."""


class Line(NamedTuple):
    """One row of a file."""

    number: int  # of its line, from 1; of the row where a file has no lines (Parquet, a JSON array)
    place: str  # "rows.jsonl:17", for messages
    row: Mapping[str, Any]


class _Repeated(dict[str, Any]):
    """A JSON object in which a key, here or in an object inside, is there twice."""

    key = ""


def lines(path: Path) -> Iterator[Line]:
    """Read the rows of a file: JSON Lines, a JSON array, CSV, TSV or Parquet, plain or compressed with gzip or zstd.

    Raises:
        UserError: the file is something else, is damaged, or has a row that cannot be read; names the file and the row.
    """
    with path.open("rb") as file:
        start = file.read(8)
    kind = next((kind for mark, kind in _COMPRESSED.items() if start.startswith(mark)), None)
    try:
        with pa.input_stream(str(path), compression=kind) as stream:
            file = io.BufferedReader(stream)  # a NativeFile is a raw stream in all but its type
            yield from _reader(path, file, kind)(path, file)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        remedy = "it is damaged or incomplete: make or download it again" if kind else "look at the file"
        raise UserError(f"{path}: cannot be read ({reason}): {remedy}") from error


def _reader(path: Path, file: io.BufferedReader, compression: str | None) -> Callable[[Path, BinaryIO], Iterator[Line]]:
    start = file.peek(8)[:8]
    for mark, what in _FOREIGN.items():
        if start.startswith(mark):
            raise UserError(f"{path}: is {what}")
    for mark, name in _WIDE.items():
        if start.startswith(mark):
            raise UserError(f"{path}:1: not UTF-8 but {name}: save the file as UTF-8 (iconv -f {name} -t UTF-8)")
    if start.startswith(_PARQUET):
        if compression is not None:
            raise UserError(f"{path}: Parquet inside {compression}: unpack it, Parquet compresses by itself")
        return _parquet
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = next((one for one in reversed(suffixes) if one not in _COMPRESSED_NAMES), "")
    if suffix == ".parquet":
        raise UserError(f"{path}: no Parquet file in spite of its name: it is damaged or incomplete")
    if suffix in (".csv", ".tsv", ".tab"):
        return _csv
    content = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if suffix not in _JSON_NAMES and content and not content.startswith(b"{"):
        raise UserError(
            f"{path}: not a table of rows: data files are JSON Lines, JSON, CSV, TSV and Parquet, also compressed (.gz, .zst), with names "
            "that say so, such as rows.csv"
        )
    is_array = suffix == ".json" and start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return _json_array if is_array else _json_lines


# --- JSON ---


def parse_json(line: bytes, place: str) -> Mapping[str, Any]:
    """Read the JSON object of one line; UserError, beginning with `place`, if it is not one."""
    try:
        row = _json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        if b"\x00" in line:
            raise UserError(f"{place}: not JSON but NUL bytes: the file is damaged, or not UTF-8") from error
        if line.strip() == b"{":
            remedy = "not JSON, but the start of an object over several lines: write each row on one line, or all rows as an array [...] in a .json file"
            raise UserError(f"{place}: {remedy}") from error
        comma = ", without a comma after it" if line.rstrip().endswith(b"},") else ""
        raise UserError(f"{place}: not JSON ({error}): each line holds one JSON object{comma}") from error
    return _checked_object(row, place)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_float=Number)


def _integer(text: str) -> Number:
    int(text)  # refuses a number of thousands of digits, which nobody has written
    return Number(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        repeated = _Repeated(row)
        repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return repeated
    for value in row.values():
        for inner in value if isinstance(value, list) else (value,):
            if isinstance(inner, _Repeated):
                found = _Repeated(row)
                found.key = inner.key
                return found
    return row


def _checked_object(row: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        kind = "number" if isinstance(row, Number) else type(row).__name__
        hint = " (an array of rows is read from a file whose name ends with .json)" if isinstance(row, list) else ""
        raise UserError(f"{place}: a JSON {kind}, not an object with question and answer{hint}")
    if isinstance(row, _Repeated):
        raise UserError(f"{place}: key {row.key!r} is there twice: keep one of them")
    return row


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Line]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW + 1), b""), 1):
        if len(line) > LONGEST_ROW:
            raise UserError(f"{path}:{number}: longer than {LONGEST_ROW >> 20} MiB: each line holds one row")
        if line.strip():
            place = f"{path}:{number}"
            yield Line(number, place, parse_json(line, place))


def _json_array(path: Path, file: BinaryIO) -> Iterator[Line]:
    content = file.read(_LONGEST_ARRAY + 1)
    if len(content) > _LONGEST_ARRAY:
        raise UserError(f"{path}: a JSON array of more than {_LONGEST_ARRAY >> 30} GiB: save it as JSON Lines")
    try:
        rows = _json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number}: not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}): the array ends there, or is damaged"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"{path}: not JSON ({error})") from error
    for number, row in enumerate(rows, 1):
        yield Line(number, f"{path}: row {number}", _checked_object(row, f"{path}: row {number}"))


# --- Tables ---


def _csv(path: Path, file: BinaryIO) -> Iterator[Line]:
    text = _text_lines(path, file)
    header = next(text, "")
    delimiter = max(_DELIMITERS, key=header.count)
    number = 1
    try:
        with _long_fields():
            rows = csv.reader(itertools.chain([header], text), delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(rows, [])]
            for name in names:
                if name and names.count(name) > 1:
                    raise UserError(f"{path}:1: column {name!r} is there twice: rename or delete one")
            number = rows.line_num + 1
            for fields in rows:
                place = f"{path}:{number}"
                if any(field.strip() for field in fields):
                    if len(fields) != len(names):
                        raise UserError(
                            f"{place}: has {len(fields)} fields, the header has {len(names)}: put texts with {delimiter!r} or line "
                            'breaks in "double quotes"'
                        )
                    yield Line(number, place, {k: v or None for k, v in zip(names, fields, strict=True) if k})
                number = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{number}: not CSV ({error}): a double quote inside a quoted text is written twice"
        ) from error


def _text_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW + 1), b""), 1):
        if len(line) > LONGEST_ROW:
            raise UserError(f"{path}:{number}: longer than {LONGEST_ROW >> 20} MiB: is this a table?")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field be as long as a row: the csv module's limit is one for the whole process."""
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, file: BinaryIO) -> Iterator[Line]:
    numbers = itertools.count(1)
    with pq.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: column {twice[0]!r} is there twice: keep one of them")
        for batch in table.iter_batches(1_000):
            for row, number in zip(batch.to_pylist(), numbers, strict=False):
                yield Line(number, f"{path}: row {number}", row)


def columns_of(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, for messages."""
    names = [re.sub(r"\s+", " ", str(name))[:40] for name in row]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"
