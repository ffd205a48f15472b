"""FeatureStore: open a store, see what is in it, and read rows at the speed of the disk."""

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from vcache.store.commits import CommitRecord, RowFailure
from vcache.store.constants import read_constant
from vcache.store.errors import (
    ArrayNotFound,
    CorruptStore,
    RowNotCommitted,
    SplitNotFound,
    StoreKeyMismatch,
)
from vcache.store.findings import mend_command
from vcache.store.key import spec_difference
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable, read_manifest
from vcache.store.object_path import ObjectPath, StorePath, store_path
from vcache.store.object_reader import THREADS, ObjectReader
from vcache.store.parts import PartName, SplitParts, group_parts, row_numbers, split_of
from vcache.store.row_reader import ArrayRead, RowDamage, RowReader
from vcache.store.shard_file import Selection, byte_view
from vcache.store.tables import join_tables, read_table
from vcache.store.view import FAILED, READABLE, StoredView

MAX_OPEN_FILES = 256  # a quarter of the usual limit of a process


class FeatureStore:
    """A store opened for reading. Safe to share among threads; several calls may read at the same time.

    It is a snapshot: what other processes commit afterwards shows up after `refresh()`.

    Methods that take a `split` see all its videos, as one list. Those that take a `part` (parts.py) are for writing and
    checking; rows and shards are then those of the part. A split that was never grown is one part of the same name.

        with FeatureStore.open("k400.zarr") as store:
            tokens = store.read("train", "tokens/11", [5, 2, 9])  # (3, 8, 197, 768)
    """

    def __init__(self, path: StorePath, manifest: Manifest, num_threads: int) -> None:
        self.path, self.manifest = path, manifest
        remote = isinstance(path, ObjectPath)
        self._rows = ObjectReader(num_threads) if remote else RowReader(num_threads, MAX_OPEN_FILES)
        self._lock = threading.RLock()
        self._forget()

    @classmethod
    def open(cls, path: str | StorePath, *, num_threads: int | None = None) -> "FeatureStore":
        """Open the store at `path`; `num_threads` read one call in parallel (default: up to 4, more for object stores).

        Raises:
            StoreNotFound, UnsupportedFormat, CorruptStore: see errors.py.
        """
        folder = store_path(path)
        default = THREADS if isinstance(folder, ObjectPath) else min(4, os.cpu_count() or 1)
        return cls(folder, read_manifest(folder), num_threads or default)

    def refresh(self) -> None:
        """See what is on disk now."""
        self.manifest = read_manifest(self.path)
        self._forget()

    def close(self) -> None:
        self._rows.close()

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, key={self.manifest.key}, splits={self.splits})"

    def check_key(self, expected_key: str, expected_spec: Mapping[str, Any]) -> None:
        """Raise StoreKeyMismatch, with the fields that differ, unless the features were made in the expected way."""
        if self.manifest.key != expected_key:
            differences = spec_difference(self.manifest.spec, expected_spec)
            raise StoreKeyMismatch(self.path, self.manifest.key, expected_key, differences)

    @property
    def splits(self) -> dict[str, int]:
        """Split -> number of its videos, in the order the splits were added."""
        return {name: split.num_rows for name, split in self._splits.items()}

    def parts(self, split: str) -> tuple[PartName, ...]:
        """The parts of the split in the order of its rows: (split,) if it was never grown."""
        return self._split(split).names

    def videos(self, split: str) -> VideoTable:
        """Ids, paths and labels of the split, by row."""
        with self._lock:
            parts = self.parts(split)
            if len(parts) == 1:
                return self.part_videos(parts[0])
            if split not in self._joined_tables:
                self._joined_tables[split] = join_tables(self.path, split, [self.part_videos(part) for part in parts])
            return self._joined_tables[split]

    def constant(self, name: str) -> np.ndarray:
        """An array of the whole store, as "tokens_mean/8"; not to be written to.

        Raises:
            ArrayNotFound, CorruptStore: there is none of that name, or it is damaged.
        """
        if name not in self.manifest.constants:
            there = ", ".join(self.manifest.constants) or "none"
            raise ArrayNotFound(f"no constant {name!r} in {self.path}; there are: {there}")
        with self._lock:
            if name not in self._constants:
                self._constants[name] = read_constant(self.path, name, self.manifest.constants[name])
                self._constants[name].flags.writeable = False
            return self._constants[name]

    def arrays(self, split: str, view: int = 0) -> dict[str, ArraySpec]:
        """The arrays by name that all parts of the split declare; which rows of them hold data, `committed_rows` knows.

        An array that only some parts declare can be read where it is: the rows of the other parts are not committed.
        """
        first, *others = (self.view(part, view).specs for part in self.parts(split))
        return {name: spec for name, spec in first.items() if all(name in specs for specs in others)}

    def committed_rows(self, split: str, names: Iterable[str], view: int = 0) -> np.ndarray:
        """bool (rows,): True where all the named arrays hold data, so extracted and not failed."""
        names, parts = tuple(names), self.parts(split)
        for name in names:
            self._spec(split, name, view)
        return np.concatenate([self._committed_rows(part, names, view) for part in parts])

    def failures(self, split: str, view: int = 0) -> tuple[RowFailure, ...]:
        """The recorded failures of the split, in the order of its rows."""
        return self._of_split(split, view, StoredView.failures)

    def partial(self, split: str, view: int = 0) -> tuple[RowFailure, ...]:
        """The rows of the split that are stored although their video is damaged, in order, with what is wrong with it."""
        return self._of_split(split, view, StoredView.partial)

    def views(self, split: str) -> tuple[int, ...]:
        """The views that have arrays in all parts of the split."""
        first, *others = (self.part_views(part) for part in self.parts(split))
        return tuple(view for view in first if all(view in views for views in others))

    def size_bytes(self) -> int:
        """Bytes of all committed shard files."""
        return sum(
            self.view(part, view).size_bytes() for part in self.manifest.splits for view in self.part_views(part)
        )

    def part_videos(self, part: PartName) -> VideoTable:
        """Ids, paths and labels of the part, by row."""
        with self._lock:
            if part not in self._tables:
                self._tables[part] = read_table(self.path / part, self._part_rows(part))
            return self._tables[part]

    def part_views(self, part: PartName) -> tuple[int, ...]:
        """The views of the part that have arrays."""
        self._part_rows(part)
        numbers = (folder.name.removeprefix("view-") for folder in (self.path / part).glob("view-*/"))
        return tuple(sorted(int(number) for number in numbers if number.isdecimal()))

    def committed_arrays(self, part: PartName, shard: int, view: int = 0) -> frozenset[str]:
        """The arrays that are complete in this shard."""
        self.shard_rows(part, shard)
        records = self.view(part, view).records.get(shard, [])
        return frozenset[str]().union(*(record.arrays for record in records))

    def num_shards(self, part: PartName) -> int:
        return -(-self._part_rows(part) // self.manifest.rows_per_shard)

    def shard_rows(self, part: PartName, shard: int) -> range:
        """The rows of the part that lie in this shard."""
        if not 0 <= shard < self.num_shards(part):
            raise IndexError(f"shard {shard} of {part!r}: there are shards 0 to {self.num_shards(part) - 1}")
        first = shard * self.manifest.rows_per_shard
        return range(first, min(first + self.manifest.rows_per_shard, self._part_rows(part)))

    def view(self, part: PartName, view: int = 0) -> StoredView:
        """The snapshot of one view of a part, which the methods above look into."""
        num_rows = self._part_rows(part)
        with self._lock:
            if (part, view) not in self._views:
                self._views[part, view] = StoredView(self.path, part, view, num_rows, self.manifest.rows_per_shard)
            return self._views[part, view]

    def include(self, record: CommitRecord) -> None:
        """Take in a shard that this process has just committed, without reading the other records again."""
        self.view(record.split, record.view).include(record)

    def read(
        self,
        split: str,
        name: str,
        rows: Sequence[int] | np.ndarray,
        *,
        view: int = 0,
        frames: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read rows of an array, every byte checked against its checksum.

        Args:
            rows: rows of the split, in any order, with repeats.
            frames: positions on the frame axis, in any order, with repeats; only the chunks of these frames are read.
            out: C-contiguous array of the result's shape and dtype to read into. Reading into memory that is reused
                saves the page faults of a new array.

        Returns:
            (len(rows), *shape of a row), or with `frames` (len(rows), len(frames), *the other axes); `out` if given.

        Raises:
            RowNotCommitted: a row is not extracted yet or its extraction failed; names the video.
            CorruptStore: bytes are missing or damaged; names file, row and video. `out` then holds rubbish.
            ArrayNotFound, SplitNotFound, IndexError, ValueError: the request cannot be met by any store like this.
        """
        into = None if out is None else {name: out}
        return self.read_many(split, [name], rows, view=view, frames=frames, out=into)[name]

    def read_many(
        self,
        split: str,
        names: Iterable[str],
        rows: Sequence[int] | np.ndarray,
        *,
        view: int = 0,
        frames: Sequence[int] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Read the same rows of several arrays, by name: `read` of each, but shared among the threads as one.

        Raises:
            As `read` does; `out` must hold an array for every name.
        """
        parts = self._split(split)
        wanted = row_numbers(rows, split, parts.num_rows)
        placed = [(self.view(part, view), positions, numbers) for part, positions, numbers in parts.by_part(wanted)]
        results: dict[str, np.ndarray] = {}
        reads: list[ArrayRead] = []
        for name in dict.fromkeys(names):
            spec = self._spec(split, name, view)
            selection = Selection(_chunk_positions(spec, frames), spec.chunk_bytes)
            shape = (len(wanted), *spec.shape) if frames is None else (len(wanted), len(frames), *spec.shape[1:])
            results[name] = _destination(None if out is None else out[name], shape, spec)
            for stored, positions, numbers in placed:
                self._check_readable(stored, name, numbers)
                if results[name].size:
                    memory = byte_view(results[name])
                    reads.append(ArrayRead(stored, spec, selection, numbers.tolist(), positions.tolist(), memory))
        try:
            self._rows.read(reads)
        except RowDamage as damage:
            raise self._corrupt(damage) from damage
        return results

    def _corrupt(self, damage: RowDamage) -> CorruptStore:
        part, name, row = damage.read.stored.part, damage.read.spec.name, damage.row
        _, record = damage.read.stored.stored_file(name, row // self.manifest.rows_per_shard)
        return CorruptStore(
            f"{damage}: row {row} of {part}/{name} (video {self.part_videos(part).ids[row]!r}) cannot be read. "
            f"{mend_command(self.path, self.path / record.relative_path)}"
        )

    def _check_readable(self, stored: StoredView, name: str, wanted: np.ndarray) -> None:
        """Raise RowNotCommitted for the first of these rows of a part that holds no data."""
        if name not in stored.specs:  # another part of the split has it
            raise self._not_committed(stored, name, int(wanted[0]), failed=False)
        states = stored.row_states(name)[wanted]
        if (states != READABLE).any():
            first = int(np.argmax(states != READABLE))
            raise self._not_committed(stored, name, int(wanted[first]), states[first] == FAILED)

    def _not_committed(self, stored: StoredView, name: str, row: int, failed: bool) -> RowNotCommitted:
        reason = "it is not extracted yet"
        if failed:
            failure = next(failure for failure in stored.failures(name) if failure.row == row)
            reason = f"its extraction failed ({failure.kind}: {failure.reason})"
        return RowNotCommitted(
            f"{self.path} holds no {name} for video {self.part_videos(stored.part).ids[row]!r} (row {row} of "
            f"{stored.part}/view-{stored.view}): {reason}"
        )

    def _of_split(
        self, split: str, view: int, entries: Callable[[StoredView], list[RowFailure]]
    ) -> tuple[RowFailure, ...]:
        parts = self._split(split)
        return tuple(
            replace(entry, row=start + entry.row)
            for part, start in zip(parts.names, parts.starts, strict=True)
            for entry in entries(self.view(part, view))
        )

    def _spec(self, split: str, name: str, view: int) -> ArraySpec:
        """The array as a part of the split declares it; raises ArrayNotFound if none does."""
        views = [self.view(part, view) for part in self.parts(split)]
        return next((stored for stored in views if name in stored.specs), views[0]).spec(name)

    def _committed_rows(self, part: PartName, names: Iterable[str], view: int) -> np.ndarray:
        stored = self.view(part, view)
        committed = np.ones(stored.num_rows, dtype=np.bool_)
        for name in names:
            committed &= stored.row_states(name) == READABLE if name in stored.specs else False
        return committed

    def _split(self, split: str) -> SplitParts:
        if split not in self._splits:
            raise SplitNotFound(_no_split(self.path, split, self._splits))
        return self._splits[split]

    def _part_rows(self, part: PartName) -> int:
        if part not in self.manifest.splits:
            raise SplitNotFound(_no_split(self.path, part, self.manifest.splits))
        return self.manifest.splits[part]

    def _forget(self) -> None:
        with self._lock:
            self._splits = group_parts(self.manifest.splits)
            self._tables: dict[PartName, VideoTable] = {}
            self._constants: dict[str, np.ndarray] = {}
            self._joined_tables: dict[str, VideoTable] = {}
            self._views: dict[tuple[PartName, int], StoredView] = {}
        self._rows.forget()


def _no_split(path: StorePath, asked: str, there: Iterable[str]) -> str:
    names = tuple(there)
    if split_of(asked) in names and asked not in names:
        return f"{asked!r} in {path} is no split but one of the parts of {split_of(asked)!r}; name the split"
    return f"no split {asked!r} in {path}; there are: {', '.join(names) or 'none'}"


def _chunk_positions(spec: ArraySpec, frames: Sequence[int] | None) -> np.ndarray:
    """Which inner chunks of a row to read, in the order of the result."""
    if frames is None:
        return np.arange(spec.chunks_per_row)
    if not spec.by_frame:
        raise ValueError(f"{spec.name} is stored in chunks of {spec.chunk}, not by frame; read it without `frames`")
    positions = np.asarray(frames, dtype=np.int64)
    if positions.ndim != 1 or (positions < 0).any() or (positions >= spec.shape[0]).any():
        raise ValueError(f"frames {list(frames)} of {spec.name}: there are frames 0 to {spec.shape[0] - 1}")
    per_frame = spec.chunks_per_row // spec.shape[0]
    return (positions[:, None] * per_frame + np.arange(per_frame)).reshape(-1)


def _destination(out: np.ndarray | None, shape: tuple[int, ...], spec: ArraySpec) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype=spec.numpy_dtype)
    if out.shape != shape or out.dtype != spec.numpy_dtype:
        raise ValueError(f"out must be {spec.dtype} of shape {shape}, got {out.dtype} of shape {out.shape}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out must be C-contiguous and writeable")
    return out
