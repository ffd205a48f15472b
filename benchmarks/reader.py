"""How near does the verified reader come to the plain read of the same bytes?

    python benchmarks/reader.py                    # 0.5 GB in a temporary folder, a few minutes
    python benchmarks/reader.py --batch 256 --gigabytes 2.5 --skip zarr,h5py,memmap,tensorstore
    python benchmarks/reader.py --cold             # the page cache is dropped before every batch
    python benchmarks/reader.py --rows-per-shard 1 --gigabytes 1.5 --skip zarr,h5py,memmap,tensorstore

The limit is `os.preadv` of the same rows into the same preallocated arrays, without checksums, by as many threads, from files
that are all open. All readers read the same random batches in turn, in an order that changes, so that the machine's load hits
all of them; what they read is compared. `--cold` drops the files from this machine's page cache, not from that of a host
below a virtual machine, so it is as cold as a guest can make it. The last line is one shard per row and more files than the
store keeps open.
"""

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rivals import Read, h5py_rows, memmap_rows, tensorstore_rows, zarr_oindex, zarr_rows  # the script beside this one

from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import MAX_OPEN_FILES, FeatureStore
from vcache.store.writer import ShardWriter, create_store, declare_arrays

T, N, D, E = 8, 197, 768, 512  # an 8-frame clip of ViT-B/16
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
NAMES = tuple(spec.name for spec in SPECS)
STEP = SPECS[0].row_bytes + 4 * T  # from one row to the next in a shard file
SLOW_SECONDS, SLOW_BATCHES = 2.0, 2
"""A reader that takes longer for a batch reads a few batches only."""


def make_store(
    path: Path,
    num_rows: int,
    specs: tuple[ArraySpec, ...] = SPECS,
    rows_per_shard: int = ROWS_PER_SHARD,
    *,
    class_names: tuple[str, ...] = ("a",),
    facts: Mapping[str, Any] | None = None,
) -> FeatureStore:
    """A store of noise, the same for the same arguments; heads can be trained from it if `facts` are those of a backbone."""
    names = tuple(map(str, range(num_rows)))
    table = VideoTable(names, names, np.arange(num_rows, dtype=np.int64) % len(class_names))
    manifest = Manifest(
        key="0" * 16,
        spec={},
        dataset="noise",
        class_names=class_names,
        rows_per_shard=rows_per_shard,
        splits={"train": num_rows},
        facts=dict(facts or {}),
    )
    create_store(path, manifest, {"train": table})
    store = FeatureStore.open(path)
    declare_arrays(store, "train", specs)
    rng = np.random.default_rng(0)
    for shard in range(store.num_shards("train")):
        with ShardWriter(store, "train", shard, specs) as writer:
            for row in store.shard_rows("train", shard):
                writer.write(row, {spec.name: rng.normal(size=spec.shape).astype(spec.dtype) for spec in specs})
    return store


@contextmanager
def many_open_files() -> Iterator[None]:
    """Lets the limit keep every file open; the store needs no such thing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def preadv_reader(store: FeatureStore, num_threads: int) -> Read:
    """Rows into `out` with one preadv each, from files that stay open: nothing is checked, nothing looked up."""
    pool, rows_per_shard = ThreadPoolExecutor(num_threads), store.manifest.rows_per_shard
    shards = range(store.num_shards("train"))
    folder = store.path / "train/view-0"
    fds = [[os.open(folder / spec.shard_path(shard), os.O_RDONLY) for shard in shards] for spec in SPECS]

    def read_row(layer: int, row: int, out: np.ndarray) -> None:
        shard, local = divmod(row, rows_per_shard)
        os.preadv(fds[layer][shard], [out.data], local * STEP)

    def read_part(jobs: list[tuple[int, int, np.ndarray]]) -> None:
        for job in jobs:
            read_row(*job)

    def read(rows: np.ndarray, out: list[np.ndarray]) -> list[np.ndarray]:
        jobs = [(layer, row, out[layer][at]) for layer in range(len(SPECS)) for at, row in enumerate(rows.tolist())]
        parts = [jobs[part::num_threads] for part in range(num_threads)]
        list(pool.map(read_part, parts))
        return out

    return read


def store_reader(path: Path, num_threads: int) -> Read:
    store = FeatureStore.open(path, num_threads=num_threads)
    one_per_shard = range(0, store.manifest.splits["train"], store.manifest.rows_per_shard)
    store.read_many("train", NAMES, one_per_shard, frames=[0])  # an index is read once, and is not measured here

    def read(rows: np.ndarray, out: list[np.ndarray]) -> list[np.ndarray]:
        store.read_many("train", NAMES, rows, out=dict(zip(NAMES, out, strict=True)))
        return out

    return read


def all_readers(options: argparse.Namespace, store: FeatureStore, folder: Path) -> dict[str, Read]:
    readers: dict[str, Read] = {}
    for threads in sorted({1, options.threads}):
        readers[f"preadv, {threads} threads, unchecked"] = preadv_reader(store, threads)
        readers[f"vcache, {threads} threads, checked"] = store_reader(store.path, threads)
    arrays = [store.path / "train/view-0" / name for name in NAMES]
    if "zarr" not in options.skip:
        readers["zarr-python, row by row, checked"] = zarr_rows(arrays)
        readers["zarr-python, oindex, checked"] = zarr_oindex(arrays)
    if "tensorstore" not in options.skip:
        readers[f"tensorstore, {options.threads} threads, checked"] = tensorstore_rows(arrays, options.threads)
    if {"h5py", "memmap"} - options.skip:
        layers = list(store.read_many("train", NAMES, range(store.manifest.splits["train"])).values())
    if "h5py" not in options.skip:
        readers["h5py, read_direct, unchecked"] = h5py_rows(folder / "plain.h5", layers, checked=False)
        readers["h5py, read_direct, fletcher32"] = h5py_rows(folder / "sums.h5", layers, checked=True)
    if "memmap" not in options.skip:
        readers["np.memmap, take, unchecked"] = memmap_rows(folder, layers)
    return readers


def drop_page_cache(folder: Path) -> None:
    """Drop every file under the folder from the page cache of this machine."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(
    readers: dict[str, Read], options: argparse.Namespace, num_rows: int, folder: Path
) -> dict[str, list[tuple[float, float]]]:
    """(wall seconds, CPU seconds) of every batch by reader."""
    rng = np.random.default_rng(1)
    out = [np.zeros((options.batch, *spec.shape), dtype=np.float16) for spec in SPECS]
    expected = [array.copy() for array in out]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    names = list(readers)
    for batch in range(-1, options.batches):  # batch -1 warms up: page cache, indexes, threads
        rows = rng.integers(0, num_rows, size=options.batch)
        readers[next(name for name in names if "vcache" in name)](rows, expected)
        for name in rng.permutation(names):
            if sum(wall > SLOW_SECONDS for wall, _ in times[name]) >= SLOW_BATCHES:
                continue
            if options.cold:
                drop_page_cache(folder)
            wall, cpu = time.perf_counter(), time.process_time()
            arrays = readers[name](rows, out)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if batch >= 0:
                times[name].append((wall, cpu))
            if "preadv" not in name:  # its bytes have checksums among them
                for array, right in zip(arrays, expected, strict=True):
                    assert np.array_equal(array.view(np.uint16), right.view(np.uint16)), f"{name} read other values"
    return times


def report(options: argparse.Namespace, store: FeatureStore, times: dict[str, list[tuple[float, float]]]) -> None:
    gigabytes = options.batch * sum(spec.row_bytes for spec in SPECS) / 1e9
    shards = store.num_shards("train") * len(SPECS)
    print(f"{machine()}; page cache {'cold (of this machine alone)' if options.cold else 'hot'}")
    print(
        f"{store.manifest.splits['train']} rows x {len(SPECS)} layers of {SPECS[0].shape} float16, "
        f"{store.size_bytes() / 1e9:.2f} GB in {shards} files ({MAX_OPEN_FILES} stay open); "
        f"{options.batches} random batches of {options.batch} rows, {gigabytes:.2f} GB each\n"
    )
    print(f"{'reader':36}{'GB/s median':>12}{'quartiles':>14}{'CPU s/GB':>10}{'of preadv':>11}{'its CPU':>9}")
    limit: list[tuple[float, float]] = []
    for name, measured in times.items():
        limit = measured if "preadv" in name else limit
        walls = [wall for wall, _ in measured]
        low, median, high = (gigabytes / wall for wall in reversed(statistics.quantiles(walls, n=4)))
        cpu = statistics.median(cpu for _, cpu in measured) / gigabytes
        # Batch by batch, since both read the same rows at nearly the same time.
        pairs = list(zip(limit, measured, strict=False))
        ratio, cpu_ratio = (statistics.median(best[i] / own[i] for best, own in pairs) for i in (0, 1))
        print(f"{name:36}{median:12.2f}{f'{low:.2f}-{high:.2f}':>14}{cpu:10.2f}{ratio:11.2f}{cpu_ratio:9.2f}")


def machine() -> str:
    """Processor, cores, load and versions, for the head of a report."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the store (default: the system's temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rows-per-shard", type=int, default=ROWS_PER_SHARD)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every batch")
    parser.add_argument("--skip", type=lambda text: set(text.split(",")), default=set(), metavar="zarr,h5py,...")
    options = parser.parse_args()
    num_rows = int(options.gigabytes * 1e9 / len(SPECS) / SPECS[0].row_bytes)
    with tempfile.TemporaryDirectory(dir=options.folder) as name, many_open_files():
        folder = Path(name)
        store = make_store(folder / "bench.zarr", num_rows, rows_per_shard=options.rows_per_shard)
        readers = all_readers(options, store, folder)
        report(options, store, measure(readers, options, num_rows, folder))


if __name__ == "__main__":
    main()
