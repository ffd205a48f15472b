"""Mending what describes a store: the zarr.json of groups and arrays, and the video tables."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from vcache.store.checksum import crc32c
from vcache.store.commits import CommitRecord
from vcache.store.constants import checksum, rewrite_constant
from vcache.store.errors import CannotRecompute, CorruptStore
from vcache.store.files import sync_folder, write_durably
from vcache.store.findings import Finding
from vcache.store.groups import write_manifest
from vcache.store.layout import (
    CRC_BYTES,
    DTYPE_ATTRIBUTE,
    METADATA,
    ArraySpec,
    array_metadata,
    encode_metadata,
    group_metadata,
)
from vcache.store.manifest import ATTRIBUTE, TABLE_ARRAYS, VideoTable
from vcache.store.object_path import local
from vcache.store.origin import Origin
from vcache.store.parts import PartName
from vcache.store.reader import FeatureStore
from vcache.store.tables import read_column, read_table, table_attributes, was_written_here, write_table
from vcache.store.verify import same_array_metadata


def mend_manifest(store: FeatureStore, finding: Finding) -> str:
    """The frame around a manifest whose fields are sound; other attributes are kept."""
    path = local(finding.path)
    attributes = _attributes(path) | {ATTRIBUTE: store.manifest.to_json()}
    write_durably(path, encode_metadata(group_metadata(attributes)))
    return "is written anew around its sound manifest"


def mend_metadata(store: FeatureStore, records: Iterable[CommitRecord], finding: Finding) -> str:
    """The zarr.json of a group, or of an array: as its commit records describe it, or else those of another split."""
    path, records = local(finding.path), list(records)
    split, _, name = path.parent.relative_to(local(store.path)).as_posix().partition("/")
    view, _, name = name.partition("/")
    specs = _committed_specs(records, split, view, name) or _committed_specs(records, None, None, name)
    if name and specs:
        metadata = array_metadata(specs[0], store.manifest.splits[PartName(split)], store.manifest.rows_per_shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, encode_metadata(metadata | {"attributes": _attributes(path) | metadata["attributes"]}))
        return "is written anew from the commit records"
    if not name or _has_arrays(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, _group_file(store, path, split if not view else ""))
        return "is written anew"
    path.unlink()
    sync_folder(path.parent)
    return "is removed: nothing of that array was committed, and the next extraction declares it again"


def mend_table(store: FeatureStore, finding: Finding, origin: Origin) -> str:
    """The files of a video table that differ from those the dataset's list gives.

    Raises:
        CannotRecompute: the list cannot be read, or nothing shows that it is still the one the store was made with.
    """
    assert finding.split is not None
    part = PartName(finding.split)
    folder, num_rows = local(store.path / part), store.manifest.splits[part]
    table = _table(folder, num_rows, origin.list_videos(part))
    if not was_written_here(folder, table):
        raise CannotRecompute(
            f"the dataset's list differs from the one that {folder} was written from. Restore it from a copy"
        )
    with tempfile.TemporaryDirectory() as temporary:
        rebuilt = Path(temporary)
        write_table(rebuilt, table)
        _check_same_list(folder, rebuilt, num_rows, len(table))
        changed = []
        for path in sorted(path for path in rebuilt.glob("*/**/*") if path.is_file()):
            there = folder / path.relative_to(rebuilt)
            if not _same_file(there, path):
                there.parent.mkdir(parents=True, exist_ok=True)
                write_durably(there, path.read_bytes())
                changed.append(there.relative_to(folder).as_posix())
    if _mend_table_attributes(folder, table):
        changed.append(METADATA)
    if not changed:
        raise CannotRecompute(finding.message)
    return f"is mended from the dataset's list of videos ({', '.join(changed)})"


def _mend_table_attributes(folder: Path, table: VideoTable) -> bool:
    """Whether what the group says of its table had to be written anew."""
    there, sound = _attributes(folder / METADATA), table_attributes(table)
    if sound.items() <= there.items():
        return False
    write_durably(folder / METADATA, _group_bytes(there | sound))
    return True


def mend_constant(store: FeatureStore, finding: Finding, origin: Origin) -> str:
    """An array of the whole store, made again.

    Where its last bits are those of a machine (`Constant.exact`), the manifest gets the checksum of the new ones.

    Raises:
        CannotRecompute: it cannot be made, or comes out with other values.
    """
    assert finding.array is not None
    store.refresh()  # the manifest may have got the checksum of the constant before
    constant, manifest = origin.constant(finding.array), store.manifest
    made = checksum(constant.values)
    if made != manifest.constants[finding.array] and not constant.exact:
        rewrite_constant(store.path, finding.array, constant)
        write_manifest(store.path, replace(manifest, constants={**manifest.constants, finding.array: made}))
        return "is made again of what it was made of at first; last bits differ on this machine, and the manifest has them now"
    if made != manifest.constants[finding.array]:
        raise CannotRecompute(
            f"{finding.path} is damaged, and made again it has other values than the manifest names: the rows stored with it "
            "would be read wrongly. Restore the folder from a copy"
        )
    rewrite_constant(store.path, finding.array, constant)
    return "is made again, with the values that the manifest names"


def _committed_specs(
    records: Iterable[CommitRecord], split: str | None, view: str | None, name: str
) -> list[ArraySpec]:
    """How records describe the array, the most frequent description first."""
    specs = Counter(
        file.spec
        for record in records
        for file in record.files
        if file.spec.name == name and (split is None or (record.split, f"view-{record.view}") == (split, view))
    )
    return [spec for spec, _ in specs.most_common()]


def _group_file(store: FeatureStore, path: Path, part: str) -> bytes:
    """The zarr.json of a group; that of a part is zarr-python's, as it comes with the video table and says its checksum."""
    if part not in store.manifest.splits:
        return encode_metadata(group_metadata(_attributes(path)))
    return _group_bytes(
        _attributes(path) | table_attributes(read_table(path.parent, store.manifest.splits[PartName(part)]))
    )


def _group_bytes(attributes: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as temporary:
        zarr.create_group(store=temporary, zarr_format=3, attributes=attributes)
        return Path(temporary, METADATA).read_bytes()


def _has_arrays(folder: Path) -> bool:
    return any(child.is_dir() and child.name != "c" for child in folder.glob("*"))


def _attributes(path: Path) -> dict[str, Any]:
    """What users left in the attributes, if that can still be read."""
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not isinstance(attributes, dict):
        return {}
    return {name: value for name, value in attributes.items() if name != DTYPE_ATTRIBUTE}


def _table(folder: Path, num_rows: int, listed: VideoTable) -> VideoTable:
    """What is left of the table, with the rest from the list: by the ids, which a list that grew still holds."""
    ids, paths, labels = (_sound_column(folder, name, num_rows) for name in TABLE_ARRAYS)
    if ids is None:
        return listed
    known = tuple(str(video_id) for video_id in ids)
    places = {video_id: place for place, video_id in enumerate(listed.ids)}
    if gone := [video_id for video_id in known if video_id not in places]:
        raise CannotRecompute(f"the dataset does not list {gone[0]!r} any more. Restore {folder} from a copy")
    rows = [places[video_id] for video_id in known]
    return VideoTable(
        known,
        tuple(listed.paths[row] for row in rows) if paths is None else tuple(str(path) for path in paths),
        np.ascontiguousarray(listed.labels[rows] if labels is None else labels, dtype=np.int64),
        {name: _column(folder, name, values[rows]) for name, values in listed.columns.items()},
    )


def _column(folder: Path, name: str, listed: np.ndarray) -> np.ndarray:
    """The stored column, or what the list gives for it if it is damaged."""
    stored = _sound_column(folder, name, len(listed))
    like_listed = stored is not None and (stored.dtype, stored.shape) == (listed.dtype, listed.shape)
    return stored if stored is not None and like_listed else listed


def _sound_column(folder: Path, name: str, num_rows: int) -> np.ndarray | None:
    try:
        return read_column(folder, name, num_rows)
    except CorruptStore:
        return None


def _check_same_list(folder: Path, rebuilt: Path, num_rows: int, num_listed: int) -> None:
    """A chunk ends in its checksum, which is still there if the damage is elsewhere: the list must explain what is left."""
    restore = f"Restore the folders video_id, path and label of {folder} from a copy"
    if num_listed != num_rows:
        raise CannotRecompute(f"the dataset now lists {num_listed} videos, not {num_rows}. {restore}")
    known = set()
    for chunk in sorted(path for path in rebuilt.glob("*/c/**/*") if path.is_file()):
        there, data = folder / chunk.relative_to(rebuilt), chunk.read_bytes()
        stored = there.read_bytes() if there.is_file() else b""
        if (
            stored != data
            and stored
            and crc32c(stored[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") == stored[-CRC_BYTES:]
        ):
            raise CannotRecompute(f"the dataset's list differs from the sound {there}. {restore}")
        if stored[-CRC_BYTES:] == data[-CRC_BYTES:]:
            known.add(chunk.relative_to(rebuilt).parts[0])
    if not known & {"video_id", "path"}:
        raise CannotRecompute(
            f"{folder} has lost ids and paths, so nothing shows that the dataset still lists its videos in the same order. "
            f"{restore}"
        )


def _same_file(there: Path, rebuilt: Path) -> bool:
    if rebuilt.name == METADATA:
        return there.is_file() and same_array_metadata(there.parent, rebuilt.parent)
    return there.is_file() and there.read_bytes() == rebuilt.read_bytes()
