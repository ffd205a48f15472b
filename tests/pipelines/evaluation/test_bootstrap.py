"""Intervals against resampling video by video, and how often they hold the true value."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vcache.pipelines.evaluation.average_precision import average_precisions, resampled_average_precisions
from vcache.pipelines.evaluation.bootstrap import Interval, accuracy_intervals, precision_interval


def test_intervals_are_those_of_resampling_video_by_video() -> None:
    rng = np.random.default_rng(0)
    targets = rng.choice(4, size=60, p=[0.55, 0.3, 0.1, 0.05])
    ranks = rng.integers(0, 3 + 2 * targets)
    values: dict[str, list[float]] = {"top1": [], "top5": [], "mean_class_accuracy": []}
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        of, hit = targets[drawn], ranks[drawn] == 0
        values["top1"].append(hit.mean())
        values["top5"].append((ranks[drawn] < 5).mean())
        values["mean_class_accuracy"].append(float(np.mean([hit[of == k].mean() for k in np.unique(of)])))
    for name, interval in accuracy_intervals(ranks, targets, resamples=4000).items():
        assert (interval.low, interval.high) == pytest.approx(np.quantile(values[name], [0.025, 0.975]), abs=0.02)


def test_the_interval_of_a_mean_average_precision_is_that_of_resampling_video_by_video() -> None:
    rng = np.random.default_rng(1)
    targets = (rng.random((40, 3)) < [0.5, 0.3, 0.1]).astype(np.uint8)
    scores = np.round(rng.normal(size=(40, 3)) + targets, 1)
    values = []
    for _ in range(300):
        drawn = rng.integers(0, 40, 40)
        here = [k for k in range(3) if targets[drawn, k].any()]
        values.append(np.mean([average_precision_score(targets[drawn, k], scores[drawn, k]) for k in here]))
    interval = precision_interval(scores, targets)["mean_average_precision"]
    assert interval.resamples == 500
    assert (interval.low, interval.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.04)


def test_a_resample_is_the_average_precision_of_its_videos() -> None:
    rng = np.random.default_rng(2)
    scores, relevant = np.round(rng.normal(size=(17, 4)), 1), rng.random((17, 4)) < 0.3
    drawn = rng.integers(0, 17, (6, 17))
    counts = np.stack([np.bincount(row, minlength=17) for row in drawn])
    expected = [average_precisions(scores[row], relevant[row]) for row in drawn]
    np.testing.assert_allclose(resampled_average_precisions(scores, relevant, counts), expected, rtol=1e-12)


def test_19_of_20_intervals_hold_the_true_accuracy() -> None:
    """300 data sets of 150 videos, of which each is hit with probability 0.7; 95% of 300 is 285, give or take 4."""
    rng = np.random.default_rng(3)
    held = {"top1": 0, "mean_class_accuracy": 0}
    for number in range(300):
        targets, ranks = rng.integers(0, 5, 150), np.where(rng.random(150) < 0.7, 0, 7)
        found = accuracy_intervals(ranks, targets, resamples=1000, seed=number)
        for name in held:
            held[name] += found[name].low <= 0.7 <= found[name].high
    assert 270 <= held["top1"] <= 296
    assert 270 <= held["mean_class_accuracy"] <= 296


def test_an_interval_is_a_function_of_the_seed_and_holds_the_estimate() -> None:
    rng = np.random.default_rng(4)
    targets, ranks = rng.integers(0, 4, 50), rng.integers(0, 3, 50)
    first = accuracy_intervals(ranks, targets)
    assert first == accuracy_intervals(ranks, targets) != accuracy_intervals(ranks, targets, seed=1)
    assert first["top1"].low < (ranks == 0).mean() < first["top1"].high
    assert accuracy_intervals(np.zeros(9, dtype=np.int64), np.arange(9))["top1"] == Interval(
        low=1.0, high=1.0, confidence=0.95, resamples=2000
    )
    narrow = accuracy_intervals(ranks, targets, confidence=0.5)["top1"]
    assert first["top1"].low < narrow.low < narrow.high < first["top1"].high
