"""Failures as JSON lines, for a program that looks after the videos: one object for each failed or partial video of a view.

    split, row       where it is in the store; row of the split
    video_id, path   as the dataset lists it
    kind, reason     what is wrong, in a word (extract/video.py KINDS) and in a line
    stored           false: there are no features; true: they are there, of a damaged video (--allow-partial)
    view, arrays     what lacks it, or holds it in part; one video may fail in one pass and not in another
    size_bytes       of the file now, null if there is none, or a folder
    mtime            when the file was last changed, as "2026-01-02T03:04:05+00:00"; null if there is none
    decoder          the decoder and its versions, as in the store's key

`vcache extract` writes it at the end of a run, so that it says what the store holds and not what one run met.
"""

import datetime
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from vcache.pipelines.request import ExtractionError
from vcache.store.commits import RowFailure
from vcache.store.files import make_folders, sync_folder, write_durably
from vcache.store.object_path import ObjectPath, StorePath, local
from vcache.store.reader import FeatureStore


def failures_file(store: StorePath) -> Path | None:
    """Where the failures of a store go if nobody says: beside it; None for a store in a bucket."""
    if isinstance(store, ObjectPath):
        return None
    return local(store).with_name(f"{store.name}.failures.jsonl")


def check_failures_file(file: Path) -> None:
    """Make the folder of a file of the caller's choice: before hours of work, and not after them.

    Raises:
        ExtractionError: the file is a folder, or there can be none.
    """
    if file.is_dir():
        raise ExtractionError(f"--failures {file}: this is a folder. Name a file, as {file / 'failures.jsonl'}.")
    try:
        make_folders(file.parent)
    except OSError as error:
        raise ExtractionError(f"--failures {file}: no file can be made there ({error}). Name another.") from error


def write_failures(store: FeatureStore, root: Path, file: Path | None = None) -> Path | None:
    """Write what failed in any split of the store, in place of what the file held; returns it, or None if there is none.

    Where nothing failed, the file beside the store is removed, and a `file` of the caller's choice is empty.

    Args:
        root: the folder that the videos lie in.
        file: None for the one beside the store.
    """
    lines = [json.dumps(entry) + "\n" for entry in failure_entries(store, root)]
    path = file or failures_file(store.path)
    if path is None:
        return None
    if lines or file is not None:
        make_folders(path.parent)
        write_durably(path, "".join(lines).encode())
        return path
    if path.exists():
        path.unlink()
        sync_folder(path.parent)
    return None


def failure_entries(store: FeatureStore, root: Path) -> Iterator[dict[str, Any]]:
    """The objects, ordered by split, row and view."""
    decoder = store.manifest.spec.get("decoder", {})
    for split in store.splits:
        arrays: dict[tuple[RowFailure, int, bool], set[str]] = {}
        for failure, view, stored, names in _recorded(store, split):
            arrays.setdefault((failure, view, stored), set()).update(names)
        for failure, view, stored in sorted(arrays, key=lambda key: (key[0].row, key[1], key[2])):
            yield {
                "split": split,
                "row": failure.row,
                "video_id": failure.video_id,
                "path": failure.path,
                "kind": failure.kind,
                "reason": failure.reason,
                "stored": stored,
                "view": view,
                "arrays": sorted(arrays[failure, view, stored]),
                **_file_facts(root / failure.path),
                "decoder": decoder,
            }


def _recorded(store: FeatureStore, split: str) -> Iterator[tuple[RowFailure, int, bool, frozenset[str]]]:
    """Each entry of a commit record, with its row of the split: view, whether the row is stored, arrays."""
    first_row = 0
    for part in store.parts(split):
        for view in store.part_views(part):
            for records in store.view(part, view).records.values():
                for record in records:
                    for entries, stored in ((record.failures, False), (record.partial, True)):
                        for entry in entries:
                            yield replace(entry, row=first_row + entry.row), view, stored, record.arrays
        first_row += store.manifest.splits[part]


def _file_facts(path: Path) -> dict[str, Any]:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # none, or a name that no file can have
        return {"size_bytes": None, "mtime": None}
    changed = datetime.datetime.fromtimestamp(stat.st_mtime, datetime.UTC)
    size_bytes = None if S_ISDIR(stat.st_mode) else stat.st_size  # a folder of frames
    return {"size_bytes": size_bytes, "mtime": changed.isoformat(timespec="seconds")}
