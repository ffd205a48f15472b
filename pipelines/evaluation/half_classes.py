"""The half-class protocol of zero-shot recognition: the mean over 10 draws of a half of the classes, told apart among themselves.

multi_split_test of test_zeroshot.py at d61b34d (whwu95/Text4Vis): draw s is the first half of NumPy's permutation of the classes
with seed s, and the deviation is that of the population. Differs: there a class that was drawn and has no video is left out, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics

NUM_DRAWS = 10
LEAST_CLASSES = 4
"""Of which a half has two, the fewest that can be told apart."""

Half = tuple[int, ...]
"""Classes by their places among all, in ascending order."""


class HalfClassesError(ValueError):
    """There are too few classes for halves, or a half of them has no video."""


@dataclass(frozen=True, kw_only=True)
class HalfClasses:
    """How good a head is on each draw."""

    num_classes: int
    """Of a half."""
    draws: tuple[Metrics, ...]

    def mean(self, metric: str) -> float | None:
        """Over the draws, of "top1", "top5" or "mean_average_precision"; None where the metric is not set."""
        values = self._values(metric)
        return None if values is None else float(values.mean())

    def deviation(self, metric: str) -> float | None:
        """Over the draws, of the population."""
        values = self._values(metric)
        return None if values is None else float(values.std())

    def _values(self, metric: str) -> Float[np.ndarray, " draws"] | None:
        values = [getattr(metrics, metric) for metrics in self.draws]
        return None if None in values else np.array(values, dtype=np.float64)


def draw_halves(num_classes: int) -> tuple[Half, ...]:
    """The classes of each draw; of an odd number the smaller half.

    Raises:
        HalfClassesError: there are fewer than LEAST_CLASSES.
    """
    if num_classes < LEAST_CLASSES:
        raise HalfClassesError(
            f"--half-classes: half of {num_classes} classes leaves nothing to tell apart; {LEAST_CLASSES} classes are needed. "
            "Leave it out."
        )
    orders = (np.random.RandomState(seed).permutation(num_classes) for seed in range(NUM_DRAWS))
    return tuple(tuple(sorted(order[: num_classes // 2].tolist())) for order in orders)


def half_metrics(
    scores: Sequence[Float[Tensor, "M half"]], halves: Sequence[Half], targets: Int[Tensor, " M"] | Float[Tensor, "M K"]
) -> HalfClasses:
    """Metrics of each half, of the videos of its classes; where videos have several classes, of all videos.

    Raises:
        HalfClassesError: a half has no video.
        ScoresError: as for `compute_metrics`.
    """
    draws = [_of_half(x, half, targets, seed) for seed, (x, half) in enumerate(zip(scores, halves, strict=True))]
    return HalfClasses(num_classes=len(halves[0]), draws=tuple(draws))


def _of_half(scores: Tensor, half: Half, targets: Tensor, seed: int) -> Metrics:
    classes = torch.tensor(half)
    if targets.ndim == 2:
        own, rows = targets[:, classes], torch.arange(len(targets) if targets[:, classes].any() else 0)
    else:
        rows = torch.isin(targets, classes).nonzero()[:, 0]
        own = torch.searchsorted(classes, targets[rows])
    if not len(rows):
        raise HalfClassesError(
            f"--half-classes: none of the videos is of the {len(half)} classes that draw {seed} takes. Leave it out."
        )
    return compute_metrics(scores[rows], own)
