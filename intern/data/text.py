"""Text -> the form in which two texts that a person would call the same are equal."""

import unicodedata


def comparable(text: str) -> str:
    """Return the text with case, runs of whitespace and the encoding of accents made uniform.

    Case folding goes further than lower case: "Straße" and "STRASSE" are equal, and so are both forms of the Greek sigma. A letter with a
    combining accent equals the single character (NFC).

    Args:
        text: a question, an answer, a context or a word.

    Returns:
        A key for comparisons, not a text to show.
    """
    folded = " ".join(text.casefold().split())
    return folded if folded.isascii() else unicodedata.normalize("NFC", folded)
