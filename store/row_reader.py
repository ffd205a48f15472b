"""Reading rows of several arrays at once: the threads, the open files, and where the rows of each shard lie."""

import errno
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from vcache.store.layout import CRC_BYTES, ArraySpec
from vcache.store.shard_file import ChunkReader, OpenFiles, Selection, ShardDamage, ShardRows, read_offsets
from vcache.store.view import StoredView

# Below this a second thread costs more than it brings.
MIN_BYTES_PER_THREAD = 4 << 20
# What a thread takes at a time: small, so that all are done at the same moment.
_PIECE_BYTES = 2 << 20
# Slower than this, in bytes a second, it is the disk that is read: a copy out of the page cache with its checksum takes a
# third of the time even on a busy machine.
_MEMORY_SPEED = 2e9
_AHEAD = 8
"""Pieces that the kernel is told of before they are read."""


@dataclass(frozen=True, eq=False)
class ArrayRead:
    """Rows of one array of a part, and the place of each in `out`."""

    stored: StoredView
    spec: ArraySpec
    selection: Selection
    rows: list[int]
    places: list[int]
    out: memoryview

    def pieces(self) -> "Iterator[_Piece]":
        """The rows in the order of the files, a few at a time."""
        order = np.argsort(self.rows, kind="stable").tolist()
        step = max(1, _PIECE_BYTES // self.selection.row_bytes)
        return (_Piece(self, order[start : start + step]) for start in range(0, len(order), step))


@dataclass(eq=False)
class _Piece:
    """What one thread reads without looking up: some of the rows, by their position in `read.rows`."""

    read: ArrayRead
    positions: list[int]
    announced: bool = False


class RowDamage(Exception):
    """A row cannot be read: which, and in words why."""

    def __init__(self, read: ArrayRead, row: int, what: str) -> None:
        super().__init__(what)
        self.read, self.row = read, row


class RowReader:
    """Reads rows with a few threads. Several calls may read at the same time."""

    def __init__(self, num_threads: int, max_open_files: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="store-read")
        self._files = OpenFiles(max_open_files)
        self._from_disk = False
        """Whether the last piece was so slow that it cannot have come from the page cache."""
        self._shards: dict[tuple[str, int, str, int], ShardRows] = {}  # by part, view, array and shard

    def forget(self) -> None:
        """Look at every file anew."""
        self._shards = {}
        self._files.clear()

    def close(self) -> None:
        self._pool.shutdown()
        self._files.clear()

    def read(self, reads: Sequence[ArrayRead]) -> None:
        """Read all of them, the rows shared out among the threads.

        Raises:
            RowDamage: of the first row that cannot be read; the memory read into then holds rubbish.
        """
        pieces = deque(piece for read in reads for piece in read.pieces())
        size = sum(len(read.rows) * read.selection.row_bytes for read in reads)
        num_threads = min(self._num_threads, len(pieces), size // MIN_BYTES_PER_THREAD)
        helpers = [self._pool.submit(self._read_pieces, pieces) for _ in range(num_threads - 1)]
        try:
            self._read_pieces(pieces)
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)  # nobody may write into the caller's memory after this call has returned or raised
        for helper in begun:
            helper.result()

    def _read_pieces(self, pieces: deque[_Piece]) -> None:
        """Take pieces until none is left; after an error nobody takes another."""
        reader = ChunkReader()
        try:
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    return
                if self._from_disk:
                    self._announce(pieces)
                began = time.perf_counter()
                self._read_piece(piece, reader)
                num_bytes = len(piece.positions) * piece.read.selection.row_bytes
                self._from_disk = num_bytes < _MEMORY_SPEED * (time.perf_counter() - began)
        except BaseException:
            pieces.clear()
            raise

    def _read_piece(self, piece: _Piece, reader: ChunkReader) -> None:
        read, selection = piece.read, piece.read.selection
        row_bytes, rows_per_shard = selection.row_bytes, read.stored.rows_per_shard
        for position in piece.positions:
            row, place = read.rows[position], read.places[position]
            shard, local_row = divmod(row, rows_per_shard)
            out = read.out[place * row_bytes : (place + 1) * row_bytes]
            try:
                rows = self._shard_rows(read, shard)
                start, runs = rows.runs(local_row, selection)
                file = self._files.get(rows.path)  # held while it is read: see OpenFile
                reader.read(file.fd, start, runs, out, selection.chunk_bytes)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise RowDamage(read, row, f"{_shard_path(read, shard)} is missing") from error
            except ShardDamage as error:
                raise RowDamage(read, row, f"{_shard_path(read, shard)} {error}") from error
            except OSError as error:
                if error.errno != errno.EIO:  # too many open files, say, is no damage
                    raise
                raise RowDamage(read, row, f"{_shard_path(read, shard)} cannot be read: {error.strerror}") from error

    def _announce(self, pieces: deque[_Piece]) -> None:
        """Tell the kernel which bytes come next, so that the disk does not wait for the copy and the checksum."""
        with suppress(IndexError, OSError, ShardDamage):  # for the read itself to say
            for piece in (pieces[ahead] for ahead in range(_AHEAD)):
                if piece.announced:
                    continue
                piece.announced = True
                for position in piece.positions:
                    shard, local_row = divmod(piece.read.rows[position], piece.read.stored.rows_per_shard)
                    rows = self._shard_rows(piece.read, shard)
                    start, runs = rows.runs(local_row, piece.read.selection)
                    file = self._files.get(rows.path)
                    for offset, _, count in runs:
                        size = count * (piece.read.selection.chunk_bytes + CRC_BYTES)
                        os.posix_fadvise(file.fd, start + offset, size, os.POSIX_FADV_WILLNEED)

    def _shard_rows(self, read: ArrayRead, shard: int) -> ShardRows:
        key = (read.stored.part, read.stored.view, read.spec.name, shard)
        shards = self._shards  # those of this snapshot: `forget` puts others in their place
        known = shards.get(key)
        if known is None:
            path = _shard_path(read, shard)
            committed, _ = read.stored.stored_file(read.spec.name, shard)
            file = self._files.get(path)
            offsets = read_offsets(file.fd, committed, read.stored.rows_per_shard)
            known = shards[key] = ShardRows(path, offsets, read.spec.chunk_bytes)
        return known


def _shard_path(read: ArrayRead, shard: int) -> str:
    return str(read.stored.folder / read.spec.shard_path(shard))
