"""The arithmetic of a comparison. The rules, the same for every method:

* The time to a score is read off a straight line between the last evaluation below it and the
  first one at or above; nothing is smoothed. A run that never gets there, diverges or fails takes
  infinitely long.
* Medians are over seeds; the median of a finite and an infinite time is infinite.
* Intervals are percentiles of 10,000 bootstrap resamples of the seeds; where two methods are
  compared a seed is drawn with both of its runs. The ratio of two infinite times is 1 there.
* p is of Wilcoxon's signed-rank test, two-sided, over seeds that both methods have: on the logarithms
  of the ratios of times, or on the differences of scores. It is exact up to 16 seeds. A run that
  does not get there ranks after all that do; where neither does the seed is left out, as a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.extras import need

RESAMPLES = 10_000
LEVEL = 0.95
ALPHA = 0.05

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def time_to(times: Sequence[float], scores: Sequence[float], target: float) -> float:
    """When ``scores`` first reach ``target``; infinity if they never do.

    ``times`` are those of the evaluations, in any unit, not falling. Reached at the first evaluation
    already, it is that one's time.
    """
    before: tuple[float, float] | None = None
    for time, score in zip(times, scores, strict=True):
        if score >= target:
            if before is None:
                return time
            t, s = before
            return t + (time - t) * (target - s) / (score - s)
        before = (time, score) if math.isfinite(score) else None
    return math.inf


def low_median(values: Sequence[float]) -> float:
    """The lower of the two in the middle: a value that at least half of them reach."""
    return sorted(values)[(len(values) - 1) // 2]


def median(values: Sequence[float]) -> float:
    return float(np.median(np.asarray(values, dtype=np.float64)))


def _bootstrap(values: NDArray[np.float64], statistic: Statistic) -> tuple[float, float] | None:
    """Interval of a statistic of columns (seeds), ``values`` being (seeds, methods)."""
    seeds = len(values)
    if seeds < 2:
        return None
    picks = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    # By rank, not by interpolation: that between a finite and an infinite value is not a number.
    spread = np.sort(statistic(values[picks]))
    cut = int(RESAMPLES * (1 - LEVEL) / 2)
    return float(spread[cut]), float(spread[-1 - cut])


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bootstrap interval of the median; None for a single value."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    return _bootstrap(column, lambda drawn: np.median(drawn[:, :, 0], axis=1))


@dataclass(frozen=True)
class Comparison:
    """A method against another, over the seeds that both have.

    ``value``: ratio of median times, or difference of median scores; NaN where it has no sense.
    ``verdict``: "gain", "tie", "loss", or "undecided" with too few seeds for any p below 0.05.
    """

    value: float
    interval: tuple[float, float] | None
    p: float
    seeds: int
    better: int
    worse: int
    verdict: str


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    stats = need("scipy.stats", "scipy", "testing a difference")
    # With 2^16 resamples or more for 16 seeds or fewer scipy goes through all signs.
    method = stats.PermutationMethod(n_resamples=2**16, rng=np.random.default_rng(0))
    return float(stats.wilcoxon(differences, method=method).pvalue)


def _verdict(
    interval: tuple[float, float] | None, tie: float, sign: int, p: float, seeds: int
) -> str:
    """``tie``: the value of equals; ``sign``: 1 where more is better, -1 where less is."""
    if interval is None or 2 / 2**seeds > ALPHA:
        return "undecided"
    low, high = interval
    if p < ALPHA and (low > tie or high < tie):
        return "gain" if (low > tie) == (sign > 0) else "loss"
    return "tie"


def _pairs(values: Mapping[int, float], others: Mapping[int, float]) -> NDArray[np.float64]:
    """(seeds that both have, 2)."""
    pairs = [[values[seed], others[seed]] for seed in values if seed in others]
    if not pairs:
        raise ValueError(f"no seed in common: {sorted(values)} and {sorted(others)}")
    return np.array(pairs, dtype=np.float64)


def compare_times(times: Mapping[int, float], others: Mapping[int, float]) -> Comparison:
    """Of two methods' times by seed; ``value`` is the ratio of their medians, below 1 for a gain."""
    pairs = _pairs(times, others)

    def ratio(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        medians = np.median(drawn, axis=-2)
        return medians[..., 0] / medians[..., 1]

    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(ratio(pairs))
        interval = _bootstrap(pairs, lambda drawn: _but_nan(ratio(drawn), 1.0))
        logs = _but_nan(np.log(pairs[:, 0]) - np.log(pairs[:, 1]), 0.0)
    return _comparison(value, interval, -logs, 1.0, -1)


def compare_scores(scores: Mapping[int, float], others: Mapping[int, float]) -> Comparison:
    """Of two methods' scores by seed, more being better; ``value`` is the difference of medians.

    A run that has no score is given as minus infinity.
    """
    pairs = _pairs(scores, others)

    def difference(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        medians = np.median(drawn, axis=-2)
        return medians[..., 0] - medians[..., 1]

    with np.errstate(invalid="ignore"):
        value = float(difference(pairs))
        interval = _bootstrap(pairs, lambda drawn: _but_nan(difference(drawn), 0.0))
        differences = _but_nan(pairs[:, 0] - pairs[:, 1], 0.0)
    return _comparison(value, interval, differences, 0.0, 1)


def _but_nan(values: NDArray[np.float64], instead: float) -> NDArray[np.float64]:
    """Infinite against infinite counts as equal."""
    return np.where(np.isnan(values), instead, values)


def _comparison(
    value: float,
    interval: tuple[float, float] | None,
    gains: NDArray[np.float64],
    tie: float,
    sign: int,
) -> Comparison:
    """``gains``: by seed, positive where the method is better."""
    p, seeds = _wilcoxon(gains), len(gains)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    verdict = _verdict(interval, tie, sign, p, seeds)
    return Comparison(value, interval, p, seeds, better, worse, verdict)
