"""Failures as JSON lines: one object per failed or partial video of a view, with all that is known of it and of its file."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from growing import X, table

from vcache.pipelines.failures import failure_entries, failures_file, write_failures
from vcache.store.commits import RowFailure
from vcache.store.manifest import Manifest
from vcache.store.object_path import ObjectPath, store_path
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, add_videos, create_store, declare_arrays

Y = replace(X, name="y")
DECODER = {"decoder": "pyav", "av": "18.1.0"}
OLD, NEW = 3, 2


def failure(part: str, row: int, kind: str = "truncated") -> RowFailure:
    name = f"{'b' if '+' in part else 'a'}-{row}"
    return RowFailure(row, name, f"{name}.mp4", kind, f"{name} is {kind}")


def put(
    store: FeatureStore, part: str, arrays: list[Any], view: int, failed: dict[int, str], partial: set[int]
) -> None:
    """All rows of a part of up to 3, zeros where they do not fail."""
    declare_arrays(store, part, arrays, view)  # type: ignore[arg-type]
    with ShardWriter(store, part, 0, arrays, view) as writer:  # type: ignore[arg-type]
        for row in writer.rows:
            values = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in arrays}
            if row in failed:
                writer.fail(failure(part, row, failed[row]))
            else:
                writer.write(row, values, partial=failure(part, row) if row in partial else None)


def created(path: Path) -> FeatureStore:
    manifest = Manifest(
        key="0" * 16,
        spec={"decoder": DECODER},
        dataset="toy",
        class_names=("a", "b"),
        rows_per_shard=3,
        splits={"train": OLD},  # type: ignore[dict-item]
    )
    create_store(path, manifest, {"train": table("a", OLD)})
    return FeatureStore.open(path)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """ "train" in two parts; video 1 failed in one pass of two, 2 is partial, 4 failed in both views."""
    store = created(tmp_path / "s.zarr")
    put(store, "train", [X], 0, {1: "missing"}, {2})
    put(store, "train", [Y], 0, {}, {2})
    part = add_videos(store, "train", table("b", NEW))
    for view in (0, 1):
        put(store, part, [X, Y], view, {1: "empty"}, set())
    return store


def test_each_video_of_a_view_has_one_object_with_all_that_is_known(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "a-2.mp4").write_bytes(b"half a video")
    os.utime(tmp_path / "a-2.mp4", (1e9, 1e9))
    (tmp_path / "b-1.mp4").mkdir()  # of frames
    os.utime(tmp_path / "b-1.mp4", (1e9, 1e9))
    absent, half, folder = ((None, None), (12, "2001-09-09T01:46:40+00:00"), (None, "2001-09-09T01:46:40+00:00"))
    expected = [
        (1, "a-1", "missing", False, 0, ["group/x"], absent),
        (2, "a-2", "truncated", True, 0, ["group/x", "y"], half),
        (4, "b-1", "empty", False, 0, ["group/x", "y"], folder),
        (4, "b-1", "empty", False, 1, ["group/x", "y"], folder),
    ]
    assert list(failure_entries(store, tmp_path)) == [
        {
            "split": "train",
            "row": row,
            "video_id": name,
            "path": f"{name}.mp4",
            "kind": kind,
            "reason": f"{name} is {kind}",
            "stored": stored,
            "view": view,
            "arrays": arrays,
            "size_bytes": size_bytes,
            "mtime": mtime,
            "decoder": DECODER,
        }
        for row, name, kind, stored, view, arrays, (size_bytes, mtime) in expected
    ]


def test_the_lines_lie_beside_the_store_or_where_they_are_wanted(store: FeatureStore, tmp_path: Path) -> None:
    chosen = tmp_path / "new" / "folder" / "lost.jsonl"
    for file, expected in ((None, tmp_path / "s.zarr.failures.jsonl"), (chosen, chosen)):
        assert write_failures(store, tmp_path, file) == expected
        lines = expected.read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(failure_entries(store, tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_where_nothing_failed_the_file_is_gone_or_empty(tmp_path: Path) -> None:
    chosen, beside = tmp_path / "lost.jsonl", tmp_path / "s.zarr.failures.jsonl"
    chosen.write_text("of a run before\n"), beside.write_text("of a run before\n")
    with created(tmp_path / "s.zarr") as store:
        assert write_failures(store, tmp_path, chosen) == chosen
        assert [write_failures(store, tmp_path) for _ in range(2)] == [None, None]
    assert (chosen.read_bytes(), beside.exists()) == (b"", False)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lost.jsonl"
    file.write_text("of a run before\n")

    def fail(fd: int) -> None:
        raise OSError(5, "planted")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="planted"):
        patch.setattr(os, "fsync", fail)
        write_failures(store, tmp_path, file)
    assert file.read_text() == "of a run before\n"


def test_a_store_in_a_bucket_has_no_file_of_its_own() -> None:
    bucket = store_path("s3://bucket/folder/s.zarr")
    assert isinstance(bucket, ObjectPath)
    assert failures_file(bucket) is None
