"""Scores equal their published definitions, which are written here a second time; what was published for English works for every script."""

import math
import random
import re
import string

import pytest
from rouge_score.rouge_scorer import RougeScorer

from intern.evaluation.text_scores import (
    exact_match,
    invented_numbers,
    missing_numbers,
    normalized,
    numbers,
    numbers_right,
    rouge_l,
    token_f1,
)
from intern.paths import CONF_DIR

WORDS = [
    "the",
    "a",
    "an",
    "The",
    "revenue",
    "grew",
    "grew",
    "18%",
    "$44.0",
    "billion,",
    "in",
    "Q4",
    "2024;",
    "Uber's",
    "year-end",
    "(net)",
    "income",
    "A.",
    "theory",
    "ant",
]


def pairs(count=300):
    draw = random.Random(7)
    for _ in range(count):
        reference = [draw.choice(WORDS) for _ in range(draw.randint(0, 12))]
        answer = [word if draw.random() < 0.6 else draw.choice(WORDS) for word in reference] + draw.choices(
            WORDS, k=draw.randint(0, 4)
        )
        if draw.random() < 0.3:
            draw.shuffle(answer)
        yield " ".join(answer), " ".join(reference)


def published_words(text):
    """Rajpurkar et al. 2016, section 6: punctuation and articles are ignored; case too in the published evaluation."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def published_f1(answer, reference):
    """The harmonic mean of precision and recall, both texts seen as bags of words."""
    ours, left, common = published_words(answer), published_words(reference), 0
    if not ours or not left:
        return 1.0 if ours == left else 0.0
    total = len(left)
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / total
    return 2 * precision * recall / (precision + recall)


def test_characters_of_scripts_without_spaces_are_words_between_others():
    assert normalized("The 优步 app, grew!") == ["优", "步", "app", "grew"]


def test_rouge_compares_lower_case_and_not_folded_case():
    assert rouge_l("GROẞ", "groß") == 1 and rouge_l("gross", "groß") == 0


def test_token_f1_and_exact_match_are_squads_on_random_pairs():
    scores = []
    for answer, reference in pairs():
        assert math.isclose(token_f1(answer, reference), published_f1(answer, reference)), (answer, reference)
        assert exact_match(answer, reference) == float(published_words(answer) == published_words(reference))
        scores.append(token_f1(answer, reference))
    assert len(set(scores)) > 30 and any(exact_match(*pair) for pair in pairs())


def test_rouge_l_is_the_packages_own_on_random_latin_pairs():
    own = RougeScorer(["rougeL"], use_stemmer=False)
    scores = []
    for answer, reference in pairs():
        expected = own.score(reference, answer)["rougeL"].fmeasure
        assert math.isclose(rouge_l(answer, reference), expected), (answer, reference)
        scores.append(expected)
    assert len(set(scores)) > 30


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("2024年总预订额增长了18%。", "2024年总预订额增长了20%。"),
        ("売上高は増えた。", "売上高は大きく増えた。"),
        ("รายได้เพิ่มขึ้น", "รายได้ลดลง"),
        ("Выручка выросла на 18%", "Выручка выросла сильно"),
        ("إيرادات الشركة ارتفعت", "إيرادات الشركة انخفضت"),
        ("राजस्व में वृद्धि हुई", "राजस्व में कमी हुई"),
        ("수익이 증가했다 올해", "수익이 감소했다 올해"),
        ("Les bénéfices ont augmenté", "Les bénéfices ont baissé"),
    ],
)
def test_every_script_scores(answer, reference):
    for score in (rouge_l, token_f1):
        assert score(reference, reference) == 1
        assert 0.2 < score(answer, reference) < 1
    assert exact_match(reference, reference) == 1 and exact_match(answer, reference) == 0


def test_accents_count_however_they_are_encoded():
    assert rouge_l("be\u0301ne\u0301fices", "b\u00e9n\u00e9fices") == 1
    assert rouge_l("benefices", "b\u00e9n\u00e9fices") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$43,978.50M in 2024", {"43978.5", "2024"}),
        ("18.0% and 18 %", {"18"}),
        ("Q3, 1,2 or 3", {"3", "1", "2"}),
        ("007 of 1,000,000", {"7", "1000000"}),
        ("12,34 and 1,2345", {"12", "34", "1", "2345"}),
        ("in 2023, 2024.", {"2023", "2024"}),
        ("٢٠٢٤ and １８", {"2024", "18"}),
        ("four minutes", set()),
        ("0.0 and 0", {"0"}),
        ("x\u00b2", set()),
    ],
)
def test_numbers_are_read_as_they_are_written(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It grew 18% to $162.8 billion.", 1.0),
        ("In 2024 it grew 18% to $162.80 billion, from $137.9 billion.", 1.0),  # question and chunk give these
        ("It grew 18%.", 0.0),
        ("It grew 18% to $162.8 billion, or 5.5 points.", 0.0),
        ("", 0.0),
    ],
)
def test_numbers_are_right_if_all_are_there_and_none_is_invented(answer, expected):
    question, reference = "How did bookings do in 2024?", "They grew 18% to $162.8 billion."
    assert numbers_right(answer, reference, question, "Bookings: $137.9 billion, then $162.8 billion.") == expected


def test_without_a_context_its_numbers_are_invented_and_without_a_number_the_row_does_not_count():
    assert numbers_right("18% from $137.9 billion", "18%", "How?", None) == 0
    assert numbers_right("Anything 5", "No number here.", "How?", "5") is None
    assert missing_numbers("18", "18 and 20") == {"20"} and invented_numbers("18 and 21", ["18", "20"]) == {"21"}


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("The material does not say how many; it gives a total.", True),
        ("the texts don't mention it", True),
        ("The source doesn\u2019t state a rate.", True),
        ("Uber does not say so, but it was 18%.", False),
        ("No, management did not expect it to be material.", False),
        ("", False),
    ],
)
def test_the_shipped_pattern_finds_refusals(text, refuses):
    from omegaconf import OmegaConf

    pattern = OmegaConf.load(CONF_DIR / "evaluate.yaml").refusal_pattern
    assert bool(re.search(pattern, text, re.IGNORECASE)) is refuses


@pytest.mark.parametrize("mark", ["。", "，", "！", "」", "．"])
def test_wide_punctuation_does_not_count(mark):
    assert exact_match(f"増えた{mark}", "増えた") == token_f1(f"増えた{mark}", "増えた") == 1
