"""Mending the shard files of one commit record: sound rows are copied, the others computed again, the file replaced whole.

At any moment, power loss included, there is the damaged file, the mended file, or no commit record, which is "not extracted".
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vcache.store.commits import CommitRecord, RowFailure, StoredFile
from vcache.store.errors import CannotRecompute
from vcache.store.files import folders_up, in_parallel, sync_folder, write_durably
from vcache.store.layout import ArraySpec
from vcache.store.object_path import local
from vcache.store.origin import Origin, arrays_of
from vcache.store.reader import FeatureStore
from vcache.store.salvage import Salvage, salvage
from vcache.store.shard_file import ShardFileWriter
from vcache.store.view import view_folder
from vcache.store.writer import check_array


@dataclass
class ShardMender:
    """The damaged arrays of one commit record."""

    store: FeatureStore
    record: CommitRecord
    record_path: Path
    """Where the record lies, or the damaged one in whose place it comes."""
    origin: Origin
    salvaged: dict[str, Salvage] = field(default_factory=dict)
    recomputed_rows: set[int] = field(default_factory=set)
    copied_rows: int = 0
    """Rows of single arrays."""

    @property
    def rows(self) -> list[int]:
        """The rows that hold data."""
        return list(self.record.stored_rows)

    def look(self, names: Collection[str]) -> dict[str, set[int]]:
        """The rows of each array that have to be computed again."""
        first_row, rows_per_shard = self.record.first_row, self.store.manifest.rows_per_shard
        for file in self.record.files:
            if file.spec.name in names:
                path = self.path_of(file.spec)
                self.salvaged[file.spec.name] = salvage(path, file.spec, self.rows, first_row, rows_per_shard)
        bad = {name: set(found.bad) for name, found in self.salvaged.items()}
        for name, found in self.salvaged.items():
            if not bad[name] and found.chunks_crc32c != self.committed(name).chunks_crc32c:
                bad[name] = set(self.rows)  # sound, but not what was committed
        return bad

    def mend(self, bad: Mapping[str, set[int]], *, drop_record: bool = False) -> CommitRecord:
        """Write the files anew and put them in place; returns the record that now holds, which usually is the old one.

        Raises:
            CannotRecompute: a video of a bad row gives no features; nothing has changed.
        """
        writers: dict[str, ShardFileWriter] = {}
        try:
            stored = self._write(bad, writers)
            # Rows next to recomputed ones that came out in other bits have only their checksums to speak for them, unless
            # the list of all checksums is the committed one.
            if unproven := {name: set(self.rows) for name, rows in bad.items() if not self._proven(stored[name], rows)}:
                stored |= self._write(unproven, writers)
            record = replace(self.record, files=tuple(stored.get(file.spec.name, file) for file in self.record.files))
            new_record = drop_record or record != self.record
            publish_shard(self.store, record, self.record_path, writers, new_record=new_record)
            return record
        finally:
            with ExitStack() as discarded:  # all of them, also when one cannot be removed
                for writer in writers.values():
                    discarded.callback(writer.discard)

    def path_of(self, spec: ArraySpec) -> Path:
        folder = view_folder(self.store.path, self.record.split, self.record.view)
        return local(folder / spec.shard_path(self.record.shard))

    def committed(self, name: str) -> StoredFile:
        return next(file for file in self.record.files if file.spec.name == name)

    def _proven(self, stored: StoredFile, recomputed: set[int]) -> bool:
        found = self.salvaged[stored.spec.name]
        committed = self.committed(stored.spec.name).chunks_crc32c
        return committed in (stored.chunks_crc32c, found.chunks_crc32c) or recomputed >= set(self.rows)

    def _write(self, bad: Mapping[str, set[int]], writers: dict[str, ShardFileWriter]) -> dict[str, StoredFile]:
        """Files under temporary names; memory holds one row."""
        folder = view_folder(self.store.path, self.record.split, self.record.view)
        for name in bad:
            if name in writers:
                writers[name].discard()
            spec, rows_per_shard = self.committed(name).spec, self.store.manifest.rows_per_shard
            (folder / name).mkdir(parents=True, exist_ok=True)
            writers[name] = ShardFileWriter(folder, spec, self.record.shard, rows_per_shard)
        fresh = self._fresh(bad)
        for row in self.rows:
            arrays = next(fresh) if any(row in rows for rows in bad.values()) else {}
            for name, rows in bad.items():
                array = arrays[name] if row in rows else self.salvaged[name].read(row)
                self.copied_rows += row not in rows
                writers[name].append(row - self.record.first_row, writers[name].encode_row(array))
        stored = {name: writers[name].finish() for name in bad}
        in_parallel(ShardFileWriter.sync, [writers[name] for name in bad])
        return stored

    def _fresh(self, bad: Mapping[str, set[int]]) -> Iterator[Mapping[str, np.ndarray]]:
        """The bad rows in order, each once for all its arrays."""
        rows = sorted(frozenset[int]().union(*bad.values()))
        specs = tuple(self.committed(name).spec for name, some in bad.items() if some)
        if not rows:
            return
        for row, result in self.origin.recompute(self.record.split, self.record.view, rows, specs):
            if isinstance(result, RowFailure):
                raise CannotRecompute(
                    f"row {row} is damaged and its video {result.video_id!r} ({result.path}) cannot be read "
                    f"({result.kind}: {result.reason}). Put the video back and run the command again"
                )
            arrays = arrays_of(result)
            for spec in specs:
                check_array(spec, row, arrays[spec.name])
            self.recomputed_rows.add(row)
            yield arrays


def publish_shard(
    store: FeatureStore,
    record: CommitRecord,
    record_path: Path,
    writers: Mapping[str, ShardFileWriter],
    *,
    new_record: bool,
) -> None:
    """Put finished and synced files in place of others, and with `new_record` the record in place of that at `record_path`."""
    path = store.path / record.relative_path
    for writer in writers.values():
        with suppress(FileNotFoundError, NotADirectoryError):
            local(writer.path).rmdir()  # an empty folder in the place of the file
    if writers and new_record:
        # Files of other bits must never lie under a record of the old ones, not even damaged.
        _remove(record_path)
    for writer in writers.values():
        writer.publish()
    in_parallel(sync_folder, folders_up([writer.path.parent for writer in writers.values()], store.path.parent))
    if new_record:
        path.parent.mkdir(exist_ok=True)
        sync_folder(path.parents[1])
        write_durably(path, record.encode())
    if path != record_path:
        _remove(record_path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync_folder(path.parent)
