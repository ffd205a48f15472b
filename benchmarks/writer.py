"""How near does the shard writer come to writing the same bytes with nothing but `write` and `fsync`?

    python benchmarks/writer.py                      # about 12 GB in all, a minute or two; 0.5 GB on disk at a time
    python benchmarks/writer.py --folder /data --rounds 9

A shard of 8-frame ViT-B/16 clips: the tokens of four layers, and all arrays of `vcache extract --layers -4:` with Q/K. The limit
writes the same rows to as many files in the same folder, one `write` for each array and row, and one `fsync` for each file
at the end: nothing is checked, no checksum, no rename, no record. Writer and limit take turns, each on a clean folder. Then
1, 2 and 4 processes, each with a shard of its own. Memory is what Python and NumPy allocate while a shard is written.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scale import FACTS  # the script beside this one

from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import array_specs
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, create_store, declare_arrays

ALL = array_specs(FACTS, range(8, 12), ExtractionConfig(dataset="k400"))
TOKENS = tuple(spec for spec in ALL if spec.name.startswith("tokens/"))
Row = dict[str, np.ndarray]


def make_rows(specs: tuple[ArraySpec, ...], count: int = 3) -> list[Row]:
    """A few rows of noise, written again and again."""
    rng = np.random.default_rng(0)
    return [{spec.name: rng.normal(size=spec.shape).astype(spec.dtype) for spec in specs} for _ in range(count)]


def make_store(path: Path, specs: tuple[ArraySpec, ...], rows_per_shard: int, num_shards: int) -> None:
    num_rows = rows_per_shard * num_shards
    names = tuple(map(str, range(num_rows)))
    manifest = Manifest(
        key="0" * 16,
        spec={},
        dataset="noise",
        class_names=("a",),
        rows_per_shard=rows_per_shard,
        splits={"train": num_rows},
    )
    create_store(path, manifest, {"train": VideoTable(names, names, np.zeros(num_rows, dtype=np.int64))})
    with FeatureStore.open(path) as store:
        declare_arrays(store, "train", specs)


def write_shard(path: Path, shard: int, specs: tuple[ArraySpec, ...], rows: list[Row]) -> None:
    with FeatureStore.open(path) as store, ShardWriter(store, "train", shard, specs) as writer:
        for row in store.shard_rows("train", shard):
            writer.write(row, rows[row % len(rows)])


def write_raw(
    path: Path, shard: int, specs: tuple[ArraySpec, ...], rows: list[Row], rows_per_shard: int, early: bool
) -> None:
    """The limit: every byte once, and on disk; `early` has the disk begin before the fsync, as the store's writer does."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    files = {spec.name: os.open(path / f"{shard}-{spec.name.replace('/', '-')}", flags) for spec in specs}
    for row in range(rows_per_shard):
        for name, array in rows[row % len(rows)].items():
            left = memoryview(array.reshape(-1).view(np.uint8).data)
            while left:
                left = left[os.write(files[name], left) :]
            if early and array.nbytes > 2**20:
                os.posix_fadvise(files[name], row * array.nbytes, array.nbytes, os.POSIX_FADV_DONTNEED)
    for fd in files.values():
        os.fsync(fd)
        os.close(fd)


def time_both(
    folder: Path, specs: tuple[ArraySpec, ...], rows_per_shard: int, rounds: int, processes: int
) -> dict[str, list[tuple[float, float]]]:
    """(wall seconds, CPU seconds) of each round, by who wrote."""
    rows = make_rows(specs)
    raw, store = folder / "raw", folder / "bench.zarr"
    times: dict[str, list[tuple[float, float]]] = {"raw": [], "raw, early": [], "vcache": []}
    for _ in range(rounds):
        for name, early in (("raw", False), ("raw, early", True)):
            raw.mkdir()
            work = partial(write_raw, raw, specs=specs, rows=rows, rows_per_shard=rows_per_shard, early=early)
            times[name].append(timed(work, processes))
            shutil.rmtree(raw)
        make_store(store, specs, rows_per_shard, processes)
        times["vcache"].append(timed(partial(write_shard, store, specs=specs, rows=rows), processes))
        shutil.rmtree(store)
    return times


def timed(work: Callable[[int], None], processes: int) -> tuple[float, float]:
    """Run work(0) here, or a shard in each of so many forks; wall and CPU seconds from the first start to the last end."""
    before, began = os.times(), time.perf_counter()
    if processes == 1:
        work(0)
    else:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=work, args=(shard,)) for shard in range(processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
    return time.perf_counter() - began, sum(os.times()[:4]) - sum(before[:4])


def peak_bytes(folder: Path, specs: tuple[ArraySpec, ...], rows_per_shard: int) -> int:
    """The most memory that is allocated while a shard is written, beyond the rows that are handed in."""
    rows = make_rows(specs)
    make_store(folder / "bench.zarr", specs, rows_per_shard, 1)
    tracemalloc.start()
    write_shard(folder / "bench.zarr", 0, specs, rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    shutil.rmtree(folder / "bench.zarr")
    return peak


def report(title: str, gigabytes: float, times: dict[str, list[tuple[float, float]]]) -> None:
    """The ratio is that of each round, as both wrote in it one after the other."""
    print(f"{title}: {gigabytes:.2f} GB a round")
    for name, measured in times.items():
        walls = [wall for wall, _ in measured]
        low, middle, high = (gigabytes / wall for wall in (max(walls), statistics.median(walls), min(walls)))
        cpu = statistics.median(cpu for _, cpu in measured) / gigabytes
        ratio = statistics.median(raw / wall for (raw, _), wall in zip(times["raw"], walls, strict=True))
        print(
            f"  {name:12}{middle:7.2f} GB/s  ({low:.2f}-{high:.2f}){cpu:8.2f} CPU s/GB{ratio:7.2f} of raw", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16, help="rows of a shard")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, median of {options.rounds} rounds"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for title, specs, rows in (("tokens", TOKENS, 2 * options.rows), ("all arrays with Q/K", ALL, options.rows)):
            row_bytes = sum(spec.row_bytes for spec in specs)
            times = time_both(folder, specs, rows, options.rounds, 1)
            report(f"{title}, {len(specs)} files", rows * row_bytes / 1e9, times)
            peak = peak_bytes(folder, specs, rows)
            print(f"  memory beyond the data: {peak / 1e6:.1f} MB, {peak / row_bytes:.2f} rows")
        for processes in (2, 4):
            times = time_both(folder, TOKENS, options.rows, options.rounds, processes)
            gigabytes = processes * options.rows * sum(spec.row_bytes for spec in TOKENS) / 1e9
            report(f"tokens, {processes} processes with a shard each", gigabytes, times)


if __name__ == "__main__":
    main()
