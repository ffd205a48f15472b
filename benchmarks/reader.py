"""How near does the verified reader come to the plain read of the same bytes?

    python benchmarks/reader.py            # 0.5 GB in a temporary folder, about a minute
    python benchmarks/reader.py --folder /data --batches 50

The limit is `os.preadv` of the same rows into the same preallocated arrays, without checksums, by as many threads. All
readers read the same random batches in turn, so that a change of the machine's load hits all of them. The files are in the
page cache: the disk is not measured, the work of the reader is.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, create_store, declare_arrays

T, N, D = 8, 197, 768  # an 8-frame clip of ViT-B/16
LAYERS = (8, 9, 10, 11)
ROWS_PER_SHARD = 32
SPECS = tuple(
    ArraySpec(
        name=f"tokens/{layer}",
        dims=("frame", "token", "channel"),
        shape=(T, N, D),
        chunk=(1, N, D),
        dtype="float16",
    )
    for layer in LAYERS
)
STEP = SPECS[0].row_bytes + 4 * T  # from one row to the next in a shard file


def make_store(path: Path, num_rows: int) -> FeatureStore:
    names = tuple(map(str, range(num_rows)))
    table = VideoTable(names, names, np.zeros(num_rows, dtype=np.int64))
    manifest = Manifest(
        key="0" * 16,
        spec={},
        dataset="noise",
        class_names=("a",),
        rows_per_shard=ROWS_PER_SHARD,
        splits={"train": num_rows},
    )
    create_store(path, manifest, {"train": table})
    store = FeatureStore.open(path)
    declare_arrays(store, "train", SPECS)
    rng = np.random.default_rng(0)
    for shard in range(store.num_shards("train")):
        with ShardWriter(store, "train", shard, SPECS) as writer:
            for row in store.shard_rows("train", shard):
                writer.write(row, {spec.name: rng.normal(size=spec.shape).astype(np.float16) for spec in SPECS})
    return store


def preadv_reader(store: FeatureStore, num_threads: int) -> Callable[[np.ndarray, list[np.ndarray]], None]:
    """Rows into `out` with one preadv each, from files that stay open: nothing is checked, nothing looked up."""
    pool = ThreadPoolExecutor(num_threads)
    fds = [
        [
            os.open(store.path / "train/view-0" / spec.shard_path(shard), os.O_RDONLY)
            for shard in range(store.num_shards("train"))
        ]
        for spec in SPECS
    ]

    def read_row(layer: int, row: int, out: np.ndarray) -> None:
        shard, local = divmod(row, ROWS_PER_SHARD)
        os.preadv(fds[layer][shard], [out.data], local * STEP)

    def read_part(jobs: list[tuple[int, int, np.ndarray]]) -> None:
        for job in jobs:
            read_row(*job)

    def read(rows: np.ndarray, out: list[np.ndarray]) -> None:
        jobs = [(layer, row, out[layer][at]) for layer in range(len(SPECS)) for at, row in enumerate(rows.tolist())]
        parts = [jobs[part::num_threads] for part in range(num_threads)]
        list(pool.map(read_part, parts))

    return read


def store_reader(path: Path, num_threads: int) -> Callable[[np.ndarray, list[np.ndarray]], None]:
    store = FeatureStore.open(path, num_threads=num_threads)

    def read(rows: np.ndarray, out: list[np.ndarray]) -> None:
        for spec, destination in zip(SPECS, out, strict=True):
            store.read("train", spec.name, rows, out=destination)

    return read


def zarr_reader(path: Path) -> Callable[[np.ndarray, list[np.ndarray]], None]:
    """Row by row, the fastest way that zarr-python 3.1 has for rows of a sharded array."""
    arrays = [zarr.open_array(str(path / "train/view-0" / spec.name), mode="r") for spec in SPECS]

    def read(rows: np.ndarray, out: list[np.ndarray]) -> None:
        for array, destination in zip(arrays, out, strict=True):
            for at, row in enumerate(rows.tolist()):
                destination[at] = array[row]

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the store (default: the system's temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args()
    num_rows = max(options.batch, int(options.gigabytes * 1e9 / len(SPECS) / SPECS[0].row_bytes))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "bench.zarr")
        store = make_store(path, num_rows)
        readers = {
            "preadv, 1 thread, unchecked": preadv_reader(store, 1),
            "vcache, 1 thread, checked": store_reader(path, 1),
        }
        if options.threads > 1:
            readers |= {
                f"preadv, {options.threads} threads, unchecked": preadv_reader(store, options.threads),
                f"vcache, {options.threads} threads, checked": store_reader(path, options.threads),
            }
        readers["zarr-python, row by row, checked"] = zarr_reader(path)
        out = [np.zeros((options.batch, *spec.shape), dtype=np.float16) for spec in SPECS]
        report(options, num_rows, store, measure(readers, options, num_rows, out))


def measure(
    readers: dict[str, Callable[[np.ndarray, list[np.ndarray]], None]],
    options: argparse.Namespace,
    num_rows: int,
    out: list[np.ndarray],
) -> dict[str, list[tuple[float, float]]]:
    """(wall seconds, CPU seconds) of every batch by reader; every reader is checked against the first."""
    rng = np.random.default_rng(1)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for batch in range(-1, options.batches):  # batch -1 warms up: page cache, indexes, threads
        rows, expected = rng.integers(0, num_rows, size=options.batch), None
        for name, read in readers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            read(rows, out)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if batch < 0:
                expected = out[0].copy() if expected is None and "vcache" in name else expected
                if expected is not None and "preadv" not in name:
                    np.testing.assert_array_equal(out[0], expected)
            else:
                times[name].append((wall, cpu))
    return times


def report(
    options: argparse.Namespace, num_rows: int, store: FeatureStore, times: dict[str, list[tuple[float, float]]]
) -> None:
    gigabytes = options.batch * sum(spec.row_bytes for spec in SPECS) / 1e9
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{processor()}, {os.cpu_count()} cores, load {load}, Python {platform.python_version()}, zarr {zarr.__version__}"
    )
    print(
        f"{num_rows} rows x {len(SPECS)} layers of {SPECS[0].shape} float16, {store.size_bytes() / 1e9:.2f} GB; "
        f"{options.batches} random batches of {options.batch} rows, {gigabytes:.2f} GB each; page cache hot\n"
    )
    print(f"{'reader':36}{'GB/s median':>12}{'quartiles':>14}{'best':>7}{'CPU s/GB':>10}{'of preadv':>11}")
    limit: list[float] = []
    for name, measured in times.items():
        walls = [wall for wall, _ in measured]
        if "preadv" in name:
            limit = walls
        low, median, high = (gigabytes / wall for wall in reversed(statistics.quantiles(walls, n=4)))
        # Batch by batch, since both read the same rows one after the other.
        ratio = statistics.median(at_limit / wall for at_limit, wall in zip(limit, walls, strict=True))
        cpu = statistics.median(cpu for _, cpu in measured) / gigabytes
        print(
            f"{name:36}{median:12.2f}{f'{low:.2f}-{high:.2f}':>14}{gigabytes / min(walls):7.2f}{cpu:10.2f}{ratio:11.2f}"
        )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
