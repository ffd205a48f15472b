"""Confidence intervals of metrics: percentiles over resamples of the videos (Efron's percentile bootstrap).

They say how far the number would move on other videos of the same kind. They say nothing of another seed of training.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vcache.pipelines.evaluation.average_precision import resampled_average_precisions

RESAMPLES = 2000
_SORTED_SCORES = 400_000_000
"""How many scores the resamples of an average precision may go through: ten seconds or so."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """`confidence` of the resamples lie from low to high."""

    low: float
    high: float
    confidence: float
    resamples: int


def accuracy_intervals(
    ranks: Int[np.ndarray, " M"],
    targets: Int[np.ndarray, " M"],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of top1, top5 and mean_class_accuracy; `ranks` are how many classes are ahead of the target.

    All three depend only on how many videos of each class are hit, hit in the top five and missed. These numbers in a resample
    of M videos are one draw from a multinomial distribution, so no video is drawn one by one.
    """
    classes, of_video = np.unique(targets, return_inverse=True)
    outcomes = np.where(ranks == 0, 0, np.where(ranks < 5, 1, 2))
    cells, sizes = np.unique(3 * of_video + outcomes, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(ranks), sizes / len(ranks), size=resamples)  # (R, cells)
    hits, starts = draws * (cells % 3 == 0), np.searchsorted(cells // 3, np.arange(len(classes)))
    top1, drawn = (np.add.reduceat(counts, starts, axis=1) for counts in (hits, draws))  # (R, classes)
    with np.errstate(invalid="ignore"):  # a class may be in no video of a resample
        mean_class = np.nanmean(top1 / drawn, axis=1)
    values = {
        "top1": hits.sum(axis=1) / len(ranks),
        "top5": draws[:, cells % 3 < 2].sum(axis=1) / len(ranks),
        "mean_class_accuracy": mean_class,
    }
    return {name: percentiles(value, confidence) for name, value in values.items()}


def precision_interval(
    scores: Float[np.ndarray, "M K"],
    multi_hot: np.ndarray,
    *,
    resamples: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Interval of mean_average_precision, in each resample the mean over the classes that occur in it.

    Every resample goes through all scores, so there are fewer of them: 500, and where videos and classes are many down to 100.
    """
    num_videos, num_classes = scores.shape
    number = resamples or max(100, min(500, _SORTED_SCORES // (num_videos * num_classes)))
    rng = np.random.default_rng(seed)
    values = []
    for start in range(0, number, 50):  # a few at a time, for memory
        drawn = rng.integers(0, num_videos, (min(50, number - start), num_videos))
        counts = np.stack([np.bincount(row, minlength=num_videos) for row in drawn])
        precisions = resampled_average_precisions(scores, multi_hot > 0, counts)
        values.append(np.nanmean(precisions[~np.isnan(precisions).all(axis=1)], axis=1))
    return {"mean_average_precision": percentiles(np.concatenate(values), confidence)}


def percentiles(values: Float[np.ndarray, " R"], confidence: float = 0.95) -> Interval:
    """The middle `confidence` of what a metric is in R resamples."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high), confidence=confidence, resamples=len(values))
