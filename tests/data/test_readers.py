"""Every kind of data file gives the same rows; one that is damaged is named with file, row and remedy."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intern.data.readers import lines
from intern.errors import UserError

ROWS = [
    {"question": "Wie viel, „genau“?", "answer": 'Es sind "18" %,\nrund.'},
    {"question": "漢字 🚕?", "answer": "مرحبا"},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "question,answer\n" + "".join(f'"{row["question"]}","{row["answer"].replace(chr(34), chr(34) * 2)}"\n' for row in ROWS)  # fmt: skip


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=1)
    return sink.getvalue().to_pybytes()


FILES = {
    "rows.jsonl": JSONL.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + JSONL.encode(),
    "crlf.jsonl": JSONL.replace("\n", "\r\n").encode(),
    "no-newline-at-its-end.jsonl": JSONL.rstrip().encode(),
    "one-line.json": json.dumps(ROWS).encode(),
    "pretty.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "lines.json": JSONL.encode(),
    "no-suffix": JSONL.encode(),
    "rows.csv": CSV.encode(),
    "excel.csv": b"\xef\xbb\xbf" + CSV.replace("question,answer", "question;answer").replace('","', '";"').replace("\n\"", "\r\n\"").encode(),
    "rows.tsv": CSV.replace("question,answer", "question\tanswer").replace('","', '"\t"').encode(),
    "rows.parquet": parquet(),
    "no-suffix-parquet": parquet(),
    "rows.jsonl.gz": gzip.compress(JSONL.encode()),
    "rows.csv.gz": gzip.compress(CSV.encode()),
    "rows.json.zst": zstd(json.dumps(ROWS).encode()),
    "named-otherwise.jsonl": zstd(JSONL.encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert [dict(line.row) for line in lines(path)] == ROWS


BROKEN = {
    "utf16.jsonl": (JSONL.encode("utf-16"), ":1: not UTF-8 but UTF-16: save the file as UTF-8"),
    "utf32.csv": (CSV.encode("utf-32"), ":1: not UTF-8 but UTF-32"),
    "latin.jsonl": (b'{"question": "q", "answer": "a"}\n{"question": "\xfc", "answer": "a"}\n', ":2: not UTF-8 (byte 14): save"),
    "latin.csv": (b"question,answer\nq,a\nq,\xfc\n", ":3: not UTF-8 (byte 2): save the file as UTF-8"),
    "latin.json": (b'[{"question": "q"},\n{"question": "\xfc"}]', ":2: not UTF-8"),
    "zeros.jsonl": (b'{"question": "q", "answer": "a"}\n' + bytes(99), ":2: not JSON but NUL bytes: the file is damaged"),
    "half.jsonl": (JSONL.encode()[:-20], ":2: not JSON (Unterminated string"),
    "half.json": (json.dumps(ROWS, indent=1).encode()[:-20], ":8: not JSON ("),
    "twice.jsonl": (b'\n{"answer": 1, "answer": 2}', ":2: key 'answer' is there twice: keep one of them"),
    "twice.json": (b'[{"a": 1}, {"answer": 1, "answer": 2}]', ": row 2: key 'answer' is there twice"),
    "twice-inside.jsonl": (b'{"messages": [{"role": "user", "role": "x"}]}', ":1: key 'role' is there twice"),
    "twice.csv": (b"question,answer,answer\nq,a,b\n", ":1: column 'answer' is there twice"),
    "numbers.json": (b"[1, 2]", ": row 1: a JSON number, not an object"),
    "array.jsonl": (b'[{"question": "q", "answer": "a"}]', ":1: a JSON list, not an object with question and answer (an array of rows"),
    "open.csv": (b'question,answer\nq,a\nq,"a\n', ":3: not CSV (unexpected end of data)"),
    "wide.csv": (b"question,answer\nq,a\nq,a,b\n", ":3: has 3 fields, the header has 2: put texts with ','"),
    "narrow.tsv": (b"question\tanswer\nq\n", ":2: has 1 fields, the header has 2"),
    "half.jsonl.gz": (gzip.compress(JSONL.encode() * 99)[:-30], ": cannot be read ("),
    "half.zst": (zstd(JSONL.encode() * 99)[:-30], ": cannot be read ("),
    "half.parquet": (parquet()[:-9], ": cannot be read ("),
    "empty.parquet": (b"", ": no Parquet file in spite of its name"),
    "inside.parquet.gz": (gzip.compress(parquet()), ": Parquet inside gzip: unpack it"),
    "book.xlsx": (b"PK\x03\x04" + bytes(30), ": is a ZIP archive, or a document of Excel or Word: export the table as CSV"),
    "notes.md": (b"# Notes\n\nHow much? 18.\n", ": not a table of rows: data files are JSON Lines, JSON, CSV, TSV and Parquet"),
    "rows.txt": (b"question,answer\nHow much?,18\n", ": not a table of rows: data files are JSON Lines, JSON, CSV, TSV and Parquet"),
    "report.pdf": (b"%PDF-1.7\n", ": is a PDF document"),
    "data.arrow": (b"ARROW1\x00\x00", ": is an Arrow file"),
    "long.jsonl": (b'{"question": "' + b"a" * 2**24 + b'"}', ":1: longer than 16 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_named_with_row_and_remedy(name, tmp_path):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")) as caught:
        list(lines(path))
    assert "\n" not in str(caught.value)


def test_row_numbers_are_lines_of_the_file_even_with_line_breaks_in_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n\n"a\nb",c\nd,e\n')
    assert [(line.number, line.place) for line in lines(path)] == [(3, f"{path}:3"), (5, f"{path}:5")]


def test_empty_cells_of_a_table_are_missing(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,topic,\nq,a,,\n")
    assert [dict(line.row) for line in lines(path)] == [{"question": "q", "answer": "a", "topic": None}]


def test_a_field_of_a_table_may_be_longer_than_the_csv_modules_limit(tmp_path):
    import csv

    path = tmp_path / "rows.csv"
    path.write_text(f"question,answer\nq,{'a' * 200_000}\n")
    assert len(next(lines(path)).row["answer"]) == 200_000
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize("text", ['[{"question": ' + "9" * 5000 + "}]", "[" * 100_000])
def test_an_array_with_an_endless_number_or_depth_is_one_line(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows.json: not JSON \("):
        list(lines(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{\n  "question": "x",\n  "answer": "y"\n}\n',
            ":1: not JSON, but the start of an object over several lines: write each row on one line",
        ),
        ('{"question": "x", "answer": "y"},\n', "each line holds one JSON object, without a comma after it"),
    ],
)
def test_json_that_is_laid_out_for_people_says_how_to_write_it(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(lines(path))
    assert message in str(caught.value)


def test_a_parquet_column_that_is_there_twice_is_named(tmp_path):
    table = pa.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet: column 'answer' is there twice"):
        list(lines(tmp_path / "rows.parquet"))
