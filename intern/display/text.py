"""Untrusted text -> text that is only shown: no escape sequence, formula or Markdown in it takes effect."""

import json
import re
import unicodedata

_MARKDOWN = re.compile(r"[\\`*\[\]~$]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word means nothing
_LINKS = re.compile(r"(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)  # GitHub makes links of bare addresses
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line and paragraph separators
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the order of what follows


def visible(text: str) -> str:
    """Return the text on one line with control characters as escapes, such as \\x1b or \\n.

    Args:
        text: a name, a path, an answer, an error message.
    """
    if text.isprintable():
        return text
    return "".join(_escape(c) if c in _BIDI or unicodedata.category(c) in _HIDDEN else c for c in text)


def in_lines(text: str) -> str:
    """Return the text with control characters as escapes, except line breaks and tabs.

    Args:
        text: an answer, a traceback, a message of several lines.
    """
    return "".join(c if c in "\n\t" else visible(c) for c in text.replace("\r\n", "\n"))


def json_text(encoded: str) -> str:
    """Return encoded JSON with escapes for what JSON lets through: DEL, C1 and characters that change the order of others.

    Args:
        encoded: the result of json.dumps, which means the same afterwards.
    """
    if encoded.isascii() and "\x7f" not in encoded:
        return encoded
    return "".join(
        c if c == "\n" or visible(c) == c else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in encoded
    )


def printable(text: str) -> str:
    """Return the text with escapes for characters that control a terminal. Line breaks stay."""
    return "".join(_escape(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def markdown_text(text: str) -> str:
    """Return Markdown that shows the text on one line: no image, link, tag or emphasis begins in it.

    Pipes stay: intern.display.table.markdown escapes them in its cells.
    """
    escaped = _MARKDOWN.sub(lambda match: f"\\{match[0]}", visible(text))
    return _LINKS.sub(lambda match: f"\\{match[0]}", escaped.replace("&", "&amp;").replace("<", "&lt;"))


def without_tags(text: str) -> str:
    """Return Markdown in which no image, link or tag begins; code and emphasis, as our own messages have them, stay."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")
    return _LINKS.sub(lambda match: f"\\{match[0]}", escaped)


def spreadsheet_cell(value: object) -> object:
    """Return a CSV cell that a spreadsheet takes as text or as a number, never as a formula.

    Args:
        value: a number, which stays one, or text; text that begins like a formula gets an apostrophe before it (OWASP, CSV injection).
    """
    if not isinstance(value, str):
        return value
    text = visible(value)
    if not text.lstrip(" '\"").startswith(_FORMULA) or _is_number(text):
        return text
    return f"'{text}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def valid(text: str) -> str:
    """The text with a replacement character for each byte that was not UTF-8: a command line and a terminal may hold any bytes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
