"""What must hold for any input of readers of untrusted files and programs: they return, or raise one line for the user.

`make fuzz` tries them for minutes, tests/test_fuzz.py for seconds. A new input that broke one of them belongs into tests/fuzz_corpus/.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from transformers import AutoTokenizer

from intern.comparison.files import _write_csv
from intern.comparison.groups import read_runs
from intern.comparison.reader import FinishedRun, OtherRun, read_run
from intern.comparison.table import notes, others, table
from intern.data.files import checked_row
from intern.data.formats import RowSettings, conversation_row, detect
from intern.data.prompt import Prompt
from intern.data.readers import lines
from intern.display.text import in_lines, json_text, markdown_text, spreadsheet_cell, visible
from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.files import append_text, check_folder, exists, make_folder, read_bytes, remove_file, write_text

CORPUS = Path(__file__).with_name("fuzz_corpus")
_PIECES = st.sampled_from(
    [
        *(b'"', b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\r", b"\0", b"\\u0000", b"\\ud800", b"\xff", b"\xef\xbb\xbf"),
        *(b"null", b"true", b"NaN", b"1e999", b"-0", b"9" * 5000, b"[" * 3000, b"&a ", b"*a", b"!!python/name:os.system "),
        *(b"${oc.env:HOME}", b"\x1b[2J", b"\xe2\x80\xae", b"=1+1", b"<img src=x>", b"|", b"`", b"{% for i in range(9) %}", b"{{"),
        *(b"{% endfor %}", b"{% if %}", b"}}", b"messages", b"loop.index", b"1/0", b"PAR1", b"\x1f\x8b"),
    ]
)  # fmt: skip


@st.composite
def changed(draw, folder):
    """A file of the corpus with a few changes; its name, and its content."""
    file = draw(st.sampled_from(sorted((CORPUS / folder).iterdir())))
    content = file.read_bytes()
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 2, 8, 64, 1000])))
        content = content[:start] + draw(st.one_of(_PIECES, st.binary(max_size=6), st.just(b""))) + content[end:]
    return file.name, content


def rows(found):
    """Files of rows in any format: rows, or one line that names the file."""
    name, content = found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            layout = None
            for line in lines(path):
                layout = layout or detect(line.row, RowSettings(), line.place)
                row = conversation_row(layout, line.row, line.place)
                assert row["question"].strip() and row["answer"].strip()
                json.dumps(row)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), error


def one_row(content):
    """One line of JSON with question and answer."""
    try:
        checked_row(content, "here:1", False)
    except UserError as error:
        assert str(error).startswith("here:1")


def run(found):
    """One file of a run directory: the run is compared, or gets a reason."""
    name, content = found
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        place.mkdir()
        for file in (CORPUS / "run").iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        (place / name).write_bytes(content)
        read = read_run(place, "run", "golden")
        assert isinstance(read, FinishedRun | OtherRun)
        runs = read_runs([folder], "score", None)
        table(runs, runs.finished, brief=False)
        others(runs)
        notes(runs)
        _write_csv(runs, Path(folder) / "compare.csv")
        with contextlib.suppress(UserError):
            Run(place).read_config()
        with contextlib.suppress(UserError):
            Run(place).read_history()


def gateway(parts):
    """Paths and kinds of files: nothing outside of the run is read or written."""
    with tempfile.TemporaryDirectory() as folder:
        victim, root = Path(folder) / "victim", Path(folder) / "run"
        victim.write_text("secret")
        root.mkdir()
        (root / "link").symlink_to(victim)
        (root / "loop").symlink_to("loop")
        (root / "up").symlink_to("..")
        (root / "folder").mkdir()
        (root / "folder" / "file").write_text("inside")
        os.mkfifo(root / "pipe")
        path = root.joinpath(*parts)
        for act in (
            lambda: read_bytes(path, root, 100),
            lambda: exists(path, root),
            lambda: check_folder(path, root),
            lambda: make_folder(path, root),
            lambda: write_text(path, root, "mine"),
            lambda: append_text(path, root, "mine"),
            lambda: remove_file(path, root),
        ):
            with contextlib.suppress(UserError, OSError):
                found = act()
                assert found != b"secret"
        assert victim.read_text() == "secret"
        assert sorted(one.name for one in Path(folder).iterdir()) == ["run", "victim"]


def template(found):
    """A chat template: a prompt whose asked tokens begin the trained ones, or one line."""
    tokenizer = AutoTokenizer.from_pretrained("data/tiny_llama3")
    tokenizer.chat_template = found[1].decode("utf-8", "replace")
    try:
        prompt = Prompt.from_tokenizer(tokenizer, "Be brief.", "never")
    except UserError as error:
        assert "\n" not in str(error), error
        return
    [asked] = prompt.encode(tokenizer, ["How much?"])
    [trained] = prompt.encode(tokenizer, ["How much?"], ["It rose 18%."])
    assert trained.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert Prompt.from_json(json.loads(json.dumps(prompt.to_json()))) == prompt


def shown(text):
    """Text of others: no control character survives, and a cell is no formula."""
    for one in (visible(text), markdown_text(text), str(spreadsheet_cell(text)), *in_lines(text).splitlines()):
        assert not set(one) & {chr(n) for n in (*range(9), *range(10, 32), *range(127, 160), 0x202E, 0x2028)}, one
    assert "<" not in markdown_text(text)
    assert not str(spreadsheet_cell(text)).startswith(("=", "@", "\t", "\r"))
    encoded = json.dumps(text, ensure_ascii=False)
    assert json.loads(json_text(encoded)) == text


_PART = st.sampled_from(
    ["link", "loop", "up", "folder", "file", "pipe", "..", ".", "victim", "new", "a\0b", "x" * 300, "/etc"]
)
PROPERTIES = {
    "rows": (rows, changed("rows")),
    "one row": (one_row, st.one_of(st.binary(max_size=60), changed("rows").map(lambda found: found[1]))),
    "run": (run, changed("run")),
    "gateway": (gateway, st.lists(_PART, max_size=4)),
    "template": (template, changed("templates")),
    "shown text": (shown, st.text()),
}
