"""Memory for batches that is used again, but never while anyone can still look into it."""

import math
import weakref
from collections import defaultdict, deque
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

    def __init__(self, num_rows: int, *, pinned: bool = False) -> None:
        """For batches of up to `num_rows` rows; `pinned` memory is what a GPU copies from while others compute."""
        self.num_rows, self._pinned = num_rows, pinned
        self._free: defaultdict[tuple[tuple[int, ...], np.dtype], deque[np.ndarray]] = defaultdict(deque)

    def take(self, specs: Mapping[str, ArraySpec], num_rows: int) -> dict[str, Tensor]:
        """Tensors (num_rows, *shape of a row) by name, with rubbish in them. Safe to call from any thread."""
        if num_rows > self.num_rows:
            raise ValueError(f"{num_rows} rows were asked of buffers for {self.num_rows}; make them with more")
        return {name: self._take(spec.shape, spec.numpy_dtype, num_rows) for name, spec in specs.items()}

    def _take(self, shape: tuple[int, ...], dtype: np.dtype, num_rows: int) -> Tensor:
        free = self._free[shape, dtype]
        try:
            memory = free.popleft()
        except IndexError:
            memory = self._allocate((self.num_rows, *shape), dtype)
        # The tensor's storage holds `lent`, and each view of the tensor holds the storage.
        lent = memory[:num_rows]
        weakref.finalize(lent, free.append, memory)
        return torch.from_numpy(lent)

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if not self._pinned:
            return np.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)
