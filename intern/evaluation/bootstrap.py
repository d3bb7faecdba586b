"""Per-row scores of two models -> the scores, their confidence intervals and the paired difference, by a seeded bootstrap."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEW, FEW_MARK = 30, "⚠"  # a score from fewer rows is marked in every table
_BLOCK = 4_000_000  # counts drawn in one chunk: 32 MB

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A score and the bounds of its 95 % interval; the bounds are None if there is too little to resample."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedScore:
    """One metric of two models on the same rows, and the difference `after - before`."""

    before: Estimate
    after: Estimate
    difference: Estimate


def paired_bootstrap(
    before: tuple[Array, Array],
    after: tuple[Array, Array],
    clusters: Sequence[Hashable],
    seed: int,
    resamples: int,
    exponential: bool = False,
    share: bool = False,
) -> PairedScore:
    """Compute both models' ratios of sums with percentile bootstrap intervals (Efron 1979).

    Both models are resampled with the same draws, so the interval of the difference is paired.

    Args:
        before, after: numerators and denominators, each of shape (rows,). A mean has denominators of 1, and of 0 for rows that do not
            count; a loss per token has the rows' summed losses over their tokens.
        clusters: the cluster of each row, of length rows. Whole clusters are drawn, because two questions on one chunk are not independent
            observations.
        seed: the same seed gives the same bounds.
        resamples: number of draws.
        exponential: score e to the power of the ratio (perplexity) instead of the ratio.
        share: rows score from 0 to 1. If all clusters agree, resampling finds no spread; the exact binomial bound is returned instead: an
            event that none of n clusters had has a probability of up to 1 - 0.025^(1/n) (Hanley and Lippman-Hand 1983, the "rule of
            three").

    Returns:
        The two scores and their difference. A value is None if no row counts, bounds are None with fewer than two clusters.
    """
    columns = np.stack([*before, *after], axis=1)
    members = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(members), 4))
    np.add.at(sums, [members[cluster] for cluster in clusters], columns)
    counted = sums[(sums[:, 1] != 0) | (sums[:, 3] != 0)]
    total = _ratios(counted.sum(axis=0, keepdims=True), exponential)[0]
    if len(counted) < 2:
        return PairedScore(*(Estimate(_finite(value), None, None) for value in total))
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
    return PairedScore(*estimates)


def _ratios(sums: Array, exponential: bool) -> Array:
    """Numerators and denominators of two models, (draws, 4) -> (draws, 3): the first ratio, the second, their difference."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        first, second = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
        if exponential:
            first, second = np.exp(first), np.exp(second)
        return np.stack([first, second, second - first], axis=1)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
