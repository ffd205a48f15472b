"""Reading shard by shard, for disks that seek slowly and object stores: a few shards in memory, handed out in random order."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from torch import Tensor

from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.sources import ArraySelection, Part, StoreReader, gather, read_ahead
from vcache.store.reader import FeatureStore


def shard_numbers(store: FeatureStore, split: str) -> np.ndarray:
    """The shard of each row of the split, int64 (rows,), counted over its parts."""
    numbers, first = [], 0
    for part in store.parts(split):
        rows = np.arange(store.manifest.splits[part])
        numbers.append(first + rows // store.manifest.rows_per_shard)
        first += store.num_shards(part)
    return np.concatenate(numbers)


class WindowSource:
    """Reads windows of whole shards in the order of their files, the next one while the one before is used."""

    def __init__(
        self, reader: StoreReader, buffers: BatchBuffers, windows: Sequence[np.ndarray], shards: np.ndarray
    ) -> None:
        """`windows` are the rows of an epoch in its order (EpochOrder.windows); `shards` those of all rows of the split."""
        self._reader, self._buffers, self._shards = reader, buffers, shards
        self._window_of = np.full(len(shards), -1, dtype=np.int64)
        for number, rows in enumerate(windows):
            self._window_of[rows] = number

    def selection(self, wanted: ArraySelection) -> ArraySelection:
        return wanted

    def batches(self, parts: Sequence[Part], wanted: ArraySelection) -> Iterator[dict[str, Tensor]]:
        """Of a window only the rows of the parts are read: none of those before, nor of other ranks."""
        with _Windows(self._reader, self._in_file_order(parts), wanted, self._shards) as windows:
            # Neither `yield from` nor without a name: where the consumer stops, what is ahead would be closed before `windows`
            # are, and wait for the whole window.
            ahead = read_ahead(lambda part: self._gather(part, windows, wanted), parts)
            for arrays in ahead:
                yield arrays
                del arrays

    def _in_file_order(self, parts: Sequence[Part]) -> dict[int, Part]:
        """What the parts take of each window."""
        rows = np.concatenate([np.empty(0, dtype=np.int64), *(part.rows for part in parts)])
        views = np.concatenate([np.empty(0, dtype=np.int64), *(part.views for part in parts)])
        order = np.lexsort([rows, views, self._shards[rows], self._window_of[rows]])
        rows, views = rows[order], views[order]
        numbers, starts = np.unique(self._window_of[rows], return_index=True)
        pieces = zip(np.split(rows, starts[1:]), np.split(views, starts[1:]), strict=True)
        return {number: Part(*piece) for number, piece in zip(numbers.tolist(), pieces, strict=False)}

    def _gather(self, part: Part, windows: "_Windows", wanted: ArraySelection) -> dict[str, Tensor]:
        out, own = self._buffers.take(wanted.specs, len(part.rows)), self._window_of[part.rows]
        numbers = np.unique(own).tolist()
        for number in numbers:
            places = np.flatnonzero(own == number)
            arrays, slots = windows.get(number, part.rows[places])
            for name, array in out.items():
                if len(numbers) == 1:
                    gather(arrays[name], slots, array.numpy())
                else:  # a batch on the border of two windows, sorted by view: its rows of one are not neighbours
                    array.numpy()[places] = arrays[name].numpy()[slots]
            del arrays  # its memory is for the window after the next
        return out


class _Windows:
    """The window that is used, the one before while a batch lies in both, and the next, which is being read."""

    def __init__(self, reader: StoreReader, parts: dict[int, Part], wanted: ArraySelection, shards: np.ndarray) -> None:
        self._reader, self._parts, self._wanted, self._shards = reader, parts, wanted, shards
        self._memory = BatchBuffers(max((len(part.rows) for part in parts.values()), default=1))
        self._numbers = list(parts)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-window")
        self._reads: dict[int, Future[dict[str, Tensor]]] = {}
        self._slots = np.full(len(shards), -1, dtype=np.int64)
        self._stopped = threading.Event()

    def __enter__(self) -> "_Windows":
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def get(self, number: int, rows: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        """The arrays of a window, and where in them the rows are. Windows before it are forgotten."""
        self._reads = {asked: read for asked, read in self._reads.items() if asked >= number}
        self._begin(number)
        arrays = self._reads[number].result()
        following = self._numbers.index(number) + 1
        if following < len(self._numbers):
            self._begin(self._numbers[following])
        return arrays, self._slots[rows]

    def _begin(self, number: int) -> None:
        if number not in self._reads:
            self._slots[self._parts[number].rows] = np.arange(len(self._parts[number].rows))
            self._reads[number] = self._pool.submit(self._read, self._parts[number])

    def _read(self, part: Part) -> dict[str, Tensor]:
        """Shard by shard, so that a training that is stopped waits for one shard at most."""
        arrays = self._memory.take(self._wanted.specs, len(part.rows))
        starts = np.flatnonzero(np.diff(self._shards[part.rows], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(part.rows)], strict=True):
            if self._stopped.is_set():
                break
            piece = Part(part.rows[start:stop], part.views[start:stop])
            self._reader.read(piece, self._wanted, {name: x.numpy()[start:stop] for name, x in arrays.items()})
        return arrays
