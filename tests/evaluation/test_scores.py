"""Groups of rows: which rows count, what is one observation, and when a difference is called better or worse."""

import re
from dataclasses import replace

import pytest

from intern.evaluation.bootstrap import Estimate, PairedScore
from intern.evaluation.predictions import Prediction
from intern.evaluation.report_view import _seen_chunks, line
from intern.evaluation.scores import Group, Row, score_groups, score_rows


def rows(count=4, context=None, losses=None):
    """Golden rows whose first model answers nothing and whose second model answers right."""
    golden = [
        {"question": f"q{n}", "answer": "It is 5.", "chunk_text": context or f"chunk {n}", "topic": None}
        for n in range(count)
    ]

    def made(model, answer):
        found = losses or [2.0] * count
        return [
            Prediction(model, n, answer, True, 3, found[n] if model == "after" else 4.0, 2, 0.1) for n in range(count)
        ]

    before, after = (
        score_rows(golden, made(model, answer), re.compile("never"), [None] * count)
        for model, answer in (("before", ""), ("after", "It is 5."))
    )
    return [
        Row(n, row["question"], row["answer"], row["chunk_text"], None, False, False, False, before[n], after[n])
        for n, row in enumerate(golden)
    ]


def test_rows_on_one_chunk_are_one_observation():
    apart, together = (
        score_groups(made, 1, 500, True)[0].scores["token_f1"] for made in (rows(), rows(context="same"))
    )
    assert apart.after.low is not None and together.after.low is None
    assert apart.after.value == together.after.value == 1 and apart.difference.value == 1


def test_a_row_without_a_loss_counts_for_neither_model():
    group = score_groups(rows(losses=[None, 2.0, 2.0, 8.0]), 1, 500, True)[0]
    assert group.counted["loss"] == 3 and group.counted["token_f1"] == 4
    assert (group.scores["loss"].before.value, group.scores["loss"].after.value) == (2.0, 2.0)


def test_losses_of_other_tokenizers_have_no_difference():
    scores = score_groups(rows(), 1, 500, losses_comparable=False)[0].scores
    assert scores["loss"].difference.value is None and scores["perplexity"].difference.value is None
    assert scores["loss"].after.value == 1 and scores["token_f1"].difference.value == 1


@pytest.mark.parametrize(
    ("metric", "low", "high", "rows", "verdict"),
    [
        ("token_f1", 0.1, 0.3, 30, "better"),
        ("token_f1", -0.3, -0.1, 30, "worse"),
        ("token_f1", -0.1, 0.3, 30, "unclear"),
        ("loss", -0.3, -0.1, 30, "better"),
        ("loss", 0.1, 0.3, 30, "worse"),
        ("loss", 0.1, 0.3, 29, "too few"),
        ("answer_tokens", 1.0, 2.0, 30, ""),
    ],
)
def test_a_difference_is_better_or_worse_only_with_enough_rows_and_an_interval_without_0(
    metric, low, high, rows, verdict
):
    one = Estimate(1.0, 0.9, 1.1)
    score = PairedScore(one, one, Estimate((low + high) / 2, low, high))
    group = Group("all", "all", rows, 0, 0, 0, {metric: score}, {metric: rows})
    assert line(metric, group).verdict == verdict


def test_a_difference_of_shares_is_in_percentage_points():
    share = PairedScore(Estimate(0.2, 0.1, 0.3), Estimate(0.5, 0.4, 0.6), Estimate(0.3, 0.2, 0.4))
    shown = line("numbers_right", Group("all", "all", 40, 0, 0, 0, {"numbers_right": share}, {"numbers_right": 40}))
    assert shown.before == "20.0% [10.0%, 30.0%]" and shown.difference == "+30.0 points [+20.0, +40.0]"
    unknown = replace(share, difference=Estimate(None, None, None))
    assert (
        line(
            "numbers_right", Group("a", "all", 40, 0, 0, 0, {"numbers_right": unknown}, {"numbers_right": 40})
        ).difference
        == "–"
    )


def test_rows_without_chunks_are_not_counted_as_never_seen():
    def said(seen, unknown, what=" rows are on chunks that training saw"):
        return _seen_chunks(Group("all", "all", 8, 0, seen, unknown, {}, {}), what)

    assert (
        said(0, 8) == "The rows name no chunk, so it is unknown which of them training saw."
        and said(0, 8, "") == "unknown"
    )
    assert said(3, 0) == "3 of 8 rows are on chunks that training saw." and said(3, 0, "") == "3 of 8"
    assert said(3, 2) == "3 of 6 rows are on chunks that training saw; of 2 it is unknown."
