"""In which order an epoch takes the videos: by seed, epoch and the videos' number, never by ranks, threads or batch sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Shuffle = Literal["full", "shards"]


class OrderError(ValueError):
    """An order that cannot be had of this split, or not together with another wish."""


@dataclass(frozen=True)
class EpochOrder:
    """Draws an order of rows for each epoch. The rows may be any; where they come from does not change the draw.

    `balanced` takes every class equally often: an epoch has as many clips as there are rows, and each class gets its share of
    them, one more or less. Of a large class an epoch then takes a part, the next epoch goes on where it ended, and no video of
    a class comes again before all the others have come; of a small class videos come several times in an epoch.
    """

    seed: int = 0
    balanced: bool = False
    shuffle: Shuffle = "full"
    """ "shards": whole shards in random order, the rows of a few at a time shuffled; see `windows`."""
    buffer_clips: int = 512
    """Clips that are shuffled together with "shards". Twice as many are in memory: the next are read meanwhile."""

    def __post_init__(self) -> None:
        if self.balanced and self.shuffle == "shards":
            raise OrderError(
                "class-balanced sampling takes videos from all over the split, and shuffling by shards reads it piece by piece. "
                "Choose one: leave out balanced, or shuffle in full."
            )
        if self.buffer_clips < 1:
            raise OrderError(f"buffer_clips ({self.buffer_clips}) must be at least 1")

    def order(
        self, epoch: int, rows: np.ndarray, *, labels: np.ndarray | None = None, shards: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows of epoch `epoch` in the order in which they are trained on, int64.

        Args:
            labels: class of each of `rows`; asked for where the order is balanced.
            shards: shard of each of `rows`; asked for where they are shuffled by shards.
        """
        if self.shuffle == "shards":
            return np.concatenate([rows[:0], *self.windows(epoch, rows, shards)])
        if self.balanced:
            if labels is None:
                raise OrderError("a balanced order needs the class of each row")
            rows = np.concatenate([rows[:0], *self._of_classes(epoch, rows, labels)])
        return self._rng(epoch).permutation(rows)

    def windows(self, epoch: int, rows: np.ndarray, shards: np.ndarray | None) -> list[np.ndarray]:
        """The same order in pieces of about `buffer_clips` rows: those of a few whole shards each, shuffled.

        Which shards come together, and when, is drawn for each epoch.
        """
        if shards is None:
            raise OrderError("shuffling by shards needs the shard of each row")
        rng = self._rng(epoch)
        visited = rng.permutation(np.unique(shards))
        count = min(-(-len(rows) // self.buffer_clips), len(visited))
        if not count:
            return []
        window_of = np.empty(int(visited.max()) + 1, dtype=np.int64)
        for number, group in enumerate(np.array_split(visited, count)):
            window_of[group] = number
        own = window_of[shards]
        ends = np.cumsum(np.bincount(own, minlength=count))
        pieces = np.split(rows[np.argsort(own, kind="stable")], ends[:-1])
        return [rng.permutation(piece) for piece in pieces]

    def _of_classes(self, epoch: int, rows: np.ndarray, labels: np.ndarray) -> Iterator[np.ndarray]:
        """What the epoch takes of each class.

        Epoch e takes what a stream of len(rows) per epoch gives the class: its j-th of C classes has had
        floor((e len(rows) + j) / C) clips before it, which sums to e len(rows) over the classes (Hermite's identity). A class
        gives its videos round and round in one drawn order.
        """
        classes = np.unique(labels)
        places = np.random.default_rng([self.seed, 0, 1]).permutation(len(classes))
        for label, place in zip(classes, places, strict=True):
            own = rows[labels == label]
            start, stop = ((number * len(rows) + int(place)) // len(classes) for number in (epoch, epoch + 1))
            around = np.random.default_rng([self.seed, int(label), 2]).permutation(own)
            yield around[np.arange(start, stop) % len(own)]

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])


def share(batch: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
    """The part of a global batch that a rank takes: every `num_ranks`-th, from its own number on; it may be empty."""
    return batch[rank::num_ranks]
