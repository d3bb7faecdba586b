"""Intervals: repeatable, paired, as wide as theory says, and None if there is nothing to resample."""

import math

import numpy as np
import pytest

from intern.evaluation.bootstrap import paired_bootstrap


def mean(values):
    return np.asarray(values, dtype=float), np.ones(len(values))


def test_the_interval_of_a_mean_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    after = paired_bootstrap(mean(values), mean(values), range(400), seed=5, resamples=20_000).after
    half = 1.96 * values.std() / math.sqrt(400)
    assert math.isclose(after.value, values.mean())
    assert after.high - after.low == pytest.approx(2 * half, rel=0.03)
    assert (after.high + after.low) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_the_same_seed_gives_the_same_bounds_and_another_seed_others():
    values = np.random.default_rng(1).normal(size=50)
    first, again, other = (paired_bootstrap(mean(values), mean(values + 1), range(50), seed, 500) for seed in (1, 1, 2))
    assert first == again and first.after.low != other.after.low


def test_the_difference_is_paired():
    before = np.random.default_rng(1).normal(size=60) * 10
    difference = paired_bootstrap(mean(before), mean(before + 0.5), range(60), 1, 500).difference
    assert difference.value == pytest.approx(0.5) and difference.high - difference.low < 1e-9


def test_rows_of_one_chunk_count_as_one_observation():
    values = np.random.default_rng(1).normal(size=40)
    alone = paired_bootstrap(mean(values), mean(values), range(40), 1, 2000).after
    repeated = paired_bootstrap(mean(np.tile(values, 3)), mean(np.tile(values, 3)), [*range(40)] * 3, 1, 2000).after
    assert alone.high - alone.low == pytest.approx(repeated.high - repeated.low)


def test_a_loss_is_weighted_by_tokens_and_perplexity_is_its_exponential():
    sums, tokens = np.array([10.0, 1.0, 4.0]), np.array([10.0, 2.0, 2.0])
    loss = paired_bootstrap((sums, tokens), (sums, tokens), range(3), 1, 500).after
    perplexity = paired_bootstrap((sums, tokens), (sums, tokens), range(3), 1, 500, exponential=True).after
    assert loss.value == pytest.approx(15 / 14) and perplexity.value == pytest.approx(math.exp(15 / 14))
    assert math.log(perplexity.low) == pytest.approx(loss.low)


def test_rows_that_do_not_count_change_nothing():
    values = np.array([0.2, 0.9, 0.4])
    counted = paired_bootstrap(mean(values), mean(values), "abc", 1, 500)
    with_others = (np.array([*values, 0.0]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert paired_bootstrap(with_others, with_others, "abcd", 1, 500) == counted


def test_a_row_that_counts_for_one_model_alone_is_in_the_score_of_that_model():
    both, alone = (np.array([0.2, 0.0]), np.array([1.0, 1.0])), (np.array([0.5, 0.0]), np.array([1.0, 0.0]))
    for first, second in ((both, alone), (alone, both)):
        score = paired_bootstrap(first, second, "ab", 1, 500)
        assert {score.before.value, score.after.value} == {0.1, 0.5}


def test_two_rows_are_enough_for_an_interval_and_one_draw_is_one_value():
    score = paired_bootstrap(mean([1, 2]), mean([1, 2]), range(2), 1, 500).after
    assert (score.low, score.high) == (1, 2)
    once = paired_bootstrap(mean([1, 2]), mean([1, 2]), range(2), 1, 1).after
    assert once.low == once.high


def test_rows_that_all_agree_leave_the_exact_binomial_bound():
    none = paired_bootstrap(mean([0] * 50), mean([1] * 50), range(50), 1, 500, share=True)
    assert none.before.low == 0 and none.before.high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert none.after.high == 1 and none.difference.low == pytest.approx(0.025 ** (1 / 50))


def test_one_chunk_or_no_row_has_no_interval():
    one = paired_bootstrap(mean([1, 2]), mean([1, 2]), ["same", "same"], 1, 500).after
    assert (one.value, one.low, one.high) == (1.5, None, None)
    nothing = (np.zeros(2), np.zeros(2))
    assert paired_bootstrap(nothing, nothing, range(2), 1, 500).after.value is None


def test_each_model_has_its_own_denominators():
    """Two tokenizers split the same references into different numbers of tokens."""
    before, after = (np.array([4.0, 8.0]), np.array([2.0, 2.0])), (np.array([4.0, 8.0]), np.array([4.0, 8.0]))
    score = paired_bootstrap(before, after, range(2), 1, 500)
    assert (score.before.value, score.after.value, score.difference.value) == (3.0, 1.0, -2.0)


def test_a_row_that_scores_0_for_both_models_counts():
    assert paired_bootstrap(mean([0, 0, 1]), mean([0, 0, 0]), range(3), 1, 500).before.value == pytest.approx(1 / 3)


def test_bounds_of_an_overflowing_perplexity_are_finite_or_unknown():
    sums, tokens = np.array([1.0, 1.0, 2000.0]), np.ones(3)
    score = paired_bootstrap((sums, tokens), (sums, tokens), range(3), 1, 500, exponential=True).after
    assert score.low == pytest.approx(math.e) and math.isfinite(score.high)


def test_drawing_in_chunks_gives_the_same_bounds(monkeypatch):
    values = np.random.default_rng(1).normal(size=20)
    whole = paired_bootstrap(mean(values), mean(values + 1), range(20), 1, 500)
    monkeypatch.setattr("intern.evaluation.bootstrap._BLOCK", 20 * 64)
    assert paired_bootstrap(mean(values), mean(values + 1), range(20), 1, 500) == whole
