"""Text of an answer and its reference -> scores, as their published definitions have them."""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts without spaces between words: each of their characters counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNSPACED_CHARACTER = regex.compile(rf"([{_UNSPACED}])")
_WIDE_PUNCTUATION = regex.compile(r"[\u3001-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
_WORD = regex.compile(rf"(?V1)[{_UNSPACED}]|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?")


def normalized(text: str) -> list[str]:
    """Return the words of a text as SQuAD's evaluation compares them: lower case, without punctuation and English articles.

    Lower case and not case folding, because the published scores are defined that way. Characters of scripts without spaces (Chinese,
    Japanese, Thai, ...) are words of their own, as in MLQA's evaluation (Lewis et al. 2020, arXiv:1910.07475).
    """
    plain = _WIDE_PUNCTUATION.sub(" ", text.lower().translate(_PUNCTUATION))
    return _ARTICLES.sub(" ", _UNSPACED_CHARACTER.sub(r" \1 ", plain)).split()


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if both texts have the same words in the same order, else 0 (SQuAD's exact match, Rajpurkar et al. 2016, arXiv:1606.05250)."""
    return float(normalized(answer) == normalized(reference))


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of word precision and recall, 0 to 1 (SQuAD's F1, Rajpurkar et al. 2016, arXiv:1606.05250)."""
    ours, theirs = normalized(answer), normalized(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


class _Words:
    """rouge-score's own tokenizer keeps only a-z and 0-9, so every other script would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFC", text).lower())


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # a second of imports that training does not need

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004), without stemming, for any script."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def numbers(text: str) -> set[str]:
    """Return the numbers of a text that are written in digits, in one form: "$43,978.50M in 2024" -> {"43978.5", "2024"}.

    Commas between groups of three digits and zeros at the end of decimals are dropped; digits of every script count as 0 to 9. Signs, units
    and scales (%, billion) are not read, and numbers in words are not found: "$1.1 billion" and "$1,100 million" differ.
    """
    plain = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return {_one_form(match) for match in _NUMBER.findall(plain)}


def _one_form(number: str) -> str:
    whole, _, decimals = number.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def missing_numbers(answer: str, reference: str) -> set[str]:
    """Return the numbers of the reference that the answer lacks."""
    return numbers(reference) - numbers(answer)


def invented_numbers(answer: str, sources: Iterable[str | None]) -> set[str]:
    """Return the numbers of the answer that are in none of the sources (reference, context, question; None is skipped)."""
    return numbers(answer).difference(*(numbers(source) for source in sources if source))


def numbers_right(answer: str, reference: str, question: str, context: str | None) -> float | None:
    """Return 1 if the answer has every number of the reference and no invented one, else 0.

    A number is invented if it is neither in the reference nor in the context nor in the question (an answer may repeat the year that the
    question names). Numbers are compared as `numbers` reads them, wherever they are in the text: the right number said of the wrong thing
    is not noticed.

    Returns:
        None if the reference has no number: such a row is left out of the mean.
    """
    if not numbers(reference):
        return None
    return float(
        not missing_numbers(answer, reference) and not invented_numbers(answer, (reference, question, context))
    )
