"""How long does a command look at a store before it does anything, as stores grow to 260,000 videos?

    python benchmarks/scale.py                       # 1,000 to 260,000 videos, about two minutes
    python benchmarks/scale.py --sizes 260000 --rounds 5 --passes 2

The stores have the video tables, array metadata and commit records of a Kinetics-400 extraction (ViT-B/16, `--layers -4:` with
Q/K, 64 videos a shard, one video in 200 failed), and no shard files: nothing that is measured opens one. Every round opens
the store anew. The limit reads the same files into memory and does nothing with them. Imports are shown apart.
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from vcache.extract.backbone import BackboneFacts
from vcache.pipelines.listing import describe_store
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import array_specs
from vcache.pipelines.shards import missing_shards
from vcache.pipelines.upkeep.store_listing import describe_folder
from vcache.store.commits import CommitRecord, RowFailure, StoredFile
from vcache.store.layout import CRC_BYTES, ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import create_store, declare_arrays

ROWS_PER_SHARD = 64
FAILED_EVERY = 200
FACTS = BackboneFacts(
    model="ViT-B-16-quickgelu",
    num_layers=12,
    width=768,
    num_heads=12,
    head_dim=64,
    patch_size=16,
    image_size=224,
    grid=(14, 14),
    num_tokens=197,
    embed_dim=512,
    layer_norm_eps=1e-5,
)
CONFIG = ExtractionConfig(dataset="k400")
PLAN = ReadPlan(
    tokens={layer: 12 + layer for layer in (-4, -3, -2, -1)},
    cls={},
    maps={layer: 12 + layer for layer in (-4, -3, -2, -1)},
    embed=False,
)


def passes_of_arrays(num_passes: int) -> list[tuple[ArraySpec, ...]]:
    """The arrays that each pass added: four layers each, and with the first what every view has."""
    passes, known = [], set[str]()
    for number in range(num_passes):
        specs = array_specs(FACTS, range(8 - 4 * number, 12 - 4 * number), CONFIG)
        passes.append(tuple(spec for spec in specs if spec.name not in known))
        known |= {spec.name for spec in specs}
    return passes


def make_store(path: Path, num_rows: int, num_passes: int) -> None:
    """A store of two splits, complete as far as its records say."""
    splits = {"train": num_rows - num_rows // 13, "val": num_rows // 13}
    manifest = Manifest(
        key="0" * 16,
        spec={"sampling": {"kind": "strided", "num_frames": 8, "stride_frames": 16}},
        dataset="k400",
        class_names=tuple(f"class {label}" for label in range(400)),
        rows_per_shard=ROWS_PER_SHARD,
        splits=splits,
        facts={"backbone": vars(FACTS), "request": {"dataset": "k400", "frames": 8, "dtype": "float16"}},
    )
    create_store(path, manifest, {split: table_of(split, rows) for split, rows in splits.items()})
    with FeatureStore.open(path) as store:
        for specs in passes_of_arrays(num_passes):
            for split in splits:
                declare_arrays(store, split, specs)
                for record in records(store, split, specs):
                    file = path / record.relative_path
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(record.encode())


def table_of(split: str, num_rows: int) -> VideoTable:
    """Ids and paths as long as Kinetics has them."""
    ids = tuple(f"{row:011x}_{row % 300:06d}_{row % 300 + 10:06d}" for row in range(num_rows))
    paths = tuple(f"{split}/class {row % 400}/{name}.mp4" for row, name in enumerate(ids))
    return VideoTable(ids, paths, np.arange(num_rows) % 400)


def records(store: FeatureStore, split: str, specs: tuple[ArraySpec, ...]) -> Iterator[CommitRecord]:
    rng = np.random.default_rng(0)
    table = store.videos(split)
    for shard in range(store.num_shards(split)):
        rows = store.shard_rows(split, shard)
        failed = [row for row in rows if row % FAILED_EVERY == 0]
        yield CommitRecord(
            split=split,
            view=0,
            shard=shard,
            first_row=rows.start,
            num_rows=len(rows),
            files=tuple(
                stored_file(spec, len(rows) - len(failed), rng) for spec in sorted(specs, key=lambda s: s.name)
            ),
            failures=tuple(
                RowFailure(row, table.ids[row], table.paths[row], "truncated", "ends after 3 of 8 packets")
                for row in failed
            ),
        )


def stored_file(spec: ArraySpec, num_rows: int, rng: np.random.Generator) -> StoredFile:
    size = num_rows * spec.chunks_per_row * (spec.chunk_bytes + CRC_BYTES) + spec.index_bytes(ROWS_PER_SHARD)
    return StoredFile(spec, size, *rng.integers(0, 2**32, size=2).tolist())


def plan_resume(path: Path, wanted: tuple[ArraySpec, ...]) -> None:
    """What `vcache extract` looks up in a store before its first video, to add a layer to every shard."""
    with FeatureStore.open(path) as store:
        splits = store.manifest.splits
        assert all(len(store.videos(split)) == rows for split, rows in splits.items())
        tasks = missing_shards(store, splits, wanted)
        assert len(tasks) == sum(map(store.num_shards, splits)) and len(tasks[0].arrays) == 4


def look_at_all(path: Path) -> None:
    """Every video, and for every array which rows of it can be read."""
    with FeatureStore.open(path) as store:
        for split, rows in store.manifest.splits.items():
            assert len(store.videos(split)) == rows
            for name in store.arrays(split):
                assert store.committed_rows(split, [name]).sum() == rows - -(-rows // FAILED_EVERY)


def make_loaders(path: Path) -> None:
    """What `vcache train-head evl` does with a store before its first batch."""
    with FeatureStore.open(path) as store:
        for split in store.manifest.splits:
            ClipLoader(store, split, PLAN, batch_size=64, device=torch.device("cpu"))


def read_files(files: list[str]) -> None:
    for name in files:
        fd = os.open(name, os.O_RDONLY)
        os.read(fd, os.fstat(fd).st_size)
        os.close(fd)


def commands(path: Path, num_passes: int) -> dict[str, Callable[[], object]]:
    files = [str(file) for file in path.rglob("*") if file.is_file()]
    wanted = array_specs(FACTS, range(7 - 4 * (num_passes - 1), 12), CONFIG)
    return {
        "plain read of all its files: the limit": lambda: read_files(files),
        "ls": lambda: [row["size_bytes"] for row in describe_folder(path.parent)],
        "info": lambda: describe_store(path),
        "all videos, rows of all arrays": lambda: look_at_all(path),
        "train-head, to the first batch": lambda: make_loaders(path),
        "extract, to the first video": lambda: plan_resume(path, wanted),
    }


def measure(work: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """(wall seconds, CPU seconds) of each round; on a machine with other work to do, the second is the one to trust."""
    times = []
    for _ in range(rounds):
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def import_seconds(module: str) -> float:
    """A fresh interpreter that imports the module, less one that imports nothing; the best of three."""

    def run(code: str) -> float:
        return min(wall for wall, _ in measure(lambda: subprocess.run([sys.executable, "-c", code], check=True), 3))

    return run(f"import {module}") - run("pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 65_000, 260_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, choices=(1, 2), default=1, help="extractions that each added four layers")
    parser.add_argument("--folder", type=Path, help="where to make the stores (default: the system's temporary folder)")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    )
    for module in ("vcache.store.reader", "vcache.pipelines.listing", "vcache.pipelines.training.train_head"):
        print(f"  import {module}: {import_seconds(module):.2f} s")
    print(f"seconds, median of {options.rounds} (min-max); page cache hot")
    for num_rows in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder, "bench.zarr")
            make_store(path, num_rows, options.passes)
            num_records = sum(1 for _ in path.glob("_commit/*/*.json"))
            print(f"{num_rows:,} videos, {num_records:,} commit records")
            for name, work in commands(path, options.passes).items():
                walls, cpus = zip(*measure(work, options.rounds), strict=True)
                spread = f"({min(walls):.3f}-{max(walls):.3f})"
                print(
                    f"  {name:40}{statistics.median(walls):8.3f}  {spread:15}  CPU {statistics.median(cpus):.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
