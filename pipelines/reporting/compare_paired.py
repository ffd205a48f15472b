"""Statistics of two models on the same videos: McNemar's exact test, Holm's correction, and intervals by paired bootstrap.

A resample draws videos, and takes what both models say of each: what makes a video hard for both cancels in the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vcache.pipelines.evaluation.average_precision import resampled_average_precisions
from vcache.pipelines.evaluation.bootstrap import RESAMPLES, Interval, percentiles

_AT_ONCE = 100
"""Resamples that are held in memory together."""
_SORTED_SCORES = 400_000_000
"""How many scores the resamples of average precisions may go through: ten seconds or so."""


@dataclass(frozen=True, kw_only=True)
class Hits:
    """Of each video 1 if a model is right, else 0; of several trainings of one setting the share of those that are."""

    top1: Float[np.ndarray, " M"]
    top5: Float[np.ndarray, " M"]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: is a video that one of both has right as likely to be either one's?

    Under that hypothesis the counts are those of a fair coin: p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2).
    Without a video on which they differ it is 1. Of huge counts a p below the smallest float is 0.
    """
    num, fewer = only_first + only_second, min(only_first, only_second)
    if 2 * fewer == num:
        return 1.0
    # As logarithms: 2 ** num is no float from 1024 on.
    of_all = math.lgamma(num + 1) + (1 - num) * math.log(2)
    terms = (of_all - math.lgamma(i + 1) - math.lgamma(num - i + 1) for i in range(fewer + 1))
    return min(1.0, math.fsum(map(math.exp, terms)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected so that one false alarm among all of them has the stated rate (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, row in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[row]))
        corrected[row] = largest
    return corrected


def difference_intervals(
    first: Hits,
    second: Hits,
    targets: Int[np.ndarray, " M"],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of second - first in top1, top5 and mean_class_accuracy, over other videos of the same kind.

    All three depend only on how many videos of each class the two have right together, so a resample is one draw from a
    multinomial distribution over these outcomes, as in `bootstrap.accuracy_intervals`.
    """
    changes = np.stack([second.top1 - first.top1, second.top5 - first.top5], axis=1)
    cells, sizes = np.unique(np.column_stack([targets, changes]), axis=0, return_counts=True)
    starts = np.flatnonzero(np.diff(cells[:, 0], prepend=-1))  # the classes, in whose order unique rows stand
    rng, values = np.random.default_rng(seed), []
    for begin in range(0, resamples, _AT_ONCE):
        draws = rng.multinomial(len(targets), sizes / len(targets), size=min(_AT_ONCE, resamples - begin))
        drawn, changed = (np.add.reduceat(each, starts, axis=1) for each in (draws, draws * cells[:, 1]))
        with np.errstate(invalid="ignore"):  # a class may be in no video of a resample
            mean_class = np.nanmean(changed / drawn, axis=1)
        values.append(np.column_stack([draws @ cells[:, 1:] / len(targets), mean_class]))
    columns = np.concatenate(values).T
    names = ("top1", "top5", "mean_class_accuracy")
    return {name: percentiles(column, confidence) for name, column in zip(names, columns, strict=True)}


def precision_intervals(
    first: Sequence[Float[np.ndarray, "M K"]],
    second: Sequence[Float[np.ndarray, "M K"]],
    multi_hot: np.ndarray,
    *,
    resamples: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, list[Interval | None]]:
    """Intervals of second - first in mean average precision, and in the average precision of each class.

    Args:
        first, second: scores of each training; the precisions of several are averaged.

    A class that no video has is None. There are fewer resamples than of accuracies: 500, of many scores down to 100.
    """
    num_videos, num_classes = multi_hot.shape
    sorted_once = num_videos * num_classes * (len(first) + len(second))
    number = resamples or max(100, min(500, _SORTED_SCORES // sorted_once))
    rng, relevant, changes = np.random.default_rng(seed), multi_hot > 0, []
    for begin in range(0, number, _AT_ONCE):
        drawn = rng.integers(0, num_videos, (min(_AT_ONCE, number - begin), num_videos))
        counts = np.stack([np.bincount(row, minlength=num_videos) for row in drawn])
        means = [
            np.mean([resampled_average_precisions(scores, relevant, counts) for scores in side], axis=0)
            for side in (first, second)
        ]
        changes.append(means[1] - means[0])
    change = np.concatenate(changes)  # (R, K), NaN where a class is in no video of a resample
    occurs = ~np.isnan(change)
    overall = np.nanmean(change[occurs.any(axis=1)], axis=1)
    of_classes = [
        percentiles(change[occurs[:, k], k], confidence) if occurs[:, k].any() else None for k in range(num_classes)
    ]
    return percentiles(overall, confidence), of_classes
