"""Reading rows of a store that lies in an object store: few requests, many at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np

from vcache.store.object_file import ChunkDamage, WantedChunk, cut_by_size, read_object_chunks, read_object_offsets
from vcache.store.object_path import ObjectPath
from vcache.store.row_reader import ArrayRead, RowDamage
from vcache.store.shard_file import ShardDamage

# Requests at a time: they wait for the network, not for a core.
THREADS = 16


class ObjectReader:
    """What `RowReader` is for files. For each shard of an array one request for its index, once, and one call for the ranges of
    all rows of a batch, which asks once for what lies side by side."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="store-get")
        self._offsets: dict[ObjectPath, np.ndarray] = {}

    def forget(self) -> None:
        """Look at every object anew."""
        self._offsets = {}

    def close(self) -> None:
        self._pool.shutdown()

    def read(self, reads: Sequence[ArrayRead]) -> None:
        """Read all of them, several requests at a time.

        Raises:
            RowDamage: a row cannot be read; the memory read into then holds rubbish.
        """
        known = self._offsets  # those of this snapshot: `forget` puts others in their place
        shards = [(read, shard, positions) for read in reads for shard, positions in _by_shard(read)]
        self._each([partial(_know_offsets, known, *shard) for shard in shards])
        calls: list[Callable[[], None]] = []
        for read, shard, positions in shards:
            path = _shard_path(read, shard)
            wanted = _wanted(read, positions, path, known[path])
            calls += [partial(_read, read, path, part) for part in cut_by_size(wanted, read.spec.chunk_bytes)]
        self._each(calls)

    def _each(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make all the calls; the first error is raised when the last of those begun has ended."""
        futures = [self._pool.submit(call) for call in calls]
        try:
            for future in futures:
                future.result()
        finally:
            wait(
                [future for future in futures if not future.cancel()]
            )  # nobody writes into the caller's memory after this


def _by_shard(read: ArrayRead) -> Iterator[tuple[int, list[int]]]:
    """The shards that the rows lie in, each with the positions of its rows in `read.rows`."""
    by_shard: dict[int, list[int]] = {}
    for position, row in enumerate(read.rows):
        by_shard.setdefault(row // read.stored.rows_per_shard, []).append(position)
    yield from by_shard.items()


def _know_offsets(known: dict[ObjectPath, np.ndarray], read: ArrayRead, shard: int, positions: list[int]) -> None:
    path = _shard_path(read, shard)
    if path in known:
        return
    committed, _ = read.stored.stored_file(read.spec.name, shard)
    try:
        known[path] = read_object_offsets(path, committed, read.stored.rows_per_shard)
    except (FileNotFoundError, ShardDamage) as error:
        raise _damage(read, read.rows[positions[0]], path, error) from error


def _wanted(read: ArrayRead, positions: list[int], path: ObjectPath, offsets: np.ndarray) -> list[WantedChunk]:
    """The chunks of the rows that lie in one shard, each once, whatever is asked for twice."""
    size, row_bytes = read.selection.chunk_bytes, read.selection.row_bytes
    wanted: dict[int, WantedChunk] = {}
    for position in positions:
        row, start = read.rows[position], read.places[position] * row_bytes
        local_row = row % read.stored.rows_per_shard
        for number, offset in enumerate(offsets[local_row, read.selection.chunks].tolist()):
            if offset < 0:
                raise RowDamage(read, row, f"{path} holds nothing for it")
            place = read.out[start + number * size : start + (number + 1) * size]
            wanted.setdefault(offset, WantedChunk(offset, row, [])).destinations.append(place)
    return list(wanted.values())


def _read(read: ArrayRead, path: ObjectPath, wanted: Sequence[WantedChunk]) -> None:
    try:
        read_object_chunks(path, wanted, read.spec.chunk_bytes)
    except FileNotFoundError as error:
        raise _damage(read, wanted[0].row, path, error) from error
    except ChunkDamage as error:
        raise _damage(read, error.row, path, error) from error


def _shard_path(read: ArrayRead, shard: int) -> ObjectPath:
    assert isinstance(read.stored.folder, ObjectPath)
    return read.stored.folder / read.spec.shard_path(shard)


def _damage(read: ArrayRead, row: int, path: ObjectPath, error: Exception) -> RowDamage:
    return RowDamage(read, row, f"{path} " + ("is missing" if isinstance(error, FileNotFoundError) else str(error)))
