"""One shard file of an object store: read by ranges, every byte checked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from vcache.store.checksum import crc32c
from vcache.store.commits import StoredFile
from vcache.store.layout import CRC_BYTES
from vcache.store.object_client import is_panic
from vcache.store.object_path import ObjectPath
from vcache.store.shard_file import ShardDamage, parse_tail

if TYPE_CHECKING:  # loaded late: a local store needs none of it
    from obstore.store import S3Store

RANGES_BYTES = 16 << 20
"""Most that one call reads: one stream of an object store is slower than the network, so large reads are shared out."""


def read_object_offsets(path: ObjectPath, stored: StoredFile, rows_per_shard: int) -> np.ndarray:
    """Where each inner chunk lies, as `read_offsets` says it of a file; one request.

    Raises:
        FileNotFoundError: there is no such object.
        ShardDamage: its size or its index is not what was committed, or its data are those of another shard.
    """
    from obstore import get

    end, tail_size = stored.size_bytes, CRC_BYTES + stored.spec.index_bytes(rows_per_shard)

    def read_end(client: "S3Store") -> tuple[bytes, int]:
        answer = get(client, path.key, options={"range": (max(0, end - tail_size), end)})
        return bytes(answer.bytes()), answer.meta["size"]

    try:
        tail, size = path.ask("read", read_end)
    except EOFError:
        tail, size = b"", object_size(path)
    if size != end:
        raise ShardDamage(f"has {size} bytes, {end} were committed")
    return parse_tail(tail, stored, lambda offsets: _read_ranges(path, offsets, CRC_BYTES) or [])


def object_size(path: ObjectPath) -> int:
    from obstore import head

    return path.ask("read", lambda client: head(client, path.key)["size"])


def read_object_range(path: ObjectPath, offset: int, size: int) -> memoryview:
    """The bytes from `offset` on; raises ShardDamage if the object ends before."""
    from obstore import get_range

    try:
        answer = path.ask("read", lambda client: get_range(client, path.key, start=offset, length=size))
        data = memoryview(cast(bytes, answer))
    except EOFError:
        data = memoryview(b"")
    if len(data) != size:
        raise ShardDamage("ends in the middle of a chunk")
    return data


@dataclass(frozen=True)
class WantedChunk:
    """An inner chunk of an object, and the places of the caller's memory that it is to be copied to."""

    offset: int
    row: int
    destinations: list[memoryview]


class ChunkDamage(ShardDamage):
    """A chunk of `row` cannot be read."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def read_object_chunks(path: ObjectPath, wanted: Sequence[WantedChunk], chunk_bytes: int) -> None:
    """Read chunks of one object in one call, which joins neighbours, check each, and copy it to its places.

    Raises:
        FileNotFoundError: there is no such object.
        ChunkDamage: a chunk is cut off by the end of the object, or does not match its checksum.
    """
    step = chunk_bytes + CRC_BYTES
    chunks = _read_ranges(path, [chunk.offset for chunk in wanted], step)
    for chunk, data in zip(wanted, chunks or [memoryview(b"")] * len(wanted), strict=True):
        if len(data) != step:
            raise ChunkDamage(chunk.row, "ends in the middle of a chunk")
        if crc32c(data[:chunk_bytes]) != int.from_bytes(data[chunk_bytes:], "little"):
            raise ChunkDamage(chunk.row, "has bytes that do not match their checksum")
        for destination in chunk.destinations:
            destination[:] = data[:chunk_bytes]


def _read_ranges(path: ObjectPath, offsets: Sequence[int], size: int) -> list[memoryview] | None:
    """`size` bytes at each offset, fewer at the end of the object; None if one lies behind it."""
    from obstore import get_ranges

    lengths = [size] * len(offsets)
    try:
        parts = path.ask("read", lambda client: get_ranges(client, path.key, starts=offsets, lengths=lengths))
    except EOFError:
        return None
    except BaseException as error:
        if is_panic(error):
            return None
        raise
    return [memoryview(cast(bytes, part)) for part in parts]


def cut_by_size(wanted: Iterable[WantedChunk], chunk_bytes: int) -> Iterator[list[WantedChunk]]:
    """The chunks in the order of the object, in lists that are each worth one call."""
    most = max(1, RANGES_BYTES // (chunk_bytes + CRC_BYTES))
    ordered = sorted(wanted, key=lambda chunk: chunk.offset)
    for start in range(0, len(ordered), most):
        yield ordered[start : start + most]
