"""Mend what `verify_store` finds, and nothing else.

repair = repair_store(store, origin)
for finding, reason in repair.left.values():
    print(reason)

`repair.left` has a line for each file that is still damaged.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vcache.store.commits import COMMITS, CommitRecord, read_commit
from vcache.store.errors import CorruptStore, StoreError
from vcache.store.files import remove_stale_temporaries
from vcache.store.findings import Finding, Verification
from vcache.store.mend_metadata import mend_constant, mend_manifest, mend_metadata, mend_table
from vcache.store.mend_record import RECORD_NAME, RecordMender
from vcache.store.mend_shard import ShardMender
from vcache.store.object_path import local
from vcache.store.origin import Origin
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import sole_writer

Report = Callable[[str, int, int], None]
"""report(what is being done, steps done, steps in all)."""

_SHARD_FILE_KINDS = ("missing", "unreadable", "size", "index", "chunk", "exchanged", "not_finite")
# One kind of damage may hide another: the files of a damaged record are looked at once it is mended.
_MAX_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Mended:
    """One thing that was mended."""

    kind: str
    """Of the finding, or of the note if it was a leftover."""
    path: Path
    message: str


@dataclass
class Repair:
    """What a repair did."""

    mended: list[Mended] = field(default_factory=list)
    left: dict[Path, tuple[Finding, str]] = field(default_factory=dict)
    """What is still damaged, and why it was not mended."""
    recomputed_rows: int = 0
    """Videos that were decoded and computed again, one for each pass they are in."""
    copied_rows: int = 0
    """Rows of single arrays that were copied from damaged files, every checksum verified."""
    verification: Verification | None = None
    """The first one: what was wrong."""

    @property
    def ok(self) -> bool:
        return not self.left


def repair_store(
    store: FeatureStore,
    origin: Origin,
    *,
    dry_run: bool = False,
    report: Report = lambda what, done, total: None,
) -> Repair:
    """Verify the store, mend it, and verify what was mended.

    Raises:
        StoreBusy: an extraction is running.
    """
    (store.path / COMMITS).mkdir(exist_ok=True)
    with contextlib.nullcontext() if dry_run else sole_writer(store.path):
        job = _Job(store, origin, report)
        found = job.result.verification = verify_store(
            store, on_progress=lambda done, total: report("verify", done, total)
        )
        if dry_run:
            job.plan(found)
            return job.result
        # Not those that a round leaves: a record that had to be given up leaves files that are sound.
        job.remove_leftovers(found)
        for _ in range(_MAX_ROUNDS):
            if not job.mend(found):
                break
            found = verify_store(store, only=job.touched)
        for finding in found.findings:
            job.leave(finding, "is still damaged")
        return job.result


@dataclass
class _Job:
    store: FeatureStore
    origin: Origin
    report: Report
    result: Repair = field(default_factory=Repair)
    touched: set[Path] = field(default_factory=set)
    """Shard files to be verified again."""
    contradicted: set[Path] = field(default_factory=set)
    """Records that are damaged, or sound and not true in this store."""
    records: dict[Path, CommitRecord] | None = None

    def mend(self, found: Verification) -> bool:
        """One round; returns whether anything changed."""
        todo = [finding for finding in found.findings if local(finding.path) not in self.result.left]
        self.contradicted = {local(finding.path) for finding in found.findings if finding.kind == "record"}
        before = len(self.result.mended)
        for kinds in (("manifest",), ("table",), ("constant",), ("metadata",), ("record",), _SHARD_FILE_KINDS):
            self._mend_kinds([finding for finding in todo if finding.kind in kinds])
            if len(self.result.mended) > before:
                self._refresh()
        return len(self.result.mended) > before

    def leave(self, finding: Finding, reason: str) -> None:
        self.result.left.setdefault(local(finding.path), (finding, reason))

    def plan(self, found: Verification) -> None:
        """What there is to do: everything is left, and the rows that would be computed again are counted."""
        for finding in found.findings:
            self.leave(finding, finding.message)
        for group in self._groups([finding for finding in found.findings if finding.kind in _SHARD_FILE_KINDS]):
            if path := self._record_of(group[0]):
                mender = ShardMender(self.store, read_commit(path), path, self.origin)
                bad = mender.look({finding.array for finding in group if finding.array})
                self.result.recomputed_rows += len(frozenset[int]().union(*bad.values()))

    def _groups(self, findings: list[Finding]) -> list[list[Finding]]:
        """The damaged files of one record are mended together, so that each video is decoded once."""
        groups: dict[Path, list[Finding]] = {}
        for finding in findings:
            owner = self._record_of(finding) if finding.kind in _SHARD_FILE_KINDS else None
            groups.setdefault(owner or local(finding.path), []).append(finding)
        return list(groups.values())

    def _mend_kinds(self, findings: list[Finding]) -> None:
        groups = self._groups(findings)
        for step, group in enumerate(groups):
            self.report("mend", step, len(groups))
            try:
                self._mend_group(group)
            except (StoreError, OSError, LookupError) as error:
                for finding in group:
                    self.leave(finding, str(error))
            self.report("mend", step + 1, len(groups))

    def _mend_group(self, group: list[Finding]) -> None:
        first = group[0]
        if first.kind in _SHARD_FILE_KINDS:
            self._mend_files(group)
            return
        if first.kind == "manifest":
            done = mend_manifest(self.store, first)
        elif first.kind == "table":
            done = mend_table(self.store, first, self.origin)
        elif first.kind == "constant":
            done = mend_constant(self.store, first, self.origin)
        elif first.kind == "metadata":
            done = mend_metadata(self.store, self._records().values(), first)
        else:
            done = self._mend_record(first)
        self._mended(first, done)

    def _mend_record(self, finding: Finding) -> str:
        others = {path: record for path, record in self._records().items() if path not in self.contradicted}
        may_drop = not any(left.kind in ("manifest", "table", "metadata") for left, _ in self.result.left.values())
        path = local(finding.path)
        mender = RecordMender(self.store, path, others, self.origin, may_drop)
        done = mender.mend()
        self.contradicted.discard(path)
        self.records = None
        if mender.given_up:
            self.leave(finding, f"{path} {done}")
        if mender.mender is not None:
            self._count(mender.mender)
            self.touched |= {mender.mender.path_of(file.spec) for file in mender.mender.record.files}
        return done

    def _mend_files(self, group: list[Finding]) -> None:
        path = self._record_of(group[0])
        if path is None:
            raise CorruptStore(f"{group[0].path} belongs to no sound commit record")
        mender = ShardMender(self.store, read_commit(path), path, self.origin)
        bad = mender.look({finding.array for finding in group if finding.array})
        record = mender.mend(bad)
        self.records = None
        self._count(mender)
        for finding in group:
            self.touched.add(local(finding.path))
            rows = len(bad[finding.array or ""])
            same = "equal to the committed one" if record == mender.record else "with a new commit record"
            self._mended(finding, f"is written anew, {rows} of its {len(mender.rows)} rows computed again, {same}")

    def _count(self, mender: ShardMender) -> None:
        self.result.recomputed_rows += len(mender.recomputed_rows)
        self.result.copied_rows += mender.copied_rows

    def remove_leftovers(self, found: Verification) -> None:
        """Only of what nobody writes: this process holds the store, and a temporary of a living writer is locked."""
        for note in found.notes:
            path = local(note.path)
            with contextlib.suppress(FileNotFoundError):
                if note.kind == "temporary" and remove_stale_temporaries(iter([path])):
                    self._mended(note, "is removed: a killed writer left it")
                elif note.kind == "orphan":
                    path.unlink()
                    _remove_empty(path.parent, local(self.store.path))
                    self._mended(note, "is removed: no commit record names it, and an extraction writes it again")

    def _mended(self, finding: Finding, what: str) -> None:
        self.result.mended.append(Mended(kind=finding.kind, path=local(finding.path), message=f"{finding.path} {what}"))

    def _refresh(self) -> None:
        # A damaged manifest is left; what is open keeps the sound one.
        with contextlib.suppress(StoreError):
            self.store.refresh()

    def _record_of(self, finding: Finding) -> Path | None:
        """The record that names the damaged shard file."""
        for path, record in self._records().items():
            place = record.split, record.view, record.shard
            if place == (finding.split, finding.view, finding.shard) and finding.array in record.arrays:
                return path
        return None

    def _records(self) -> dict[Path, CommitRecord]:
        if self.records is None:
            self.records = dict(_sound_records(local(self.store.path)))
        return self.records


def _sound_records(store: Path) -> Iterator[tuple[Path, CommitRecord]]:
    for path in sorted((store / COMMITS).glob("*/*.json")):
        if RECORD_NAME.fullmatch(path.name):
            with contextlib.suppress(OSError):
                yield path, read_commit(path)


def _remove_empty(folder: Path, top: Path) -> None:
    while folder.name != "c" and folder != top and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
