"""Per-row figures -> a score, its confidence interval and the difference of two models, by a seeded bootstrap."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEW, FEW_MARK = 30, "⚠"  # a score from fewer rows carries the mark in every table
_BLOCK = 4_000_000  # counts drawn at once: 32 MB

Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A score and the bounds of its 95 % interval; bounds are None where there is too little to resample."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One score of two models on the same rows, and the second one's minus the first one's."""

    before: Estimate
    after: Estimate
    difference: Estimate


def compare(
    before: tuple[Figures, Figures],
    after: tuple[Figures, Figures],
    clusters: Sequence[Hashable],
    seed: int,
    resamples: int,
    exponential: bool = False,
    share: bool = False,
) -> Comparison:
    """The two models' ratios of sums, with percentile bootstrap intervals (Efron 1979); both see the same draws, so the difference is paired.

    Args:
        before, after: numerators and denominators, each of shape (rows,). A mean has denominators 1, and 0 for rows that do not count;
            a token-weighted loss has the rows' summed losses over their tokens.
        clusters: what each row belongs to, of length rows. Whole clusters are drawn: two questions on one chunk are no two independent
            observations.
        seed: the same seed gives the same bounds.
        resamples: draws.
        exponential: e to the power of the ratio instead of the ratio (perplexity).
        share: rows score from 0 to 1. Where all clusters agree, resampling finds no spread; then the exact binomial bound stands: what
            none of n clusters did, others do with a share of up to 1 - 0.025^(1/n) (Hanley and Lippman-Hand 1983, the "rule of three").
    """
    columns = np.stack([*before, *after], axis=1)
    members = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(members), 4))
    np.add.at(sums, [members[cluster] for cluster in clusters], columns)
    counted = sums[(sums[:, 1] != 0) | (sums[:, 3] != 0)]
    total = _ratios(counted.sum(axis=0, keepdims=True), exponential)[0]
    if len(counted) < 2:
        return Comparison(*(Estimate(_finite(value), None, None) for value in total))
    rng = np.random.default_rng(seed)
    even = np.full(len(counted), 1 / len(counted))
    step = max(1, _BLOCK // len(counted))
    draws = [
        rng.multinomial(len(counted), even, size=min(step, resamples - done)) @ counted
        for done in range(0, resamples, step)
    ]
    ratios = _ratios(np.concatenate(draws), exponential)
    tail = (1 - LEVEL) / 2 * 100
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / len(counted))
    estimates = []
    for value, column, least in zip(total, ratios.T, (0, 0, -1), strict=True):
        known = column[np.isfinite(column)]
        low, high = np.percentile(known, [tail, 100 - tail]) if len(known) else (math.nan, math.nan)
        if share and math.isclose(low, high, abs_tol=1e-12):
            low, high = max(least, value - unseen), min(1, value + unseen)
        estimates.append(Estimate(_finite(value), _finite(low), _finite(high)))
    return Comparison(*estimates)


def _ratios(sums: Figures, exponential: bool) -> Figures:
    """(draws, 4) numerators and denominators of two models -> (draws, 3): the first, the second, their difference."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        first, second = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
        if exponential:
            first, second = np.exp(first), np.exp(second)
        return np.stack([first, second, second - first], axis=1)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
