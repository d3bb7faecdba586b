"""Untrusted text in terminals, Markdown and spreadsheets: it is shown and has no effect."""

import io
import json

import pytest
from rich.console import Console

from intern.display.table import least_width, markdown, natural_width, show, terminal_table
from intern.display.text import in_lines, json_text, markdown_text, spreadsheet_cell, visible, without_tags


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ✓ 図", "plain ✓ 図"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("line\u2028end", "line\\u2028end"),
        ("می\u200cخواهم 👩\u200d💻", "می\u200cخواهم 👩\u200d💻"),  # joiners belong to the spelling
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert visible(text) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<img src=x>", "&lt;img src=x>"),
        ("![p](http://x)", "!\\[p\\]\\(http:\\//x)"),
        ("www.example.org", "www\\.example.org"),
        ("*a* _b_ c_d `e` $f$ ~g~", "\\*a\\* \\_b\\_ c_d \\`e\\` \\$f\\$ \\~g\\~"),
        ("back\\slash & more", "back\\\\slash &amp; more"),
        ("a\nb", "a\\\\nb"),
    ],
)
def test_markdown_in_a_text_has_no_effect(text, written):
    assert markdown_text(text) == written


def test_a_text_that_ends_in_a_backslash_does_not_open_its_cell():
    table = markdown(["a", "b"], [[markdown_text("x\\"), markdown_text("y\\|z")]])
    assert table.splitlines()[2] == "| x\\\\ | y\\\\\\|z |"


@pytest.mark.parametrize("text", ["=1+1", "+A1", "-A1", "@SUM(1)", " =1", "'=1", '"=1', "＝1", "\t=1", "\r=1", "-1+1"])
def test_a_formula_becomes_text(text):
    cell = spreadsheet_cell(text)
    assert cell.startswith(("'", "\\")) and cell.endswith("1" if text != "@SUM(1)" else ")")


@pytest.mark.parametrize("value", ["-1", "+0.5", "-1e-05", -3, 2.5, None, "a=1", "", "8"])
def test_numbers_and_plain_texts_stay_as_they_are(value):
    assert spreadsheet_cell(value) == value


def test_widths_are_those_that_a_terminal_draws():
    from rich.table import Table

    columns, rows = ["run", "loss"], [["a 図 name", "0.500 [0.400,0.600]"], ["b", ""]]
    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    assert natural_width(columns, rows) == Console(file=io.StringIO(), width=200).measure(table).maximum
    assert least_width(columns, rows) == len("│ name │ [0.400,0.600] │")


@pytest.mark.parametrize("text", ["a\nb\tc", "x\x1b[2Jy\r\nz", "\x9b1m", "\u202eabc", "می\u200cخواهم", "\x07\x7f"])
def test_lines_of_a_text_stay_and_nothing_in_them_commands_a_terminal(text):
    shown = in_lines(text)
    assert not set(shown) & {"\x1b", "\x9b", "\u202e", "\x07", "\x7f", "\r"}
    assert shown.count("\n") == text.count("\n") and shown.count("\u200c") == text.count("\u200c")


def test_json_has_no_raw_control_characters_and_means_the_same():
    value = {"name\x9b": "a\x7f\x1b\u202e\u2028\ud800é図", "lines": ["x\ny"]}
    encoded = json_text(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(encoded) == value and "é図" in encoded
    assert not set(encoded) & {"\x7f", "\x9b", "\x1b", "\u202e", "\u2028", "\ud800"}


def test_own_messages_keep_their_code_and_lose_tags():
    shown = without_tags("run `wandb login` for <img src=x> ![a](http://b) [c](http://d) & www.e.org")
    assert shown == "run `wandb login` for &lt;img src=x> ![a]\\(http:\\//b) [c]\\(http:\\//d) &amp; www\\.e.org"


def test_a_table_in_a_pipe_shows_names_and_values_without_their_effect(capsys):
    show(["run", "[red]a.<img>"], [["<img src=x>`|\n", "![p](http://x)"]])
    assert capsys.readouterr().out == (
        "| run | [red]a.&lt;img> |\n| --- | ---: |\n| &lt;img src=x>\\`\\|\\\\n | ![p]\\(http:\\//x) |\n"
    )


def test_headings_are_no_markup_of_the_terminal():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(terminal_table(["[link=http://x]a[/link]", "b\x1b]0;t"], [["[red]c", "d\x9b"]]))
    drawn = console.file.getvalue()
    assert "[link=http://x]a[/link]" in drawn and "[red]c" in drawn and "\x1b]8" not in drawn and "\x1b]0" not in drawn


def test_an_answer_has_its_own_characters_except_in_a_terminal(monkeypatch):
    from intern.query import _shown

    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert _shown("a\x1b[2J\nb") == "a\x1b[2J\nb"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert _shown("a\x1b[2J\nb\t\u202e") == "a\\x1b[2J\nb\t\\u202e"
