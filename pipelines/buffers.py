"""Memory for batches that is used again, but never while anyone can still look into it."""

import math
import weakref
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vcache.store.layout import ArraySpec


class BatchBuffers:
    """Tensors to read batches into. New memory costs a page fault per 4 KiB, as much as reading into it.

    A tensor's memory comes back when the tensor and all that was made of it without a copy are gone: slices, views,
    `numpy()`, what autograd saved. So there is no rule to keep: whoever holds a batch keeps it, and the next batch is
    read into other memory. Training holds three at most: the one it has finished with, the one it is at, the next.
    """

    def __init__(self, specs: Mapping[str, ArraySpec], num_rows: int, *, pinned: bool = False) -> None:
        """For batches of up to `num_rows` rows; `pinned` memory is what a GPU copies from while others compute."""
        self._specs, self._num_rows, self._pinned = dict(specs), num_rows, pinned
        self._free: dict[str, deque[np.ndarray]] = {name: deque() for name in specs}

    def take(self, num_rows: int) -> dict[str, Tensor]:
        """Tensors (num_rows, *shape of a row) by name, with rubbish in them. Safe to call from any thread."""
        return {name: self._take(name, num_rows) for name in self._specs}

    def _take(self, name: str, num_rows: int) -> Tensor:
        try:
            memory = self._free[name].popleft()
        except IndexError:
            memory = self._allocate(self._specs[name])
        # The tensor's storage holds `lent`, and each view of the tensor holds the storage.
        lent = memory[:num_rows]
        weakref.finalize(lent, self._free[name].append, memory)
        return torch.from_numpy(lent)

    def _allocate(self, spec: ArraySpec) -> np.ndarray:
        shape = (self._num_rows, *spec.shape)
        if not self._pinned:
            return np.empty(shape, dtype=spec.numpy_dtype)
        size = math.prod(shape) * spec.numpy_dtype.itemsize
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(spec.numpy_dtype).reshape(shape)
