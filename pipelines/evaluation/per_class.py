"""Which classes a head is bad at, and what it takes them for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vcache.pipelines.evaluation.average_precision import average_precisions
from vcache.pipelines.evaluation.metrics import check_scores


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """One class of a split. What needs a video of it is None where there is none."""

    name: str
    num_videos: int
    top1: float | None = None
    """Share of its videos in which it is ahead of all others; None where videos have several classes."""
    average_precision: float | None = None
    """Only where videos have several classes."""
    confused_with: str | None = None
    """The class, not among those of the video, that is ahead of this one and of all other such classes in most of its videos;
    None if that happens in no video."""
    num_confused: int = 0
    """In how many."""

    @property
    def measured(self) -> float | None:
        """Top-1, or the average precision."""
        return self.top1 if self.average_precision is None else self.average_precision


def class_metrics(
    scores: Float[Tensor, "M K"], targets: Int[Tensor, " M"] | Float[Tensor, "M K"], class_names: Sequence[str]
) -> tuple[ClassMetrics, ...]:
    """Of every class, in the order of the names.

    Raises:
        ScoresError: as for `compute_metrics`.
    """
    check_scores(scores, targets)
    multi_label = targets.ndim == 2
    several = targets if multi_label else torch.nn.functional.one_hot(targets, len(class_names))
    relevant = several.numpy(force=True) > 0
    sizes, counts = relevant.sum(axis=0), confusions(scores.numpy(force=True), relevant)
    precisions = average_precisions(scores.numpy(force=True), relevant) if multi_label else None
    rows = []
    for k, name in enumerate(class_names):
        most, size = int(counts[k].argmax()), int(sizes[k])
        times = int(counts[k, most])
        rows.append(
            ClassMetrics(
                name=name,
                num_videos=size,
                top1=1 - int(counts[k].sum()) / size if size and not multi_label else None,
                average_precision=float(precisions[k]) if size and precisions is not None else None,
                confused_with=class_names[most] if times else None,
                num_confused=times,
            )
        )
    return tuple(rows)


def worst_first(classes: Sequence[ClassMetrics]) -> list[ClassMetrics]:
    """Those that have videos, by what is measured of them; of equal ones that with more videos first."""
    measured = [(row.measured, -row.num_videos, place) for place, row in enumerate(classes) if row.measured is not None]
    return [classes[place] for _, _, place in sorted(measured)]


def confusions(scores: Float[np.ndarray, "M K"], relevant: np.ndarray) -> Int[np.ndarray, "K K"]:
    """[k, j]: videos of class k in which j, the best of the classes that they do not have, is ahead of k; ties as in top-1."""
    rows = np.flatnonzero(~relevant.all(axis=1))  # a video of all classes is taken for no other
    scores = np.maximum(scores, np.finfo(scores.dtype).min)  # minus infinity is kept for what must not be chosen
    best = np.where(relevant[rows], -np.inf, scores[rows]).argmax(axis=1)
    videos, classes = np.nonzero(relevant[rows])
    wrong = best[videos]
    ahead, own = scores[rows][videos, wrong], scores[rows][videos, classes]
    lost = (ahead > own) | ((ahead == own) & (wrong < classes))
    counts = np.zeros((scores.shape[1], scores.shape[1]), dtype=np.int64)
    np.add.at(counts, (classes[lost], wrong[lost]), 1)
    return counts
