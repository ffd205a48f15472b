"""Writes the golden store of format version 1:  python tests/store/make_golden_store.py FOLDER

tests/store/golden_v1 was made by it and stays as it is: a later vcache must read it, or refuse it in words. It is made anew
only before a version is released; after that a change of format is a new version with a golden store of its own.
"""

import sys
from pathlib import Path

import numpy as np

from vcache.store.constants import Constant, write_constants
from vcache.store.key import cache_key
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure, ShardWriter, create_store, declare_arrays

SPEC = {"model": "golden", "sampling": {"num_frames": 3, "stride_frames": 16}, "crop": {"size": 224}}
SPLITS = {"train": 5, "val": 2}
ROWS_PER_SHARD = 2
FAILED = ("train", 3)
TOKENS = ArraySpec(
    name="tokens/11", dims=("frame", "token", "channel"), shape=(3, 2, 5), chunk=(1, 2, 5), dtype="float16"
)
FIRST_PASS = (
    TOKENS,
    ArraySpec(name="embed", dims=("frame", "channel"), shape=(3, 4), chunk=(3, 4), dtype="float32"),
    ArraySpec(name="frame_index", dims=("frame",), shape=(3,), chunk=(3,), dtype="int32"),
    ArraySpec(name="flip", dims=(), shape=(), chunk=(), dtype="uint8"),
)
SECOND_PASS = (
    ArraySpec(
        name="q/11", dims=("frame", "head", "token", "dim"), shape=(3, 2, 2, 3), chunk=(1, 2, 2, 3), dtype="bfloat16"
    ),
    ArraySpec(name="cls/11", dims=("frame", "channel"), shape=(3, 5), chunk=(3, 5), dtype="int8"),
)


def value(split: str, spec: ArraySpec, row: int) -> np.ndarray:
    """What is stored: bytes counted up from one that depends on the place, with no exponent that means NaN."""
    count = int(np.prod(spec.shape, dtype=np.int64)) * spec.numpy_dtype.itemsize
    start = sum(f"{split}/{spec.name}".encode()) + 7 * row
    data = ((start + 3 * np.arange(count)) % 64).astype(np.uint8)
    return np.frombuffer(data.tobytes(), dtype=spec.numpy_dtype).reshape(spec.shape)


def constant() -> np.ndarray:
    return np.arange(6, dtype=np.float32).reshape(2, 3)


def videos(split: str) -> VideoTable:
    ids = tuple(f"{split}-vidéo-{row}" for row in range(SPLITS[split]))
    return VideoTable(ids, tuple(f"{split}/{name}.mp4" for name in ids), np.arange(len(ids), dtype=np.int64) % 2)


def make(path: Path) -> None:
    """Two passes; the last shard of train lacks the second, and one video failed in both."""
    manifest = Manifest(
        key=cache_key(SPEC),
        spec=SPEC,
        dataset="golden",
        class_names=("wave", "jump"),
        rows_per_shard=ROWS_PER_SHARD,
        splits=SPLITS,
        facts={"backbone": {"width": 5}},
        versions={"vcache": "0.1.0"},
        created="2026-01-02T03:04:05+00:00",
    )
    create_store(path, manifest, {split: videos(split) for split in SPLITS})
    with FeatureStore.open(path) as store:
        write_constants(store, {"bias": Constant(values=constant(), dims=("layer", "channel"))})
        for split in SPLITS:
            for specs, num_shards in ((FIRST_PASS, store.num_shards(split)), (SECOND_PASS, 2)):
                declare_arrays(store, split, specs)
                for shard in range(min(num_shards, store.num_shards(split))):
                    _write_shard(store, split, shard, specs)


def _write_shard(store: FeatureStore, split: str, shard: int, specs: tuple[ArraySpec, ...]) -> None:
    with ShardWriter(store, split, shard, specs) as writer:
        for row in store.shard_rows(split, shard):
            if (split, row) == FAILED:
                table = store.videos(split)
                writer.fail(RowFailure(row, table.ids[row], table.paths[row], "truncated", "ends after 3 of 8 packets"))
            else:
                writer.write(row, {spec.name: value(split, spec, row) for spec in specs})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
