"""What of a shard file can still be trusted: each row whose chunks all match their checksums, wherever the damage is.

Rows lie one after the other in a shard file, so that where a row should be follows from which rows failed. A file that lost
its index or its end therefore still gives the rows that are whole.
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vcache.store.checksum import crc32c
from vcache.store.errors import CorruptStore
from vcache.store.layout import CRC_BYTES, MISSING, ArraySpec, decode_index, encode_index


@dataclass
class Salvage:
    """One shard file of one array as it is on disk, against the rows that should be in it."""

    path: Path
    spec: ArraySpec
    offsets: dict[int, int]
    """Row -> where it should begin in the file."""
    bad: set[int] = field(default_factory=set)
    """Rows that are damaged, cut off or hold NaN or infinity."""
    chunks_crc32c: int = 0
    """Of the checksums as they are in the file; of no meaning if the file is cut."""
    framed: bool = False
    """Whether size and index are those of a file of these rows."""

    def read(self, row: int) -> np.ndarray:
        """A row that is not bad; raises CorruptStore if it has become so."""
        with self.path.open("rb", buffering=0) as file:
            data = _read_row(file.fileno(), self.spec, self.offsets[row])
        if data is None or not _is_sound(self.spec, data):
            raise CorruptStore(f"{self.path} changed while it was being mended: row {row} was sound and is not now")
        return _without_checksums(self.spec, data).view(self.spec.numpy_dtype).reshape(self.spec.shape)


def salvage(path: Path, spec: ArraySpec, rows: Iterable[int], first_row: int, rows_per_shard: int) -> Salvage:
    """Look at every row of the file that should hold `rows`, in that order; a file that cannot be read has only bad rows."""
    rows = list(rows)
    found = Salvage(path, spec, dict(zip(rows, range(0, _rows_bytes(spec, len(rows)), _row_bytes(spec)), strict=True)))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        found.bad = set(rows)
        return found
    try:
        for row, offset in found.offsets.items():
            data = _read_row(fd, spec, offset)
            found.chunks_crc32c = crc32c(b"" if data is None else _checksums(spec, data), found.chunks_crc32c)
            if data is None or not _is_sound(spec, data):
                found.bad.add(row)
        index = shard_index(spec, [row - first_row for row in rows], rows_per_shard)
        seal = found.chunks_crc32c.to_bytes(CRC_BYTES, "little")
        found.framed = _ends_with(fd, _rows_bytes(spec, len(rows)), seal + index)
    finally:
        os.close(fd)
    return found


def shard_index(spec: ArraySpec, local_rows: Collection[int], rows_per_shard: int) -> bytes:
    """The index of a shard file that holds these rows of the shard, one after the other."""
    entries = np.full((rows_per_shard, spec.chunks_per_row, 2), MISSING, dtype=np.uint64)
    step, num_chunks = spec.chunk_bytes + CRC_BYTES, len(local_rows) * spec.chunks_per_row
    entries[list(local_rows), :, 0] = (step * np.arange(num_chunks, dtype=np.uint64)).reshape(-1, spec.chunks_per_row)
    entries[list(local_rows), :, 1] = step
    return encode_index(entries)


def written_rows(path: Path, spec: ArraySpec, rows: range, rows_per_shard: int) -> tuple[int, ...] | None:
    """The rows that a shard file says it holds; None if its index is damaged or is not one that vcache writes."""
    try:
        with path.open("rb") as file:
            file.seek(-spec.index_bytes(rows_per_shard), os.SEEK_END)
            data = file.read()
        entries = decode_index(data, spec.chunks_per_row)
    except (OSError, ValueError):
        return None
    local = [int(row) for row in np.flatnonzero((entries != MISSING).any(axis=(1, 2)))]
    if len(local) > len(rows) or shard_index(spec, local, rows_per_shard) != data:
        return None
    return tuple(rows.start + row for row in local)


def _row_bytes(spec: ArraySpec) -> int:
    return spec.chunks_per_row * (spec.chunk_bytes + CRC_BYTES)


def _rows_bytes(spec: ArraySpec, num_rows: int) -> int:
    return num_rows * _row_bytes(spec)


def _read_row(fd: int, spec: ArraySpec, offset: int) -> np.ndarray | None:
    """(chunks, bytes of a chunk and its checksum); None if the file ends before, or the system cannot read it."""
    size, parts = _row_bytes(spec), []
    try:
        while size and (part := os.pread(fd, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
    except OSError:
        return None
    return None if size else np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(spec.chunks_per_row, -1)


def _is_sound(spec: ArraySpec, data: np.ndarray) -> bool:
    if any(crc32c(chunk[:-CRC_BYTES].data) != int.from_bytes(chunk[-CRC_BYTES:].tobytes(), "little") for chunk in data):
        return False
    if spec.exponent_bits is None:
        return True
    bits = _without_checksums(spec, data).view(f"<u{spec.numpy_dtype.itemsize}")
    return bool(((bits & spec.exponent_bits) != spec.exponent_bits).all())


def _without_checksums(spec: ArraySpec, data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data[:, : spec.chunk_bytes]).reshape(-1)


def _checksums(spec: ArraySpec, data: np.ndarray) -> bytes:
    return np.ascontiguousarray(data[:, spec.chunk_bytes :]).tobytes()


def _ends_with(fd: int, offset: int, index: bytes) -> bool:
    try:
        return os.fstat(fd).st_size == offset + len(index) and os.pread(fd, len(index), offset) == index
    except OSError:
        return False
