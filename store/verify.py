"""Read every committed byte of a store and say what is wrong with it: all of it, not only the first thing.

with FeatureStore.open("k400.zarr") as store:
    verification = verify_store(store)
for finding in verification.findings:
    print(finding.message)
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vcache.store.commits import COMMITS, CommitRecord, read_commit
from vcache.store.constants import CONSTANTS, read_constant
from vcache.store.errors import StoreError, StoreUnavailable
from vcache.store.files import is_temporary
from vcache.store.findings import Finding, Verification, mend_command
from vcache.store.layout import METADATA, ArraySpec, array_metadata, group_metadata, without_remarks
from vcache.store.locks import WRITER_LOCK
from vcache.store.manifest import TABLE_ARRAYS, Manifest, VideoTable, read_manifest
from vcache.store.object_path import ObjectPath, StorePath, local
from vcache.store.parts import PartName, group_parts
from vcache.store.reader import FeatureStore
from vcache.store.tables import join_tables, read_table, table_files, write_table
from vcache.store.verify_files import ShardFile, check_files
from vcache.store.view import read_spec, view_folder

_RECORD_NAME = re.compile(r"(?P<split>.+)-view-(?P<view>\d+)-(?P<shard>\d+)\.json")
_SHARD_FILE = re.compile(r"(?P<split>[^/]+)/view-(?P<view>\d+)/(?P<array>.+?)/c/(?P<shard>\d+)(/0)*")


@dataclass
class _Scan:
    """What is known of the store while it is verified."""

    store: StorePath
    manifest: Manifest
    findings: list[Finding] = field(default_factory=list)
    tables: dict[str, VideoTable] = field(default_factory=dict)
    records: dict[StorePath, CommitRecord] = field(default_factory=dict)
    damaged_shards: set[tuple[str, int, int]] = field(default_factory=set)
    checked_metadata: set[StorePath] = field(default_factory=set)
    table_files: set[StorePath] = field(default_factory=set)


def verify_store(
    store: FeatureStore,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    only: Collection[Path] | None = None,
) -> Verification:
    """Check all that is on disk now, also what was committed after `store` was opened.

    Args:
        on_progress: called in this thread after each shard file with (bytes done, bytes in all).
        only: of the shard files, read these alone; everything else is checked all the same.

    Returns:
        All damage, in the order manifest, tables, constants, records, metadata, shard files; shards that are not extracted yet
        are no damage.
    """
    scan = _Scan(store.path, store.manifest)
    _check_manifest(scan)
    for split in scan.manifest.splits:
        _check_table(scan, split)
    _check_parts(scan)
    _check_constants(scan)
    _read_records(scan)
    _check_metadata(scan)
    jobs = [job for job in _shard_files(scan) if only is None or job.path in only]
    scan.findings += check_files(jobs, on_progress)
    shards = {(record.split, record.view, record.shard): record.num_rows for record in scan.records.values()}
    failed = {(r.split, r.view, failure.row) for r in scan.records.values() for failure in r.failures}
    partial = {(r.split, r.view, row.row) for r in scan.records.values() for row in r.partial}
    return Verification(
        findings=tuple(scan.findings),
        notes=tuple(_notes(scan)),
        num_shards=len(shards),
        num_files=len(jobs),
        num_bytes=sum(job.stored.size_bytes for job in jobs),
        num_rows=sum(shards.values()),
        num_failures=len(failed),
        num_partial=len(partial),
    )


def _check_manifest(scan: _Scan) -> None:
    path = scan.store / METADATA
    try:
        scan.manifest = read_manifest(scan.store)
    # A number too large for a float has no checksum, which is a ValueError.
    except (StoreError, OSError, ValueError) as error:
        scan.findings.append(Finding(kind="manifest", message=_damage(error), path=path))
        return
    if what := _group_damage(path):
        message = f"{path} {what}. {mend_command(scan.store)}"
        scan.findings.append(Finding(kind="manifest", message=message, path=path))


def _damage(error: Exception) -> str:
    """What to report; that a store cannot be reached is no damage, and ends the verification."""
    if isinstance(error, StoreUnavailable):
        raise error
    return str(error)


def _check_table(scan: _Scan, split: PartName) -> None:
    folder, num_rows = scan.store / split, scan.manifest.splits[split]
    try:
        scan.table_files |= table_files(folder)
        scan.tables[split] = table = read_table(folder, num_rows)
    except (StoreError, OSError, ValueError) as error:
        scan.findings.append(Finding(kind="table", message=_damage(error), path=folder, split=split))
        return
    with tempfile.TemporaryDirectory() as reference:
        write_table(Path(reference), table)
        for name in (*TABLE_ARRAYS, *table.columns):
            if not same_array_metadata(folder / name, Path(reference, name)):
                path = folder / name / METADATA
                message = f"{path} does not describe a video table of {num_rows} rows. {mend_command(scan.store)}"
                scan.findings.append(Finding(kind="table", message=message, path=path, split=split, array=name))


def _check_parts(scan: _Scan) -> None:
    """No video may be in two parts of a split."""
    for split, parts in group_parts(scan.manifest.splits).items():
        tables = [scan.tables[part] for part in parts.names if part in scan.tables]
        try:
            if len(tables) > 1:
                join_tables(scan.store, split, tables)
        except StoreError as error:
            path = scan.store / parts.names[-1]
            scan.findings.append(Finding(kind="table", message=str(error), path=path, split=parts.names[-1]))


def _check_constants(scan: _Scan) -> None:
    for name, expected in scan.manifest.constants.items():
        folder = scan.store / CONSTANTS / name
        try:
            read_constant(scan.store, name, expected)
        except (StoreError, OSError) as error:
            scan.findings.append(Finding(kind="constant", message=_damage(error), path=folder, array=name))


def same_array_metadata(folder: StorePath, reference: Path) -> bool:
    """Whether two arrays are described alike, but for remarks and for a field that versions of Zarr may leave out."""
    defaults: dict[str, Any] = {"storage_transformers": []}
    one, other = (_read_json(path / METADATA) for path in (folder, reference))
    return isinstance(one, dict) and defaults | without_remarks(one) == defaults | without_remarks(other)


def _read_records(scan: _Scan) -> None:
    owners: dict[tuple[str, int, int, str], StorePath] = {}
    for path in sorted((scan.store / COMMITS).glob("*/*.json")):
        if (match := _RECORD_NAME.fullmatch(path.name)) is None or is_temporary(path.name):
            continue
        place = match["split"], int(match["view"]), int(match["shard"])
        try:
            record = read_commit(path)
            what = _contradiction(scan, record)
        except OSError as error:  # CorruptStore is one, too
            record, what = None, str(error)
        for name in sorted(record.arrays) if record and not what else ():
            first = owners.setdefault((*place, name), path)
            what = what or (f"names {name}, as does {first}" if first != path else None)
        if record and not what:
            scan.records[path] = record
            continue
        scan.damaged_shards.add(place)
        message = what if record is None else f"commit record {path} {what}. {mend_command(scan.store, path)}"
        split, view, shard = place
        scan.findings.append(
            Finding(kind="record", message=str(message), path=path, split=split, view=view, shard=shard)
        )


def _contradiction(scan: _Scan, record: CommitRecord) -> str | None:
    """What of a sound record cannot be true in this store."""
    num_rows, rows_per_shard = scan.manifest.splits.get(record.split), scan.manifest.rows_per_shard
    if num_rows is None:
        return f"is of split {record.split!r}, which the manifest does not name"
    first = record.shard * rows_per_shard
    rows = range(first, min(first + rows_per_shard, num_rows))
    if not rows or (record.first_row, record.num_rows) != (first, len(rows)):
        return f"has {record.num_rows} rows from {record.first_row}, but the manifest puts {rows} in its shard"
    failed = [failure.row for failure in record.failures]
    if failed != sorted(set(failed)) or not set(failed) <= set(rows):
        return f"says that rows {failed} failed, but its shard has {rows}"
    partial = [row.row for row in record.partial]
    if partial != sorted(set(partial)) or not set(partial) <= set(rows) - set(failed):
        return f"says that rows {partial} are partial, but its shard holds {[row for row in rows if row not in failed]}"
    table = scan.tables.get(record.split)
    for failure in (*record.failures, *record.partial) if table else ():
        if table and (failure.video_id, failure.path) != (table.ids[failure.row], table.paths[failure.row]):
            return f"calls row {failure.row} {failure.video_id!r}, but the video table {table.ids[failure.row]!r}"
    for file in record.files:
        size = file.spec.shard_bytes(len(rows) - len(failed), rows_per_shard)
        if file.size_bytes != size:
            return f"says that {file.spec.name} has {file.size_bytes} bytes, but its rows take {size}"
    return None


def _check_metadata(scan: _Scan) -> None:
    """The zarr.json of every committed array and of every group, then of whatever else is declared."""
    arrays: dict[tuple[PartName, int, str], dict[StorePath, ArraySpec]] = {}
    for path, record in scan.records.items():
        for file in record.files:
            arrays.setdefault((record.split, record.view, file.spec.name), {})[path] = file.spec
    groups = {scan.store / COMMITS} | {scan.store / split for split in scan.manifest.splits}
    for (split, view, name), specs in sorted(arrays.items()):
        _check_array(scan, split, view, name, specs)
        folder = view_folder(scan.store, split, view)
        groups |= {folder, *(folder / parent for parent in Path(name).parents)}
    for name in scan.manifest.constants:
        groups |= {scan.store / CONSTANTS / parent for parent in Path(name).parents}
    for group in sorted(groups):
        _check_group(scan, group / METADATA)
    for split in scan.manifest.splits:
        for folder in sorted((scan.store / split).glob("view-*/")):
            for path in sorted(
                {*folder.glob(METADATA), *folder.glob(f"*/{METADATA}"), *folder.glob(f"*/*/{METADATA}")}
            ):
                if path not in scan.checked_metadata:
                    _check_declared(scan, split, folder, path)


def _check_array(scan: _Scan, split: PartName, view: int, name: str, specs: dict[StorePath, ArraySpec]) -> None:
    path = view_folder(scan.store, split, view) / name / METADATA
    scan.checked_metadata.add(path)
    document = _read_json(path)
    document = without_remarks(document) if isinstance(document, dict) else None
    size = scan.manifest.splits[split], scan.manifest.rows_per_shard
    others = [record for record, spec in specs.items() if document != array_metadata(spec, *size)]
    if len(others) == len(specs):
        message = (
            f"{path} is missing, damaged, or describes another array than the committed {next(iter(specs.values()))}. "
            f"{mend_command(scan.store)}"
        )
        scan.findings.append(Finding(kind="metadata", message=message, path=path, split=split, view=view, array=name))
        return
    for record_path in others:
        shard = scan.records[record_path].shard
        mend = mend_command(scan.store, record_path)
        message = f"commit record {record_path} is of another {name} than {path} describes. {mend}"
        scan.findings.append(
            Finding(kind="record", message=message, path=record_path, split=split, view=view, shard=shard, array=name)
        )


def _check_group(scan: _Scan, path: StorePath) -> None:
    scan.checked_metadata.add(path)
    if what := _group_damage(path):
        message = f"{path} {what}. {mend_command(scan.store)}"
        scan.findings.append(Finding(kind="metadata", message=message, path=path))


def _check_declared(scan: _Scan, split: PartName, folder: StorePath, path: StorePath) -> None:
    """The zarr.json of a group, or of an array that no shard of is committed."""
    scan.checked_metadata.add(path)
    name = path.parent.relative_to(folder).as_posix()
    try:
        spec = read_spec(folder, name, scan.manifest.splits[split], scan.manifest.rows_per_shard)
    except (StoreError, OSError) as error:
        scan.findings.append(Finding(kind="metadata", message=_damage(error), path=path, split=split, array=name))
        return
    if spec is None:
        _check_group(scan, path)


def _group_damage(path: StorePath) -> str | None:
    document = _read_json(path)
    if not isinstance(document, dict):
        return "is missing or damaged"
    # Zarr libraries may add "consolidated_metadata" to a group.
    known = {**group_metadata(), "attributes": document.get("attributes")}
    there = {name: value for name, value in document.items() if name != "consolidated_metadata"}
    return None if there == known and isinstance(there["attributes"], dict) else "does not describe a Zarr group"


def _read_json(path: StorePath) -> Any:
    """None for a file that is missing or holds no JSON: the caller reports both."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _shard_files(scan: _Scan) -> list[ShardFile]:
    return [
        ShardFile(
            record,
            stored,
            path,
            view_folder(scan.store, record.split, record.view) / stored.spec.shard_path(record.shard),
            scan.manifest.rows_per_shard,
            scan.tables.get(record.split),
        )
        for path, record in scan.records.items()
        for stored in record.files
    ]


def _notes(scan: _Scan) -> Iterator[Finding]:
    """Files that nothing names."""
    known = (
        {job.path for job in _shard_files(scan)} | set(scan.records) | scan.checked_metadata | {scan.store / METADATA}
    )
    known.add(scan.store / WRITER_LOCK)
    known |= {finding.path for finding in scan.findings}
    known |= scan.table_files
    for name in scan.manifest.constants:
        known |= {path for path in (scan.store / CONSTANTS / name).rglob("*") if not is_temporary(path.name)}
    for path in _all_files(scan.store):
        if is_temporary(path.name):
            yield _temporary(path)
        elif path not in known and not _of_damaged_record(scan, path):
            yield _stray(scan, path)


def _all_files(store: StorePath) -> Iterator[StorePath]:
    """The temporary files and folders beside and in the store, and all other files in it."""
    if isinstance(store, ObjectPath):
        yield from store.objects_below()
        return
    yield from (path for path in sorted(store.parent.glob(f".{store.name}.*")) if is_temporary(path.name))
    for top, folders, names in os.walk(local(store)):
        yield from (Path(top, name) for name in sorted(folders) if is_temporary(name))
        folders[:] = sorted(name for name in folders if not is_temporary(name))
        yield from sorted(Path(top, name) for name in names)


def _of_damaged_record(scan: _Scan, path: StorePath) -> bool:
    """Whether the record that names this shard file may be a damaged one."""
    match = _SHARD_FILE.fullmatch(path.relative_to(scan.store).as_posix())
    return match is not None and (match["split"], int(match["view"]), int(match["shard"])) in scan.damaged_shards


def _stray(scan: _Scan, path: StorePath) -> Finding:
    match = _SHARD_FILE.fullmatch(path.relative_to(scan.store).as_posix())
    if match is None:
        return Finding(kind="unknown", message=f"{path} is not part of the store; nothing reads it.", path=path)
    return Finding(
        kind="orphan",
        message=(
            f"{path} has no commit record: a killed extraction left it, its record was deleted, or an extraction is "
            "running. `vcache extract` writes that shard again, and `vcache repair` removes the file."
        ),
        path=path,
        split=match["split"],
        view=int(match["view"]),
        shard=int(match["shard"]),
        array=match["array"],
    )


def _temporary(path: StorePath) -> Finding:
    message = f"{path} is temporary: an extraction is writing it, or was killed. `vcache extract` and `vcache repair` remove it."
    return Finding(kind="temporary", message=message, path=path)
