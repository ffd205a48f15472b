"""Rebuilding a damaged commit record from the shard files that it named.

The name of a record says which set of arrays it is of, the files say which rows they hold, and the damaged record itself
often still holds the checksum that the rebuilt one must have. Where it does not, one row is computed again: files of
another store or of another shard would be sound in every byte.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vcache.store.commits import CommitRecord, RowFailure, StoredFile, pass_name
from vcache.store.compare import compare
from vcache.store.errors import CannotRecompute
from vcache.store.files import sync_folder
from vcache.store.layout import CRC_BYTES, ArraySpec
from vcache.store.mend_shard import ShardMender
from vcache.store.object_path import local
from vcache.store.origin import Origin, PartialRow, arrays_of
from vcache.store.parts import PartName
from vcache.store.reader import FeatureStore
from vcache.store.salvage import shard_index, written_rows
from vcache.store.view import view_folder

RECORD_NAME = re.compile(r"(?P<split>.+)-view-(?P<view>\d+)-(?P<shard>\d+)\.json")
_ARRAY_NAMES = re.compile(r'"([A-Za-z0-9_]+(?:/[A-Za-z0-9_]+)*)":\{"chunk"')
_CHECKSUM = re.compile(r'"crc32c":(\d+),"failures":')
_FAILURES = re.compile(r'"failures":(\[.*\]),"first_row":', re.DOTALL)
_PARTIAL = re.compile(r'"partial":(\[.*\]),"shard":', re.DOTALL)
_NO_PARTIAL = re.compile(r'"num_rows":\d+,"shard":')


@dataclass
class RecordMender:
    """One damaged or contradictory commit record."""

    store: FeatureStore
    path: Path
    others: dict[Path, CommitRecord]
    """The sound records of the store."""
    origin: Origin
    may_drop: bool = True
    """False while other metadata is damaged that may say what the record was of."""
    given_up: bool = False
    """Whether the record was dropped, so that its shard has to be extracted again."""
    mender: ShardMender | None = None
    """What was written anew of the shard's files."""

    def __post_init__(self) -> None:
        match = RECORD_NAME.fullmatch(self.path.name)
        assert match is not None
        self.split, self.view, self.shard = PartName(match["split"]), int(match["view"]), int(match["shard"])
        self.rows = self.store.shard_rows(self.split, self.shard)  # SplitNotFound, IndexError: not of this store
        self._num_written = 0
        self.text = self.path.read_bytes().decode(errors="replace") if self.path.is_file() else ""

    def mend(self) -> str:
        """Put a sound record in its place, or drop it; says which.

        Raises:
            CannotRecompute: the files cannot be told from those of another store, or a video of a bad row cannot be read.
        """
        names = self._names()
        if names is None:
            return self._give_up("nothing says which arrays it was of")
        if not (left := names - self._claimed()):
            self._drop()
            return "is dropped: other records hold all of its arrays"
        specs = self.store.view(self.split, self.view).specs
        if unknown := left - specs.keys():
            return self._give_up(f"{', '.join(sorted(unknown))} is not declared")
        if (partial := self._partial()) is None:
            return self._give_up("nothing says which of its rows are of damaged videos")
        record = self._mend([specs[name] for name in sorted(left)], partial)
        return f"is rebuilt from its {len(record.files)} shard files, {self._num_written} of them written anew"

    def _names(self) -> frozenset[str] | None:
        """The arrays of the record: the one set among the likely ones that has the digest in the record's path."""
        for names in self._likely_names():
            if pass_name(names) == self.path.parent.name:
                return frozenset(names)
        return None

    def _likely_names(self) -> Iterator[Collection[str]]:
        yield set(_ARRAY_NAMES.findall(self.text))
        yield from (record.arrays for path, record in self.others.items() if path.parent == self.path.parent)
        folder = view_folder(self.store.path, self.split, self.view)
        specs = self.store.view(self.split, self.view).specs
        there = {name for name, spec in specs.items() if (folder / spec.shard_path(self.shard)).exists()}
        yield there
        yield there - self._claimed()
        yield specs.keys()

    def _claimed(self) -> frozenset[str]:
        place = self.split, self.view, self.shard
        records = (record for record in self.others.values() if (record.split, record.view, record.shard) == place)
        return frozenset[str]().union(*(record.arrays for record in records))

    def _give_up(self, why: str) -> str:
        if not self.may_drop:
            raise CannotRecompute(f"commit record {self.path} is damaged, and {why} until the other damage is mended")
        self._drop()
        self.given_up = True
        return f"is dropped, as {why}: the shard counts as not extracted, and `vcache extract` redoes it"

    def _drop(self) -> None:
        self.path.unlink()
        sync_folder(self.path.parent)

    def _mend(self, specs: list[ArraySpec], partial: tuple[RowFailure, ...]) -> CommitRecord:
        record = self._guess(specs)
        record = replace(record, partial=tuple(row for row in partial if row.row in record.stored_rows))
        mender = self.mender = ShardMender(self.store, record, self.path, self.origin)
        mender.look(record.arrays)
        # What the files' own checksums say stands in for what was committed.
        files = tuple(
            replace(file, chunks_crc32c=mender.salvaged[file.spec.name].chunks_crc32c) for file in record.files
        )
        mender.record = record = replace(record, files=files)
        bad = {name: set(found.bad) for name, found in mender.salvaged.items()}
        if not self._is_what_was_committed(record):
            for name in self._strangers(mender, bad):
                bad[name] = set(mender.rows)
            self._name_failures(mender)
            self._name_damage(mender)
        bad = {name: rows for name, rows in bad.items() if rows or not mender.salvaged[name].framed}
        self._num_written = len(bad)
        return mender.mend(bad, drop_record=True)

    def _guess(self, specs: list[ArraySpec]) -> CommitRecord:
        """The record as the files have it; why rows failed is taken from the damaged record if it still says so."""
        rows_per_shard = self.store.manifest.rows_per_shard
        folder = local(view_folder(self.store.path, self.split, self.view))
        written = [
            rows
            for spec in specs
            if (rows := written_rows(folder / spec.shard_path(self.shard), spec, self.rows, rows_per_shard)) is not None
        ]
        rows = max(written, key=written.count) if written else tuple(self.rows)
        local_rows = [row - self.rows.start for row in rows]
        return CommitRecord(
            split=self.split,
            view=self.view,
            shard=self.shard,
            first_row=self.rows.start,
            num_rows=len(self.rows),
            files=tuple(_empty_file(spec, local_rows, rows_per_shard) for spec in specs),
            failures=self._failures(rows),
        )

    def _failures(self, written: Collection[int]) -> tuple[RowFailure, ...]:
        rows, table = [row for row in self.rows if row not in written], self.store.part_videos(self.split)
        failures = self._entries(_FAILURES) or ()
        if [failure.row for failure in failures] == rows:
            return failures
        return tuple(RowFailure(row, table.ids[row], table.paths[row], "", "") for row in rows)

    def _partial(self) -> tuple[RowFailure, ...] | None:
        """The rows that the damaged record still calls partial; None if it had some, or may have had, and does not say which."""
        if _NO_PARTIAL.search(self.text):
            return ()
        if (entries := self._entries(_PARTIAL)) is not None:
            return entries
        known = '"partial":' in self.text or any(record.partial for record in self.others.values())
        return None if known else ()

    def _entries(self, pattern: re.Pattern[str]) -> tuple[RowFailure, ...] | None:
        """A list of rows in the damaged record; None unless it can be read and names the videos that these rows are of."""
        table = self.store.part_videos(self.split)
        try:
            (text,) = pattern.findall(self.text)
            entries = tuple(RowFailure(**entry) for entry in json.loads(text))
            rows = [entry.row for entry in entries]
            told = [(entry.video_id, entry.path) for entry in entries]
            known = set(rows) <= set(self.rows) and rows == sorted(set(rows))
            return entries if known and told == [(table.ids[row], table.paths[row]) for row in rows] else None
        except (ValueError, TypeError):
            return None

    def _is_what_was_committed(self, record: CommitRecord) -> bool:
        there = _CHECKSUM.findall(self.text)
        return bool(there) and there == _CHECKSUM.findall(record.encode().decode())

    def _strangers(self, mender: ShardMender, bad: dict[str, set[int]]) -> list[str]:
        """The arrays that differ from what their videos give, by one row that is sound in all of them."""
        sound = [row for row in mender.rows if not any(row in rows for rows in bad.values())]
        specs = tuple(file.spec for file in mender.record.files)
        if not sound and mender.rows:
            return [spec.name for spec in specs]
        reason = ""
        for row in sound:
            ((_, result),) = self.origin.recompute(self.split, self.view, [row], specs)
            if isinstance(result, RowFailure):
                reason = f"{result.path}: {result.reason}"
                continue
            made = arrays_of(result)
            stored = {spec.name: mender.salvaged[spec.name].read(row) for spec in specs}
            return [s.name for s in specs if not compare(stored[s.name], made[s.name], s.dtype).agrees]
        if not mender.rows:
            return []
        raise CannotRecompute(
            f"commit record {self.path} is damaged beyond reading, and none of the shard's videos is there to compare its "
            f"files with ({reason}). Put the videos back, or name their folder with --root"
        )

    def _name_failures(self, mender: ShardMender) -> None:
        """Why rows failed, by reading their videos again: the text of the damaged record may be what is damaged."""
        specs, failures = tuple(file.spec for file in mender.record.files), mender.record.failures
        rows = [failure.row for failure in failures]
        found = dict(self.origin.recompute(self.split, self.view, rows, specs)) if rows else {}
        named = [result if isinstance(result := found[f.row], RowFailure) else f for f in failures]
        if unnamed := [failure.row for failure in named if not failure.kind]:
            raise CannotRecompute(
                f"commit record {self.path} is damaged, and its files lack row {unnamed[0]}, whose video can be read: they "
                f"are not whole. Delete {self.path} and run `vcache extract` again: it redoes that shard only"
            )
        mender.record = replace(mender.record, failures=tuple(named))

    def _name_damage(self, mender: ShardMender) -> None:
        """What is wrong with the videos of partial rows, likewise; a video that was replaced cannot tell any more."""
        specs, partial = tuple(file.spec for file in mender.record.files), mender.record.partial
        rows = [entry.row for entry in partial]
        found = dict(self.origin.recompute(self.split, self.view, rows, specs)) if rows else {}
        damages = {row: result.damage if isinstance(result, PartialRow) else result for row, result in found.items()}
        named = [damage if isinstance(damage := damages[entry.row], RowFailure) else entry for entry in partial]
        mender.record = replace(mender.record, partial=tuple(named))


def _empty_file(spec: ArraySpec, local_rows: list[int], rows_per_shard: int) -> StoredFile:
    """A shard file of these rows whose chunks are not looked at yet."""
    index = shard_index(spec, local_rows, rows_per_shard)
    data = len(local_rows) * spec.chunks_per_row * (spec.chunk_bytes + CRC_BYTES)
    return StoredFile(spec, data + CRC_BYTES + len(index), int.from_bytes(index[-CRC_BYTES:], "little"), 0)
