"""A tiny store with every kind of array, and what should be in it."""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import store_files

from vcache.store.key import cache_key
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure, ShardWriter, create_store, declare_arrays

ROWS, ROWS_PER_SHARD = 7, 3  # shards of 3, 3 and 1 rows
T, N, D, H, E = 4, 5, 6, 2, 8  # small, and all different
SPEC = {"model": "ViT-B-16", "sampling": {"num_frames": 4, "stride_frames": 16}, "crop": {"size": 224}}

TOKENS = ArraySpec(
    name="tokens/8", dims=("frame", "token", "channel"), shape=(T, N, D), chunk=(1, N, D), dtype="float16"
)
Q = ArraySpec(
    name="q/8", dims=("frame", "head", "token", "dim"), shape=(T, H, N, 3), chunk=(1, H, N, 3), dtype="float16"
)
CLS = ArraySpec(name="cls/8", dims=("frame", "channel"), shape=(T, D), chunk=(T, D), dtype="float16")
EMBED = ArraySpec(name="embed", dims=("frame", "channel"), shape=(T, E), chunk=(T, E), dtype="float32")
FRAME_INDEX = ArraySpec(name="frame_index", dims=("frame",), shape=(T,), chunk=(T,), dtype="int32")
FLIP = ArraySpec(name="flip", dims=(), shape=(), chunk=(), dtype="uint8")


@dataclass(frozen=True)
class World:
    """What the tests build stores from."""

    all: tuple[ArraySpec, ...] = (TOKENS, Q, CLS, EMBED, FRAME_INDEX, FLIP)
    tokens: ArraySpec = TOKENS
    cls: ArraySpec = CLS

    def value(self, spec: ArraySpec, row: int) -> np.ndarray:
        """The row of the array that the tests expect: a function of its name and number."""
        rng = np.random.default_rng([row, *spec.name.encode()])
        if spec.dtype.startswith("float"):
            return rng.normal(size=spec.shape).astype(spec.dtype)
        return np.asarray(rng.integers(0, 200, size=spec.shape), dtype=spec.dtype)

    def videos(self, num_rows: int) -> VideoTable:
        ids = tuple(f"vidéo-{row}" for row in range(num_rows))
        return VideoTable(ids, tuple(f"folder/{name}.mp4" for name in ids), np.arange(num_rows) % 3)

    def manifest(self, num_rows: int = ROWS, rows_per_shard: int = ROWS_PER_SHARD) -> Manifest:
        return Manifest(
            key=cache_key(SPEC),
            spec=SPEC,
            dataset="toy",
            class_names=("wave", "jump", "clap"),
            rows_per_shard=rows_per_shard,
            splits={"train": num_rows},
            facts={"backbone": {"width": D}},
            versions={"numpy": "2"},
            created="2026-01-02T03:04:05+00:00",
        )

    def create(self, path: Path, num_rows: int = ROWS, rows_per_shard: int = ROWS_PER_SHARD) -> FeatureStore:
        """A store without arrays."""
        create_store(path, self.manifest(num_rows, rows_per_shard), {"train": self.videos(num_rows)})
        return FeatureStore.open(path)

    def fill(
        self,
        store: FeatureStore,
        specs: Collection[ArraySpec],
        shards: Collection[int] | None = None,
        failed: Collection[int] = (),
        view: int = 0,
    ) -> FeatureStore:
        """Declare the arrays and commit shards of them."""
        declare_arrays(store, "train", specs, view)
        for shard in range(store.num_shards("train")) if shards is None else shards:
            with ShardWriter(store, "train", shard, specs, view) as writer:
                for row in store.shard_rows("train", shard):
                    self.put(writer, row, row in failed)
        return store

    def put(self, writer: ShardWriter, row: int, failed: bool = False) -> None:
        if failed:
            name = store_id(writer, row)
            writer.fail(RowFailure(row, name, f"folder/{name}.mp4", "truncated", "ends after 3 of 8 packets"))
        else:
            writer.write(row, {name: self.value(spec, row) for name, spec in writer.specs.items()})

    def build(self, path: Path, failed: Collection[int] = ()) -> FeatureStore:
        """A complete store of all arrays."""
        return self.fill(self.create(path), self.all, failed=failed)

    def tree(self, path: Path) -> dict[str, bytes]:
        """Every file under `path` with its bytes."""
        return store_files.tree(path)


def store_id(writer: ShardWriter, row: int) -> str:
    return writer.store.part_videos(writer.part).ids[row]


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def copy_whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """copy_whole(path, failed=()): what `world.build` makes there, written once and then copied."""
    made: dict[tuple[int, ...], Path] = {}

    def copy(path: Path, failed: tuple[int, ...] = ()) -> Path:
        if failed not in made:
            made[failed] = tmp_path_factory.mktemp("whole") / "s.zarr"
            world.build(made[failed], failed)
        return shutil.copytree(made[failed], path)

    return copy
