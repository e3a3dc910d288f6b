"""The arithmetic of a comparison, on numbers whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

scipy_stats = pytest.importorskip("scipy.stats")

from experiments.statistics import (  # noqa: E402
    compare_scores,
    compare_times,
    low_median,
    median_interval,
    time_to,
)

INF = math.inf


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.2, 10), (0.1, 10), (0.3, 15), (0.4, 20), (0.35, 17.5), (0.5, 50), (0.6, INF)],
)
def test_time_is_read_off_the_line_to_the_first_evaluation_there(
    target: float, expected: float
) -> None:
    # It falls in between: what counts is when it first gets there.
    times, scores = [10, 20, 30, 40, 50], [0.2, 0.4, 0.1, 0.3, 0.5]
    assert time_to(times, scores, target) == pytest.approx(expected)


def test_an_evaluation_without_a_score_is_no_end_of_a_line() -> None:
    assert time_to([1, 2], [math.nan, 0.5], 0.4) == 2
    assert time_to([1, 2, 3], [0.1, math.nan, 0.5], 0.4) == 3
    assert time_to([1], [math.nan], 0.4) == INF
    assert time_to([], [], 0.4) == INF


def test_half_of_the_values_reach_the_low_median() -> None:
    assert low_median([3, 1, 2]) == 2
    assert low_median([4, 1, 3, 2]) == 2
    assert low_median([-INF, 1]) == -INF


def test_interval_of_a_median_is_scipys_bootstrap() -> None:
    values = list(np.random.default_rng(3).normal(size=14))
    low, high = median_interval(values) or (0, 0)
    theirs = scipy_stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.15)
    assert median_interval([1.0]) is None
    assert median_interval([1.0, INF, INF]) == (1.0, INF)


def test_interval_covers_the_median_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        low, high = median_interval(list(random.exponential(size=12))) or (0, 0)
        hits += low <= math.log(2) <= high
    assert hits >= 88


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values, start=100))


def test_times_that_are_shorter_with_every_seed_are_a_gain() -> None:
    base = [100.0, 110, 90, 105, 95, 101, 99, 120]
    ours = [0.5 * t + 0.1 * i for i, t in enumerate(base)]
    found = compare_times(by_seed(ours), by_seed(base))
    assert found.value == pytest.approx(np.median(ours) / np.median(base))
    low, high = found.interval or (0, 0)
    assert 0.4 < low <= found.value <= high < 0.6
    assert found.p == 2 / 2**8
    assert (found.seeds, found.better, found.worse, found.verdict) == (8, 8, 0, "gain")
    back = compare_times(by_seed(base), by_seed(ours))
    assert (back.verdict, back.p, back.value) == ("loss", found.p, pytest.approx(1 / found.value))


def test_p_is_that_of_scipys_exact_test_on_log_ratios() -> None:
    random = np.random.default_rng(1)
    base, ours = random.lognormal(size=9), random.lognormal(size=9)
    theirs = scipy_stats.wilcoxon(np.log(ours / base), method="exact").pvalue
    assert compare_times(by_seed(list(ours)), by_seed(list(base))).p == pytest.approx(theirs)


def test_seeds_are_paired_by_name_not_by_place() -> None:
    found = compare_times({1: 1.0, 2: 20, 3: 300}, {3: 600.0, 2: 40, 1: 2, 4: 1})
    assert (found.seeds, found.better, found.value) == (3, 3, 0.5)
    with pytest.raises(ValueError, match="no seed in common"):
        compare_times({1: 1.0}, {2: 1.0})


def test_runs_that_never_get_there_count_as_infinitely_late() -> None:
    base = [100.0, 110, 90, 105, 95, 101, 99, 120]
    found = compare_times(by_seed([INF] * 8), by_seed(base))
    assert (found.value, found.interval, found.verdict) == (INF, (INF, INF), "loss")
    found = compare_times(by_seed(base), by_seed([INF] * 8))
    assert (found.value, found.interval, found.verdict) == (0, (0, 0), "gain")
    neither = compare_times(by_seed([INF] * 8), by_seed([INF] * 8))
    assert math.isnan(neither.value)
    assert (neither.interval, neither.p, neither.verdict) == ((1, 1), 1, "tie")
    # One miss among eight: the largest loss of all, by rank, and no more.
    one = compare_times(by_seed([INF, *(0.5 * t for t in base[1:])]), by_seed(base))
    large = compare_times(by_seed([1e9, *(0.5 * t for t in base[1:])]), by_seed(base))
    assert one.p == large.p > 2 / 2**8
    assert (one.better, one.worse) == (7, 1)


def test_equals_are_a_tie_and_few_seeds_are_undecided() -> None:
    base = [100.0, 110, 90, 105, 95, 101, 99, 120]
    assert compare_times(by_seed(base), by_seed(base)).verdict == "tie"
    mixed = [t * (1.3 if i % 2 else 0.7) for i, t in enumerate(base)]
    assert compare_times(by_seed(mixed), by_seed(base)).verdict == "tie"
    few = compare_times(by_seed([1.0, 1, 1, 1, 1]), by_seed([2.0, 2, 2, 2, 2]))
    assert (few.value, few.p, few.verdict) == (0.5, 2 / 2**5, "undecided")
    single = compare_times({1: 1.0}, {1: 2.0})
    assert (single.interval, single.verdict) == (None, "undecided")


def test_higher_scores_are_a_gain_and_a_missing_one_the_worst() -> None:
    base = [0.70, 0.71, 0.69, 0.70, 0.72, 0.70, 0.71]
    found = compare_scores(by_seed([s + 0.02 for s in base]), by_seed(base))
    assert found.value == pytest.approx(0.02)
    assert (found.verdict, found.better) == ("gain", 7)
    lost = compare_scores(by_seed([-INF] * 7), by_seed(base))
    assert (lost.value, lost.verdict, lost.worse) == (-INF, "loss", 7)
    both = compare_scores(by_seed([-INF] * 7), by_seed([-INF] * 7))
    assert (both.p, both.verdict) == (1, "tie")


def test_verdicts_of_no_effect_are_rarely_anything_but_a_tie() -> None:
    random = np.random.default_rng(5)
    found = 0
    for _ in range(60):
        a, b = random.lognormal(sigma=0.1, size=(2, 8))
        found += compare_times(by_seed(list(a)), by_seed(list(b))).verdict != "tie"
    assert found <= 7  # 5 % of 60 are 3; more than 7 have a chance of 1 %
