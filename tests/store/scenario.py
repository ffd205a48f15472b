"""The life of a small store in stages that can be repeated after any fault, and what a reader may see in between."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vcache.store.errors import ArrayNotFound, RowNotCommitted, StoreNotFound
from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, add_split, clean_temporary, create_store, declare_arrays, sole_writer

TRAIN_ROWS, VAL_ROWS, ROWS_PER_SHARD = 4, 2, 3  # shards of 3 and 1 rows, and of 2
TOKENS = ArraySpec(
    name="tokens/8", dims=("frame", "token", "channel"), shape=(4, 5, 6), chunk=(1, 5, 6), dtype="float16"
)
CLS = ArraySpec(name="cls/8", dims=("frame", "channel"), shape=(4, 6), chunk=(4, 6), dtype="float16")
FLIP = ArraySpec(name="flip", dims=(), shape=(), chunk=(), dtype="uint8")
ALL = (TOKENS, CLS, FLIP)

Committed = set[tuple[str, str, int]]
"""(split, array, shard)"""


def create(world: Any, path: Path, done: Committed) -> None:
    if not path.exists():
        create_store(path, world.manifest(TRAIN_ROWS, ROWS_PER_SHARD), {"train": world.videos(TRAIN_ROWS)})


def first_arrays(world: Any, path: Path, done: Committed) -> None:
    extend(world, path, "train", (TOKENS, FLIP), done)


def more_arrays(world: Any, path: Path, done: Committed) -> None:
    extend(world, path, "train", ALL, done)


def another_split(world: Any, path: Path, done: Committed) -> None:
    extend(world, path, "val", (TOKENS, CLS), done)


STAGES: tuple[Callable[[Any, Path, Committed], None], ...] = (create, first_arrays, more_arrays, another_split)


def run(world: Any, path: Path, done: Committed | None = None) -> None:
    """All stages; what an earlier, interrupted run has done is kept."""
    for stage in STAGES:
        stage(world, path, set() if done is None else done)


def extend(world: Any, path: Path, split: str, specs: Iterable[ArraySpec], done: Committed) -> None:
    """Write what the split lacks of these arrays, as `vcache extract` does; `done` grows with every shard committed."""
    with sole_writer(path), FeatureStore.open(path) as store:
        clean_temporary(store)
        if split not in store.manifest.splits:
            add_split(store, split, world.videos(VAL_ROWS))
        declare_arrays(store, split, specs)
        for shard in range(store.num_shards(split)):
            stored = store.committed_arrays(split, shard)
            if missing := [spec for spec in specs if spec.name not in stored]:
                write_shard(world, store, split, shard, missing)
                done |= {(split, spec.name, shard) for spec in missing}


def write_shard(world: Any, store: FeatureStore, split: str, shard: int, specs: Iterable[ArraySpec]) -> None:
    with ShardWriter(store, split, shard, specs) as writer:
        for row in store.shard_rows(split, shard):
            writer.write(row, {name: world.value(spec, row) for name, spec in writer.specs.items()})


def check_old_or_complete(world: Any, path: Path, required: Committed) -> Committed:
    """Every committed shard reads as it was written, every other row raises; returns what is committed.

    `required` are shards that must be there: committed before the fault.
    """
    try:
        store = FeatureStore.open(path)
    except StoreNotFound:
        assert not required
        return set()
    with store:
        found = committed(world, store)
    assert required <= found
    return found


def committed(world: Any, store: FeatureStore) -> Committed:
    """What an opened store says is committed, all of it read and compared."""
    return {found for split in store.manifest.splits for found in _check_split(world, store, split)}


def _check_split(world: Any, store: FeatureStore, split: str) -> Committed:
    assert store.videos(split).ids == world.videos(store.manifest.splits[split]).ids
    found = set()
    for spec in ALL:
        for shard in range(store.num_shards(split)):
            rows = store.shard_rows(split, shard)
            if spec.name in store.committed_arrays(split, shard):
                found.add((split, spec.name, shard))
                expected = np.stack([world.value(spec, row) for row in rows])
                np.testing.assert_array_equal(store.read(split, spec.name, rows), expected)
                continue
            with pytest.raises((RowNotCommitted, ArrayNotFound)):
                store.read(split, spec.name, rows[-1:])
    return found
