"""One view of each video in each epoch, drawn by seed, epoch and video alone: whatever else is in the split or in the batch."""

from collections.abc import Sequence

import numpy as np

from vcache.pipelines.loading.hashing import mixed, text_hash, text_hashes


class ViewDraw:
    """Draws for each row of a split one of the views that can be read of it, each with the same probability."""

    def __init__(self, ids: Sequence[str], views: Sequence[int], readable: np.ndarray, *, seed: int) -> None:
        """`readable` is bool (views, rows): which view can be read of which row."""
        self._views, self._seed = np.asarray(views, dtype=np.int64), seed
        self._ranks = np.cumsum(readable, axis=0, dtype=np.int16)  # from 1, among the readable views of the row
        self._counts = self._ranks[-1].astype(np.uint64)
        self._hashes = text_hashes(ids)

    def epoch(self, number: int) -> np.ndarray:
        """The view of each row, int64 (rows,); of a row without a readable view it says nothing."""
        bits = mixed(self._hashes ^ np.uint64(text_hash(f"{self._seed}/{number}")))
        chosen = (bits >> np.uint64(32)) * self._counts >> np.uint64(32)  # 0 to count - 1
        # The first view at which the rank is reached is the one that has it.
        return self._views[(self._ranks == chosen.astype(np.int16) + 1).argmax(axis=0)]
