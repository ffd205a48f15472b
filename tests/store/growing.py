"""A split in parts, with values to compare with: what the tests of growing build and look at."""

import numpy as np

from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure, ShardWriter, add_videos, create_store, declare_arrays

X = ArraySpec(name="group/x", dims=("frame", "channel"), shape=(3, 2), chunk=(1, 2), dtype="int32")


def table(prefix, num_rows):
    ids = tuple(f"{prefix}-{row}" for row in range(num_rows))
    return VideoTable(ids, tuple(f"{name}.mp4" for name in ids), np.arange(num_rows) % 2)


def fill(store, part, specs, values, failed=(), view=0):
    """Declare the arrays and commit the shards of a part that are not; `values[name]` holds its rows."""
    declare_arrays(store, part, specs, view)
    ids = store.part_videos(part).ids
    for shard in range(store.num_shards(part)):
        if {spec.name for spec in specs} <= store.committed_arrays(part, shard, view):
            continue
        with ShardWriter(store, part, shard, specs, view) as writer:
            for row in store.shard_rows(part, shard):
                if row in failed:
                    writer.fail(RowFailure(row, ids[row], f"{ids[row]}.mp4", "empty", "0 bytes"))
                else:
                    writer.write(row, {spec.name: values[spec.name][row] for spec in specs})


def drawn(specs, num_rows, seed=0):
    rng = np.random.default_rng(seed)
    return {spec.name: rng.integers(0, 200, (num_rows, *spec.shape)).astype(spec.dtype) for spec in specs}


def grown_store(path, sizes, rows_per_shard=2, spec=X, failed=()):
    """A store whose split "train" has parts of these sizes, and the values of its rows; `failed` are (part, row)."""
    manifest = Manifest(
        key="0" * 16,
        spec={},
        dataset="toy",
        class_names=("a", "b"),
        rows_per_shard=rows_per_shard,
        splits={"train": sizes[0]},
    )
    create_store(path, manifest, {"train": table("a", sizes[0])})
    store = FeatureStore.open(path, num_threads=2)
    values = []
    for number, num_rows in enumerate(sizes):
        part = add_videos(store, "train", table("abcdef"[number], num_rows)) if number else "train"
        values.append(drawn([spec], num_rows, seed=number))
        fill(store, part, [spec], values[-1], {row for there, row in failed if there == number})
    return store, np.concatenate([part[spec.name] for part in values])


def state(path):
    """Content, inode and time of modification of every file but the manifest, which alone may change."""
    files = (file for file in path.rglob("*") if file.is_file() and file != path / "zarr.json")
    return {file.relative_to(path): (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
