"""McNemar's test, Holm's correction, Welch's test and the paired bootstrap, against SciPy, scikit-learn and plain resampling."""

import functools
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import average_precision_score

from vcache.pipelines.reporting.compare_paired import (
    Hits,
    difference_intervals,
    holm,
    mcnemar_exact,
    precision_intervals,
)
from vcache.pipelines.reporting.compare_seeds import incomplete_beta, seed_spread, student_quantile, two_sided

COUNTS = st.integers(0, 3000)
PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(b=COUNTS, c=COUNTS)
def test_mcnemar_is_the_two_sided_binomial_test_of_a_fair_coin(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_published_counts() -> None:
    """The table of the documentation of statsmodels, [[101, 121], [59, 33]]: p-value 0.000004 to six places."""
    assert round(mcnemar_exact(121, 59), 6) == 0.000004


@pytest.mark.parametrize(("b", "c"), [(0, 20_000), (500_000, 501_500), (1_000_000, 1_000_000)])
def test_mcnemar_of_huge_counts_neither_overflows_nor_leaves_0_to_1(b: int, c: int) -> None:
    p_value = mcnemar_exact(b, c)
    assert 0 <= p_value <= 1 and p_value == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-6)


@given(p_values=PROBABILITIES, alpha=st.floats(0.001, 0.999))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], alpha: float) -> None:
    """Holm's procedure as he states it: go up the ordered p-values until one is above alpha over those that are left."""
    order = sorted(range(len(p_values)), key=lambda row: p_values[row])
    rejected = set()
    for place, row in enumerate(order):
        if (len(order) - place) * p_values[row] > alpha:
            break
        rejected.add(row)
    corrected = holm(p_values)
    assert {row for row, p in enumerate(corrected) if p <= alpha} == rejected
    assert all(old <= new <= 1 for old, new in zip(p_values, corrected, strict=True))
    assert all(corrected[one] <= corrected[other] for one, other in pairwise(order))


@given(x=st.floats(0, 1), a=st.floats(0.5, 200), b=st.floats(0.5, 200))
def test_the_incomplete_beta_function_is_scipys(x: float, a: float, b: float) -> None:
    assert incomplete_beta(x, a, b) == pytest.approx(special.betainc(a, b, x), rel=1e-8, abs=1e-12)


@given(t=st.floats(-40, 40), freedom=st.floats(1, 500))
def test_students_distribution_is_scipys(t: float, freedom: float) -> None:
    assert two_sided(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-6, abs=1e-13)
    assert student_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-8)


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), sizes=st.tuples(st.integers(2, 9), st.integers(2, 9)))
def test_the_spread_over_seeds_is_welchs_test(seed: int, sizes: tuple[int, int]) -> None:
    drawn = np.random.default_rng(seed)
    first, second = drawn.normal(0.5, 0.01, sizes[0]), drawn.normal(0.51, 0.03, sizes[1])
    found, expected = seed_spread(first.tolist(), second.tolist()), stats.ttest_ind(second, first, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (found.p_value, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert (found.first_std, found.second_std) == pytest.approx((first.std(ddof=1), second.std(ddof=1)))


def test_one_training_has_no_spread_and_equal_ones_have_no_interval_around_them() -> None:
    assert seed_spread([0.5], [0.6, 0.7]).p_value is None
    same = seed_spread([0.5, 0.5], [0.75, 0.75])
    assert (same.first_std, same.second_std, same.low, same.high, same.p_value) == (0, 0, None, None, None)


def hits_of(drawn: np.random.Generator, num: int, rates: tuple[float, float], shared: float) -> tuple[Hits, Hits]:
    """Two models on `num` videos: of a share of them both say the same, of the others each is right at its own rate."""
    both = drawn.random(num) < shared
    common = drawn.random(num) < 0.5
    sides = [np.where(both, common, drawn.random(num) < rate).astype(float) for rate in rates]
    return Hits(top1=sides[0], top5=sides[0]), Hits(top1=sides[1], top5=sides[1])


def test_the_intervals_are_those_of_drawing_videos_one_by_one() -> None:
    """Also of means over seeds, and of a class that is in no video of some resamples."""
    drawn = np.random.default_rng(1)
    num, resamples = 90, 4000
    targets = np.minimum(drawn.integers(0, 45, num), 3)  # three classes of two videos or so each, and a large one
    first, second = (
        Hits(top1=drawn.integers(0, 4, num) / 3, top5=np.minimum(1, drawn.integers(1, 5, num) / 3)) for _ in range(2)
    )
    found = difference_intervals(first, second, targets, resamples=resamples)
    changes, values = second.top1 - first.top1, []
    for _ in range(resamples):
        rows = drawn.integers(0, num, num)
        classes = np.unique(targets[rows])
        per_class = np.mean([changes[rows][targets[rows] == k].mean() for k in classes])
        values.append((changes[rows].mean(), (second.top5 - first.top5)[rows].mean(), per_class))
    for column, name in enumerate(("top1", "top5", "mean_class_accuracy")):
        low, high = np.quantile([row[column] for row in values], [0.025, 0.975])
        assert abs(found[name].low - low) + abs(found[name].high - high) < 0.12 * (high - low)


def test_the_intervals_of_precisions_are_those_of_scikit_learn_on_the_same_resamples() -> None:
    drawn = np.random.default_rng(2)
    num, num_classes, resamples = 40, 3, 102
    relevant = drawn.random((num, num_classes)) < (0.4, 0.3, 0.0)
    first, second = ([drawn.normal(size=(num, num_classes)) + relevant for _ in range(n)] for n in (1, 2))
    overall, of_classes = precision_intervals(first, second, relevant, resamples=resamples, seed=5)
    again, changes = np.random.default_rng(5), []
    for size in (100, 2):
        for rows in again.integers(0, num, (size, num)):
            weights = np.bincount(rows, minlength=num)
            of = [
                [
                    np.mean([average_precision_score(relevant[:, k], x[:, k], sample_weight=weights) for x in side])
                    for k in (0, 1)
                ]
                for side in (first, second)
            ]
            changes.append(np.subtract(of[1], of[0]))
    assert of_classes[2] is None  # no video has it
    for k in (0, 1):
        expected = np.quantile([change[k] for change in changes], [0.025, 0.975])
        assert (of_classes[k].low, of_classes[k].high) == pytest.approx(expected)
    assert (overall.low, overall.high) == pytest.approx(np.quantile(np.mean(changes, axis=1), [0.025, 0.975]))


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.3, 0.7)])
def test_the_interval_covers_the_truth_as_often_as_it_says(rates: tuple[float, float]) -> None:
    """400 studies of 150 videos: 95% of the intervals hold the true difference; 4 standard errors are 4.4%."""
    drawn, truth, covered = np.random.default_rng(3), (rates[1] - rates[0]) * 0.4, 0
    for study in range(400):
        first, second = hits_of(drawn, 150, rates, shared=0.6)
        interval = difference_intervals(first, second, np.zeros(150, dtype=int), resamples=200, seed=study)["top1"]
        covered += interval.low <= truth <= interval.high
    assert 0.905 <= covered / 400 <= 0.99


def test_mcnemars_test_raises_as_many_false_alarms_as_it_can_at_five_per_cent() -> None:
    """Where both are equally good: never more than 5%, and as few as the binomial distribution of each study allows."""
    drawn, alarms, sizes = np.random.default_rng(4), 0, []
    for _ in range(2000):
        first, second = hits_of(drawn, 150, (0.5, 0.5), shared=0.6)
        b, c = int((first.top1 > second.top1).sum()), int((second.top1 > first.top1).sum())
        alarms += mcnemar_exact(b, c) <= 0.05
        sizes.append(_size(b + c))
    assert max(sizes) <= 0.05
    error = np.sqrt(np.mean(sizes) * (1 - np.mean(sizes)) / 2000)
    assert abs(alarms / 2000 - np.mean(sizes)) < 4 * error


@functools.cache
def _size(differ: int) -> float:
    """P(p <= 0.05) of the exact test for so many videos on which two equal models differ, by SciPy."""
    most = stats.binom.ppf(0.025, differ, 0.5)  # the largest k with 2 P(X <= k) <= 0.05 is this or the one below
    while most >= 0 and 2 * stats.binom.cdf(most, differ, 0.5) > 0.05:
        most -= 1
    return 2 * stats.binom.cdf(most, differ, 0.5) if most >= 0 else 0.0
