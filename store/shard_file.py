"""One shard file of one array: written as a stream of rows, read straight into the caller's memory, every byte checked.

One `preadv` scatters a few neighbouring chunks: data into the destination, each 4-byte checksum into a side buffer. They
are checked at once, while they are in the processor's cache. So a verified read moves every byte once, like an unverified
one, and then pays for a CRC32C of cached bytes alone.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vcache.store.checksum import crc32c
from vcache.store.commits import StoredFile
from vcache.store.files import MAX_BUFFERS, drop_done
from vcache.store.layout import CRC_BYTES, MISSING, ArraySpec, decode_index, encode_index
from vcache.store.object_path import StorePath
from vcache.store.upload import unpublished_file

RUN_BYTES = 1280 << 10
"""Bytes of one read, if a chunk is not longer: fewer cost system calls, more leave the cache before they are checked."""


class Run(NamedTuple):
    """Chunks that lie side by side in a file."""

    offset: int
    first: int
    """Where the first of them goes: its number in the result."""
    num_chunks: int


class ShardDamage(Exception):
    """What is wrong with a shard file, in words; the reader adds which file and which video."""


class ShardExchanged(ShardDamage):
    """A shard file is whole, but not the one that was committed here."""


class ShardFileWriter:
    """The shard file of one array while it is written: chunks and checksums as they come, the index at the end."""

    def __init__(self, view: StorePath, spec: ArraySpec, shard: int, rows_per_shard: int) -> None:
        self.spec, self.folder, self.path = spec, view / spec.name, view / spec.shard_path(shard)
        self._file = unpublished_file(self.folder, str(shard))
        self._index = np.full((rows_per_shard, spec.chunks_per_row, 2), MISSING, dtype=np.uint64)
        self._size = 0
        self._chunks_crc32c = 0

    def encode_row(self, array: np.ndarray) -> list[memoryview | bytes]:
        """The chunks of a row, each with its checksum after it; the chunks are views of the array where it is contiguous."""
        data = byte_view(np.ascontiguousarray(array))
        size = self.spec.chunk_bytes
        chunks = (data[start : start + size] for start in range(0, len(data), size))
        return [buffer for chunk in chunks for buffer in (chunk, crc32c(chunk).to_bytes(CRC_BYTES, "little"))]

    def append(self, local_row: int, encoded: Sequence[memoryview | bytes]) -> None:
        """Write what `encode_row` gave."""
        self._file.write(encoded)
        checksums = encoded[1::2]
        step = self.spec.chunk_bytes + CRC_BYTES
        self._index[local_row, :, 0] = self._size + step * np.arange(len(checksums), dtype=np.uint64)
        self._index[local_row, :, 1] = step
        self._size += step * len(checksums)
        self._chunks_crc32c = crc32c(b"".join(checksums), self._chunks_crc32c)

    def finish(self) -> StoredFile:
        """Write the seal and the index; `sync` is next."""
        index = encode_index(self._index)
        seal = self._chunks_crc32c.to_bytes(CRC_BYTES, "little")
        self._file.write([seal, index])
        return StoredFile(
            spec=self.spec,
            size_bytes=self._size + len(seal) + len(index),
            index_crc32c=int.from_bytes(index[-CRC_BYTES:], "little"),
            chunks_crc32c=self._chunks_crc32c,
        )

    def sync(self) -> None:
        """Wait until all bytes are on disk."""
        self._file.sync()

    def publish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.publish(self.path)

    def discard(self) -> None:
        self._file.discard()


class OpenFile:
    """A read-only file descriptor that closes when the last holder of this object lets go of it.

    So a file that falls out of the cache while another thread reads from it stays open until that read is done; a plain
    close would let the kernel hand the same number to another file in the middle of it.
    """

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)


class OpenFiles:
    """At most `limit` files open at a time, the least recently used closed first. Safe to share among threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = OpenFile(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return file

    def clear(self) -> None:
        with self._lock:
            self._files.clear()


def read_offsets(fd: int, stored: StoredFile, rows_per_shard: int) -> np.ndarray:
    """Where each inner chunk lies in the file: int64 (rows, chunks), -1 for a chunk that was never written.

    Raises:
        ShardDamage: the file's size, its index or the index's checksum is not what was committed.
        ShardExchanged: the file's data are not those that were committed, but perhaps those of another shard: all sound
            shards of one size have the same index.
    """
    size, tail_size = os.fstat(fd).st_size, CRC_BYTES + stored.spec.index_bytes(rows_per_shard)
    if size != stored.size_bytes:
        raise ShardDamage(f"has {size} bytes, {stored.size_bytes} were committed")
    tail = os.pread(fd, tail_size, max(0, size - tail_size))
    return parse_tail(tail, stored, lambda offsets: [os.pread(fd, CRC_BYTES, offset) for offset in offsets])


def parse_tail(
    tail: bytes, stored: StoredFile, read_checksums: Callable[[list[int]], Iterable[bytes | memoryview]]
) -> np.ndarray:
    """The offsets in the last bytes of a file, the seal and the index, as `read_offsets` gives them.

    Args:
        read_checksums: the 4 bytes at each of some offsets; asked only of files without a seal, those of other Zarr writers.

    Raises:
        ShardDamage, ShardExchanged: as `read_offsets` does.
    """
    spec, index = stored.spec, tail[CRC_BYTES:]
    if index[-CRC_BYTES:] != stored.index_crc32c.to_bytes(CRC_BYTES, "little"):
        raise ShardDamage("has another index than the committed one")
    try:
        entries = decode_index(index, spec.chunks_per_row)
    except ValueError as error:
        raise ShardDamage("has an index that does not match its checksum") from error
    absent = entries[..., 0] == MISSING
    if (~absent & (entries[..., 1] != spec.chunk_bytes + CRC_BYTES)).any():
        raise ShardDamage("has chunks of another size than its metadata says")
    offsets = np.where(absent, -1, entries[..., 0].astype(np.int64))
    step = spec.chunk_bytes + CRC_BYTES
    sealed = stored.size_bytes == np.count_nonzero(~absent) * step + len(tail)
    checksums = (np.sort(offsets[~absent]) + spec.chunk_bytes).tolist()
    seal = int.from_bytes(tail[:CRC_BYTES], "little") if sealed else crc32c(b"".join(read_checksums(checksums)))
    if seal != stored.chunks_crc32c:
        raise ShardExchanged("holds other data than were committed: it was exchanged for another file")
    return offsets


def split_into_runs(offsets: Sequence[int], chunk_bytes: int) -> list[Run]:
    """The chunks at `offsets`, in this order, as runs of neighbours in the file.

    A run is no longer than what stays in the processor's cache between the copy and the checksum.
    """
    step = chunk_bytes + CRC_BYTES
    most = max(1, min(MAX_BUFFERS // 2, RUN_BYTES // step))
    runs: list[Run] = []
    for position, offset in enumerate(offsets):
        if runs and runs[-1].num_chunks < most and offset == runs[-1].offset + runs[-1].num_chunks * step:
            runs[-1] = runs[-1]._replace(num_chunks=runs[-1].num_chunks + 1)
        else:
            runs.append(Run(offset, position, 1))
    return runs


class ShardRows:
    """Where the rows of one shard file lie."""

    def __init__(self, path: str, offsets: np.ndarray, chunk_bytes: int) -> None:
        """`offsets` are those of `read_offsets`."""
        self.path = path
        in_order = (chunk_bytes + CRC_BYTES) * np.arange(offsets.shape[1])
        whole = (offsets == offsets[:, :1] + in_order).all(axis=1) & (offsets[:, 0] >= 0)
        self._starts: list[int] = np.where(whole, offsets[:, 0], -1).tolist()
        self._offsets = None if whole.all() else offsets

    def runs(self, local_row: int, selection: "Selection") -> tuple[int, Sequence[Run]]:
        """The selected chunks of a row: where the offsets of the runs count from, and the runs."""
        start = self._starts[local_row]
        if start >= 0 or self._offsets is None:
            return start, selection.runs
        offsets = self._offsets[local_row, selection.chunks]
        if (offsets < 0).any():
            raise ShardDamage("holds nothing for it")
        return 0, split_into_runs(offsets.tolist(), selection.chunk_bytes)


class Selection:
    """Which chunks of a row to read, the same of every row; `runs` are those of a row that lies in one piece."""

    def __init__(self, chunks: np.ndarray, chunk_bytes: int) -> None:
        self.chunks, self.chunk_bytes = chunks, chunk_bytes
        self.runs = split_into_runs((self.chunks * (chunk_bytes + CRC_BYTES)).tolist(), chunk_bytes)
        self.row_bytes = len(self.chunks) * chunk_bytes


class ChunkReader:
    """Reads runs of chunks into the caller's memory and checks each chunk. For one thread at a time."""

    def __init__(self) -> None:
        self._places: list[memoryview] = []

    def read(self, fd: int, start: int, runs: Sequence[Run], out: memoryview, chunk_bytes: int) -> None:
        """Fill `out` with the chunks of the runs, whose offsets count from `start`.

        Raises:
            ShardDamage: a chunk is cut off by the end of the file or does not match its checksum.
        """
        from_bytes = int.from_bytes
        for offset, first, count in runs:
            if count > len(self._places):
                self._make_places(count)
            begins = range(first * chunk_bytes, (first + count) * chunk_bytes, chunk_bytes)
            chunks = [out[begin : begin + chunk_bytes] for begin in begins]
            checksums = self._places[:count]
            buffers = [out] * (2 * count)
            buffers[::2], buffers[1::2] = chunks, checksums
            read_fully(fd, buffers, start + offset, count * (chunk_bytes + CRC_BYTES))
            for chunk, expected in zip(chunks, checksums, strict=True):
                if crc32c(chunk) != from_bytes(expected, "little"):
                    raise ShardDamage("has bytes that do not match their checksum")

    def _make_places(self, count: int) -> None:
        checksums = memoryview(bytearray(CRC_BYTES * count))
        self._places = [checksums[CRC_BYTES * i : CRC_BYTES * (i + 1)] for i in range(count)]


def read_fully(fd: int, buffers: list[memoryview], offset: int, size: int) -> None:
    """Fill the buffers with the `size` bytes at `offset`; raises ShardDamage if the file ends before."""
    done = os.preadv(fd, buffers, offset)
    while done < size:
        buffers = drop_done(buffers, done)
        offset, size = offset + done, size - done
        done = os.preadv(fd, buffers, offset)
        if done == 0:
            raise ShardDamage("ends in the middle of a chunk")


def byte_view(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array as bytes."""
    return memoryview(array.reshape(-1).view(np.uint8).data)
