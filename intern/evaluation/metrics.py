"""Scores of an answer against its reference, and how each score is read."""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

import regex

from intern.display.table import Column

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts that put no blanks between words: each of their characters counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNSPACED_CHARACTER = regex.compile(rf"([{_UNSPACED}])")
_WIDE_PUNCTUATION = regex.compile(r"[\u3001-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
_WORD = regex.compile(rf"(?V1)[{_UNSPACED}]|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+")


SCORES = {
    "loss": Column("loss (nats a token)", False, ".2f"),
    "perplexity": Column("perplexity", False, ".1f"),
    "exact_match": Column("exact match", True, ".1%"),
    "token_f1": Column("token F1", True, ".3f"),
    "rouge_l": Column("ROUGE-L", True, ".3f"),
    "figures_right": Column("figures right", True, ".1%"),
    "judged": Column("right, as judged by a model", True, ".1%"),
    "refused_rightly": Column("refused where the material does not say", True, ".1%"),
    "refused_wrongly": Column("refused where it does say", False, ".1%"),
    "stopped": Column("ended by itself", True, ".1%"),
    "answer_tokens": Column("length of the answer (tokens)", None, ".1f"),
}

_FIGURE = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?")


def normalized(text: str) -> list[str]:
    """The words of a text as SQuAD's evaluation compares them: lower case, without punctuation and English articles.

    Characters of scripts without blanks (Chinese, Japanese, Thai, ...) are words of their own, as in MLQA's evaluation
    (Lewis et al. 2020, arXiv:1910.07475).
    """
    plain = _WIDE_PUNCTUATION.sub(" ", text.lower().translate(_PUNCTUATION))
    return _ARTICLES.sub(" ", _UNSPACED_CHARACTER.sub(r" \1 ", plain)).split()


def exact_match(answer: str, reference: str) -> float:
    """Whether the same words stand in the same order (SQuAD's exact match, Rajpurkar et al. 2016, arXiv:1606.05250)."""
    return float(normalized(answer) == normalized(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of common words (SQuAD's F1, Rajpurkar et al. 2016, arXiv:1606.05250)."""
    ours, theirs = normalized(answer), normalized(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


class _Words:
    """rouge-score's own tokenizer keeps a-z and 0-9 alone, so that every other script scores 0."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFC", text).lower())


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # a second of imports, which training has no use for

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004), without stemming, in any script."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def figures(text: str) -> set[str]:
    """The numbers of a text as they are written in digits, brought to one form: "$43,978.50M in 2024" -> {"43978.5", "2024"}.

    Commas between groups of three digits and zeros at the end of decimals go; digits of every script count as 0 to 9. Signs, units and
    scales (%, billion) are not read, and numbers in words are not numbers: "$1.1 billion" and "$1,100 million" differ.
    """
    plain = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return {_one_form(match) for match in _FIGURE.findall(plain)}


def _one_form(figure: str) -> str:
    whole, _, decimals = figure.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def missing_figures(answer: str, reference: str) -> set[str]:
    """Numbers of the reference that the answer does not have."""
    return figures(reference) - figures(answer)


def invented_figures(answer: str, sources: Iterable[str]) -> set[str]:
    """Numbers of the answer that stand in none of the sources (reference, chunk, question)."""
    return figures(answer).difference(*(figures(source) for source in sources))


def figures_right(answer: str, reference: str, question: str, chunk: str | None) -> float | None:
    """1 where every number of the reference stands in the answer and the answer has no number of its own, else 0.

    A number is the answer's own where it stands neither in the reference nor in the chunk nor in the question (an answer may repeat the
    year that it was asked about). Where the row has no chunk, reference and question alone count. Numbers are compared as `figures`
    reads them, wherever they stand in the text: that the right number is said of the wrong thing does not show.

    Returns:
        None where the reference has no number: such a row has no figure to get right and is left out of the mean.
    """
    if not figures(reference):
        return None
    return float(
        not missing_figures(answer, reference)
        and not invented_figures(answer, [reference, question, *([chunk] if chunk else [])])
    )
