"""Failed rows of committed shards, tried again: where a video gives features now, its shard is written anew with the row in it.

with sole_writer(store.path):
    summary = retry_rows(store, origin, ["train"])

Sound rows are copied with their checksums verified, and the files are then those of an extraction that never met the failure.
At any moment, power loss included, a commit record has its old state, or its new one, or it is not there, which is "not
extracted". A row may be filled in one record of its shard and still failed in another when a process dies between the two:
it is readable where it is filled, and the next call does the rest.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from vcache.store.commits import CommitRecord, RowFailure
from vcache.store.errors import CorruptStore, NotFinite
from vcache.store.files import in_parallel
from vcache.store.findings import mend_command
from vcache.store.mend_shard import publish_shard
from vcache.store.object_path import local
from vcache.store.origin import Origin, PartialRow, arrays_of
from vcache.store.parts import PartName
from vcache.store.reader import FeatureStore
from vcache.store.salvage import Salvage, salvage
from vcache.store.shard_file import ShardFileWriter
from vcache.store.view import view_folder
from vcache.store.writer import check_array

Report = Callable[[int, int], None]
"""report(rows tried, rows in all)."""


@dataclass
class RetrySummary:
    """What a retry did. A row counts once for every view that it failed in."""

    tried: int = 0
    stored: int = 0
    """Rows that have features now, and had none, or those of a damaged video, before."""
    failed: list[RowFailure] = field(default_factory=list)
    """Rows that still have none, with what is wrong with their videos now; rows of the split."""
    shards: int = 0
    """Shards of which files or records were replaced."""
    left: list[str] = field(default_factory=list)
    """Shards that could not be written anew, and why; they are as they were."""


def retry_rows(
    store: FeatureStore,
    origin: Origin,
    splits: Iterable[str],
    *,
    retry_partial: bool = False,
    report: Report = lambda done, total: None,
) -> RetrySummary:
    """Extract the failed rows of local, committed shards again, and write those shards anew that gain a row.

    The caller holds `sole_writer`. A reader that has the store open sees the old rows, or damage, until it is refreshed.

    Args:
        retry_partial: also try the rows of damaged videos, which stay as they are unless their video is whole now, or is
            damaged in another way.

    Raises:
        CannotRecompute: features made now would be others than those in the store; nothing has changed.
        CorruptStore: a commit record is damaged.
    """
    store.refresh()
    shards = [shard for split in splits for shard in _shards(store, split, retry_partial)]
    summary, total = RetrySummary(), sum(len(shard.rows) for shard in shards)
    try:
        for shard in shards:
            report(summary.tried, total)
            try:
                shard.retry(origin, summary)
            except (CorruptStore, NotFinite) as error:
                summary.left.append(str(error))
            summary.tried += len(shard.rows)
        report(summary.tried, total)
    finally:
        store.refresh()
    return summary


def _shards(store: FeatureStore, split: str, retry_partial: bool) -> Iterator["_Shard"]:
    first_row = 0
    for part in store.parts(split):
        for view in store.part_views(part):
            for _, records in sorted(store.view(part, view).records.items()):
                rewrites = [_Rewrite(store, record, retry_partial) for record in records]
                if any(rewrite.rows for rewrite in rewrites):
                    yield _Shard(part, view, first_row, [rewrite for rewrite in rewrites if rewrite.rows])
        first_row += store.manifest.splits[part]


@dataclass
class _Shard:
    """All records of a shard that have rows to be tried, so that each video is decoded once."""

    part: PartName
    view: int
    first_row: int
    """Of the part, in its split."""
    rewrites: list["_Rewrite"]

    @property
    def rows(self) -> list[int]:
        return sorted(frozenset[int]().union(*(rewrite.rows for rewrite in self.rewrites)))

    def retry(self, origin: Origin, summary: RetrySummary) -> None:
        """Nothing is replaced before the last row is tried."""
        arrays = tuple(file.spec for rewrite in self.rewrites for file in rewrite.record.files)
        stored, failed = 0, []
        with ExitStack() as stack:
            for rewrite in self.rewrites:
                stack.callback(rewrite.discard)
            for row, result in origin.recompute(self.part, self.view, self.rows, arrays):
                stored += any([rewrite.put(row, result) for rewrite in self.rewrites if row in rewrite.rows])
                if isinstance(result, RowFailure) and any(row in rewrite.failures for rewrite in self.rewrites):
                    failed.append(replace(result, row=self.first_row + row))
            for rewrite in self.rewrites:
                rewrite.finish()
            changed = [rewrite.publish() for rewrite in self.rewrites]
        summary.stored += stored
        summary.failed += failed
        summary.shards += any(changed)


class _Rewrite:
    """One commit record and its files, which are written anew from the first row that is put; memory holds one row."""

    def __init__(self, store: FeatureStore, record: CommitRecord, retry_partial: bool) -> None:
        self.store, self.record = store, record
        self.failures = {failure.row: failure for failure in record.failures}
        self.partial = {row.row: row for row in record.partial}
        self.rows = self.failures.keys() | (self.partial.keys() if retry_partial else set())
        self._sources: dict[str, Salvage] = {}
        self._writers: dict[str, ShardFileWriter] = {}
        self._new = record
        self._next_row = record.first_row

    def put(self, row: int, result: Mapping[str, np.ndarray] | PartialRow | RowFailure) -> bool:
        """Take what the video of a row gave, in the order of the rows; returns whether it is to be stored."""
        if isinstance(result, RowFailure):
            if row in self.failures:  # a partial row keeps what it has
                self.failures[row] = result
            return False
        damage = result.damage if isinstance(result, PartialRow) else None
        if row in self.partial and damage == self.partial[row]:
            return False
        self._append(row, arrays_of(result))
        self.failures.pop(row, None)
        self.partial.pop(row, None)
        if damage is not None:
            self.partial[row] = damage
        return True

    def finish(self) -> None:
        """Copy the rows behind the last one that was put, and wait until all is on disk."""
        files = {file.spec.name: file for file in self.record.files}
        if self._writers:
            self._copy_up_to(self.record.first_row + self.record.num_rows)
            files |= {name: writer.finish() for name, writer in self._writers.items()}
            in_parallel(ShardFileWriter.sync, list(self._writers.values()))
        self._new = replace(
            self.record,
            files=tuple(files.values()),
            failures=tuple(self.failures[row] for row in sorted(self.failures)),
            partial=tuple(self.partial[row] for row in sorted(self.partial)),
        )

    def publish(self) -> bool:
        """Put files and record in place; returns whether anything differs from what was there."""
        if self._new == self.record:
            return False
        path = local(self.store.path / self.record.relative_path)
        publish_shard(self.store, self._new, path, self._writers, new_record=True)
        return True

    def discard(self) -> None:
        with ExitStack() as discarded:  # all of them, also when one cannot be removed
            for writer in self._writers.values():
                discarded.callback(writer.discard)

    def _append(self, row: int, arrays: Mapping[str, np.ndarray]) -> None:
        for file in self.record.files:
            check_array(file.spec, row, arrays[file.spec.name])
        if not self._writers:
            self._begin()
        self._copy_up_to(row)
        for name, writer in self._writers.items():
            writer.append(row - self.record.first_row, writer.encode_row(arrays[name]))
        self._next_row = row + 1

    def _begin(self) -> None:
        record, rows_per_shard = self.record, self.store.manifest.rows_per_shard
        folder = view_folder(self.store.path, record.split, record.view)
        for file in record.files:
            path = local(folder / file.spec.shard_path(record.shard))
            found = salvage(path, file.spec, record.stored_rows, record.first_row, rows_per_shard)
            if found.bad or found.chunks_crc32c != file.chunks_crc32c:
                raise CorruptStore(
                    f"{path} is damaged, so that no row can be added to its shard. {mend_command(self.store.path)}"
                )
            self._sources[file.spec.name] = found
        for file in record.files:
            self._writers[file.spec.name] = ShardFileWriter(folder, file.spec, record.shard, rows_per_shard)

    def _copy_up_to(self, row: int) -> None:
        for stored in self.record.stored_rows:
            if self._next_row <= stored < row:
                for name, writer in self._writers.items():
                    array = self._sources[name].read(stored)
                    writer.append(stored - self.record.first_row, writer.encode_row(array))
        self._next_row = row
