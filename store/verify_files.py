"""Reading the shard files of a store from front to back and checking every chunk while it is in the processor's cache.

Memory is one buffer per thread.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vcache.store.checksum import crc32c
from vcache.store.commits import CommitRecord, StoredFile
from vcache.store.findings import Finding, mend_command
from vcache.store.finite import all_finite
from vcache.store.layout import CRC_BYTES, ArraySpec
from vcache.store.manifest import VideoTable
from vcache.store.object_file import object_size, read_object_offsets, read_object_range
from vcache.store.object_path import ObjectPath, StorePath, local
from vcache.store.object_reader import THREADS
from vcache.store.shard_file import ShardDamage, ShardExchanged, read_fully, read_offsets

# More threads than this only queue up at the disk.
_MAX_THREADS = 4
_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class ShardFile:
    """One committed shard file, to be read."""

    record: CommitRecord
    stored: StoredFile
    record_path: StorePath
    path: StorePath
    rows_per_shard: int
    table: VideoTable | None
    """None: damaged, so that videos cannot be named."""

    def finding(self, kind: str, what: str, rows: tuple[int, ...] = (), ids: tuple[str, ...] = ()) -> Finding:
        place = f"{self.stored.spec.name} of shard {self.record.shard} of {self.record.split}/view-{self.record.view}"
        return Finding(
            kind=kind,
            message=f"{self.path} ({place}) {what}. {mend_command(self.record_path.parents[2], self.record_path)}",
            path=self.path,
            split=self.record.split,
            view=self.record.view,
            shard=self.record.shard,
            array=self.stored.spec.name,
            rows=rows,
            video_ids=ids,
        )


def check_files(jobs: list[ShardFile], on_progress: Callable[[int, int], None] | None) -> Iterator[Finding]:
    """Read all the files, a few at a time; findings in the order of the jobs."""
    total, done = sum(job.stored.size_bytes for job in jobs), 0
    remote = any(isinstance(job.path, ObjectPath) for job in jobs)
    num_threads = THREADS if remote else min(_MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="store-verify")
    try:
        futures = {pool.submit(_check_file, job): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            done += futures[future].stored.size_bytes
            if on_progress is not None:
                on_progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return (finding for future in futures for finding in future.result())


def _check_file(job: ShardFile) -> list[Finding]:
    try:
        file = _RemoteFile(job.path) if isinstance(job.path, ObjectPath) else _LocalFile(local(job.path))
    except FileNotFoundError:
        return [job.finding("missing", "is missing")]
    except OSError as error:
        return [job.finding("unreadable", f"cannot be opened: {error}")]
    try:
        return _check_open_file(job, file)
    except FileNotFoundError:
        return [job.finding("missing", "is missing")]
    except ShardExchanged as damage:
        return [job.finding("exchanged", str(damage))]
    except ShardDamage as damage:
        sized = file.size() == job.stored.size_bytes
        return [job.finding("index" if sized else "size", str(damage))]
    except OSError as error:
        return [job.finding("unreadable", f"cannot be read: {error}")]
    finally:
        file.close()


class _LocalFile:
    """A shard file of the file system, open."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def offsets(self, job: ShardFile) -> np.ndarray:
        return read_offsets(self._fd, job.stored, job.rows_per_shard)

    def read(self, buffer: memoryview, offset: int) -> None:
        read_fully(self._fd, [buffer], offset, len(buffer))

    def close(self) -> None:
        os.close(self._fd)


class _RemoteFile:
    """A shard file of an object store; every read is a request."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path

    def size(self) -> int:
        return object_size(self._path)

    def offsets(self, job: ShardFile) -> np.ndarray:
        return read_object_offsets(self._path, job.stored, job.rows_per_shard)

    def read(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = read_object_range(self._path, offset, len(buffer))

    def close(self) -> None:
        """Nothing is held."""


def _check_open_file(job: ShardFile, file: _LocalFile | _RemoteFile) -> list[Finding]:
    spec, record = job.stored.spec, job.record
    offsets = file.offsets(job)
    rows = record.stored_rows
    expected = np.full_like(offsets, -1)
    step = spec.chunk_bytes + CRC_BYTES
    expected[[row - record.first_row for row in rows]] = step * np.arange(len(rows) * spec.chunks_per_row).reshape(
        len(rows), spec.chunks_per_row
    )
    if wrong := tuple(int(row) + record.first_row for row in np.flatnonzero((offsets != expected).any(axis=1))):
        ids = _video_ids(job.table, wrong)
        what = f"has an index that does not fit the record: {_name_rows(wrong, ids)} should be written, or failed"
        return [job.finding("index", what, wrong, ids)]
    damaged, infinite, checksum = _check_chunks(file, spec, len(rows) * spec.chunks_per_row)
    findings = []
    for kind, what, chunks in (
        ("chunk", "has bytes that do not match their checksum", damaged),
        ("not_finite", "holds NaN or infinity, sound as to its checksums", infinite),
    ):
        if chunks:
            hit = tuple(sorted({rows[chunk // spec.chunks_per_row] for chunk in chunks}))
            ids = _video_ids(job.table, hit)
            findings.append(job.finding(kind, f"{what}: {_name_rows(hit, ids)}", hit, ids))
    if not damaged and checksum != job.stored.chunks_crc32c:
        what = "holds sound data, but not those that were committed: it was exchanged for another file"
        findings.append(job.finding("exchanged", what))
    return findings


def _check_chunks(file: _LocalFile | _RemoteFile, spec: ArraySpec, num_chunks: int) -> tuple[list[int], list[int], int]:
    """The chunks that do not match their checksum, those that are not finite, and the CRC32C of the checksums."""
    step = spec.chunk_bytes + CRC_BYTES
    at_once = max(1, min(num_chunks, _BUFFER_BYTES // step))
    buffer = memoryview(bytearray(at_once * step))
    damaged, infinite, checksum = [], [], 0
    for first in range(0, num_chunks, at_once):
        count = min(at_once, num_chunks - first)
        file.read(buffer[: count * step], first * step)
        for position in range(count):
            data = buffer[position * step : (position + 1) * step - CRC_BYTES]
            stored = buffer[(position + 1) * step - CRC_BYTES : (position + 1) * step]
            checksum = crc32c(stored, checksum)
            if crc32c(data) != int.from_bytes(stored, "little"):
                damaged.append(first + position)
            elif not all_finite(np.frombuffer(data, dtype=spec.numpy_dtype), spec.exponent_bits):
                infinite.append(first + position)
    return damaged, infinite, checksum


def _video_ids(table: VideoTable | None, rows: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(table.ids[row] for row in rows) if table else ()


def _name_rows(rows: tuple[int, ...], ids: tuple[str, ...], most: int = 3) -> str:
    names = [f"row {row}" + (f" (video {ids[place]!r})" if ids else "") for place, row in enumerate(rows[:most])]
    return ", ".join(names) + (f" and {len(rows) - most} more" if len(rows) > most else "")
