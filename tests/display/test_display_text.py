"""Untrusted text in terminals, Markdown and spreadsheets: it is shown and has no effect."""

import io

import pytest
from rich.console import Console

from intern.display.table import least_width, markdown, natural_width
from intern.display.text import markdown_text, spreadsheet_cell, visible


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
