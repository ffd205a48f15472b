"""Training on a part of the videos: K of each class, or a share. Drawn by seed and video; a grown store changes it little."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vcache.pipelines.loading.hashing import mixed, text_hash, text_hashes


class SubsetError(ValueError):
    """A subset that cannot be chosen."""


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Some of the rows of a split. Every video has a place in a queue, drawn from `seed` and its id alone; the first are taken.

    So the subset of K shots is part of that of K + 1, and a new video takes the place of one of its class at most.
    """

    shots: int | None = None
    """So many videos of each class, or all of a class that has fewer. Of videos with several classes the first so many of each
    class, each counted for all its classes: a class may thus have more, and none has fewer than it could."""
    fraction: float | None = None
    """That share of the videos of each class, rounded, and at least one. Of videos with several classes that share of all
    videos, rounded, and of each class that would have none its first video."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.shots is None) == (self.fraction is None):
            raise SubsetError(
                f"one of shots ({self.shots}) and fraction ({self.fraction}) must be set, and only one. Leave out the other."
            )
        if self.shots is not None and self.shots < 1:
            raise SubsetError(f"shots ({self.shots}) must be at least 1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SubsetError(f"fraction ({self.fraction}) must be above 0 and at most 1")

    def rows(self, ids: Sequence[str], targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that are taken, ascending.

        Args:
            ids: of all videos of the split.
            targets: of all videos, int64 (M,), or multi-hot (M, K).
        """
        queue = rows[np.argsort(self._places([ids[row] for row in rows]), kind="stable")]
        taken = [of_class[: self._number(len(of_class))] for of_class in _of_each_class(targets, queue)]
        if self.fraction is not None and targets.ndim == 2:
            taken = [queue[: self._number(len(queue))], *self._first_of_missing(targets, queue)]
        return np.unique(np.concatenate([rows[:0], *taken]))

    def note(self, targets: np.ndarray, rows: np.ndarray, taken: np.ndarray) -> str:
        """A sentence on what was taken of `rows`."""
        said = f"{len(taken)} of {len(rows)} videos are trained on"
        if self.shots is None:
            return f"{said}, {len(taken) / max(1, len(rows)):.2%} of them, at least one of each class."
        sizes = [len(of_class) for of_class in _of_each_class(targets, rows)]
        fewer = sum(there < self.shots for there in sizes)
        rest = f", and all of a class that has fewer ({fewer} of {len(sizes)} classes)" if fewer else ""
        return f"{said}, {self.shots} of each class{rest}."

    def _number(self, there: int) -> int:
        """How many of so many videos."""
        if self.fraction is None:
            return min(there, self.shots or 0)
        return min(there, max(1, int(self.fraction * there + 0.5)))

    def _first_of_missing(self, targets: np.ndarray, queue: np.ndarray) -> Iterator[np.ndarray]:
        taken = {*queue[: self._number(len(queue))].tolist()}
        for of_class in _of_each_class(targets, queue):
            if taken.isdisjoint(of_class.tolist()):
                yield of_class[:1]

    def _places(self, ids: Sequence[str]) -> np.ndarray:
        return mixed(text_hashes(ids) ^ np.uint64(text_hash(f"subset/{self.seed}")))


def _of_each_class(targets: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of every class that has any, in the order of `rows`."""
    own = targets[rows]
    if targets.ndim == 1:
        return [rows[own == label] for label in np.unique(own)]
    return [rows[has] for has in own.T.astype(np.bool_) if has.any()]
