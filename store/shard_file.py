"""One shard file of one array: written as a stream of rows, read straight into the caller's memory, every byte checked.

One `preadv` scatters neighbouring chunks: data into the destination, each 4-byte checksum into a side buffer. So a
verified read moves every byte once, like an unverified one, and then pays for the CRC32C alone.
"""

import os
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vcache.store.checksum import crc32c
from vcache.store.commits import StoredFile
from vcache.store.files import MAX_BUFFERS, TemporaryFile, drop_done
from vcache.store.layout import CRC_BYTES, MISSING, ArraySpec, decode_index, encode_index


class ShardDamage(Exception):
    """What is wrong with a shard file, in words; the reader adds which file and which video."""


class ShardExchanged(ShardDamage):
    """A shard file is whole, but not the one that was committed here."""


class ShardFileWriter:
    """The shard file of one array while it is written: chunks and checksums as they come, the index at the end."""

    def __init__(self, view: Path, spec: ArraySpec, shard: int, rows_per_shard: int) -> None:
        self.spec, self.folder, self.path = spec, view / spec.name, view / spec.shard_path(shard)
        self._file = TemporaryFile(self.folder, str(shard))
        self._index = np.full((rows_per_shard, spec.chunks_per_row, 2), MISSING, dtype=np.uint64)
        self._size = 0
        self._chunks_crc32c = 0

    def append(self, local_row: int, array: np.ndarray) -> None:
        data = byte_view(np.ascontiguousarray(array))
        size = self.spec.chunk_bytes
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        checksums = [crc32c(chunk).to_bytes(CRC_BYTES, "little") for chunk in chunks]
        self._file.write([buffer for pair in zip(chunks, checksums, strict=True) for buffer in pair])
        step = size + CRC_BYTES
        self._index[local_row, :, 0] = self._size + step * np.arange(len(chunks), dtype=np.uint64)
        self._index[local_row, :, 1] = step
        self._size += step * len(chunks)
        self._chunks_crc32c = crc32c(b"".join(checksums), self._chunks_crc32c)

    def finish(self) -> StoredFile:
        """Write the seal and the index, and wait until all bytes are on disk."""
        index = encode_index(self._index)
        seal = self._chunks_crc32c.to_bytes(CRC_BYTES, "little")
        self._file.write([seal, index])
        self._file.sync()
        return StoredFile(
            spec=self.spec,
            size_bytes=self._size + len(seal) + len(index),
            index_crc32c=int.from_bytes(index[-CRC_BYTES:], "little"),
            chunks_crc32c=self._chunks_crc32c,
        )

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
    spec = stored.spec
    size, index_size = os.fstat(fd).st_size, spec.index_bytes(rows_per_shard)
    if size != stored.size_bytes:
        raise ShardDamage(f"has {size} bytes, {stored.size_bytes} were committed")
    tail = os.pread(fd, CRC_BYTES + index_size, max(0, size - index_size - CRC_BYTES))
    index = tail[-index_size:]
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
    sealed = size == np.count_nonzero(~absent) * step + CRC_BYTES + index_size
    seal = int.from_bytes(tail[:CRC_BYTES], "little") if sealed else _checksum_of_checksums(fd, offsets, spec)
    if seal != stored.chunks_crc32c:
        raise ShardExchanged("holds other data than were committed: it was exchanged for another file")
    return offsets


def _checksum_of_checksums(fd: int, offsets: np.ndarray, spec: ArraySpec) -> int:
    """What the seal should be, for files without one: those of other Zarr writers."""
    written = np.sort(offsets[offsets >= 0]) + spec.chunk_bytes
    return crc32c(b"".join(os.pread(fd, CRC_BYTES, offset) for offset in written.tolist()))


def read_chunks(fd: int, offsets: Sequence[int], out: memoryview, chunk_bytes: int) -> None:
    """Read the chunks at `offsets`, one after the other, into `out`, and check each against its checksum.

    Raises:
        ShardDamage: a chunk is missing, cut off by the end of the file, or does not match its checksum.
    """
    step = chunk_bytes + CRC_BYTES
    start = 0
    while start < len(offsets):
        stop = start + 1
        while stop < len(offsets) and stop - start < MAX_BUFFERS // 2 and offsets[stop] == offsets[stop - 1] + step:
            stop += 1
        _read_run(fd, offsets[start], out[start * chunk_bytes : stop * chunk_bytes], chunk_bytes)
        start = stop


def _read_run(fd: int, offset: int, out: memoryview, chunk_bytes: int) -> None:
    """Read and check chunks that lie side by side in the file."""
    if offset < 0:
        raise ShardDamage("holds nothing for it")
    chunks = [out[start : start + chunk_bytes] for start in range(0, len(out), chunk_bytes)]
    checksums = memoryview(bytearray(CRC_BYTES * len(chunks)))
    buffers: list[memoryview] = []
    for position, chunk in enumerate(chunks):
        buffers += (chunk, checksums[CRC_BYTES * position : CRC_BYTES * (position + 1)])
    read_fully(fd, buffers, offset, len(out) + len(checksums))
    for chunk, expected in zip(chunks, struct.unpack(f"<{len(chunks)}I", checksums), strict=True):
        if crc32c(chunk) != expected:
            raise ShardDamage("has bytes that do not match their checksum")


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
