"""Which classes are taken for which: all of a few, of many the block in which most confusions are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from vcache.pipelines.evaluation.per_class import confusions
from vcache.pipelines.evaluation.predictions import Predictions


@dataclass(frozen=True, eq=False)
class Confusion:
    """Videos of a class (row) for which the head says another (column)."""

    counts: Int[np.ndarray, "K K"]
    """Where a video has one class, the diagonal is what is right. Where it has several there is no diagonal: [k, j] are videos of
    k in which j, the best of the classes that they do not have, is ahead of k."""
    names: tuple[str, ...]

    @property
    def off_diagonal(self) -> Int[np.ndarray, "K K"]:
        """The mistakes alone."""
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        return wrong

    def pairs(self, most: int) -> list[tuple[int, int, int]]:
        """(class, taken for, videos) of the most frequent mistakes, the most frequent first."""
        wrong = self.off_diagonal
        rows, columns = np.nonzero(wrong)
        found = sorted(zip((-wrong[rows, columns]).tolist(), rows.tolist(), columns.tolist(), strict=True))
        return [(row, column, -count) for count, row, column in found[:most]]

    def block(self, size: int) -> list[int]:
        """So many classes, in their order, with many mistakes among themselves: from the most confused pair on, always the class
        that has the most with those that are there. Fewer where no other is confused with them."""
        both = self.off_diagonal + self.off_diagonal.T
        if not both.any():
            return []
        chosen = [int(k) for k in np.unravel_index(both.argmax(), both.shape)]
        while len(chosen) < min(size, len(both)):
            ties = both[chosen].sum(axis=0)
            ties[chosen] = -1
            if ties.max() > 0:
                chosen.append(int(ties.argmax()))
                continue
            left = both.copy()
            left[chosen], left[:, chosen] = 0, 0
            if len(chosen) + 2 > size or not left.any():
                break
            chosen += [int(k) for k in np.unravel_index(left.argmax(), left.shape)]
        return sorted(chosen)

    def part(self, classes: Sequence[int]) -> "Confusion":
        """Of these classes among themselves."""
        return Confusion(self.counts[np.ix_(classes, classes)], tuple(self.names[k] for k in classes))


def confusion_of(predictions: Predictions, names: Sequence[str]) -> Confusion:
    """
    Raises:
        PredictionsError: the predictions come without targets.
    """
    targets = predictions.target_tensor()
    several = targets.ndim == 2
    relevant = targets if several else torch.nn.functional.one_hot(targets, len(names))
    found = relevant.numpy() > 0
    counts = confusions(predictions.scores, found)
    if not several:
        np.fill_diagonal(counts, found.sum(axis=0) - counts.sum(axis=1))
    return Confusion(counts, tuple(names))
