"""How near does `vcache verify` come to a plain read of the same files from front to back?

    python benchmarks/verify.py [--gigabytes 0.5] [--rounds 7]

The limit reads every shard file with `readinto` into one buffer per thread and checks nothing, with as many threads. The files
are in the page cache: the disk is not measured, the work of verifying is.
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

from reader import LAYERS, SPECS, make_store  # the script beside this one

from vcache.store.verify import verify_store

BUFFER_BYTES = 4 << 20


def plain_read(files: list[Path], num_threads: int) -> None:
    def read(path: Path) -> None:
        buffer = bytearray(BUFFER_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, files))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    num_threads = min(4, os.cpu_count() or 1)
    num_rows = int(options.gigabytes * 1e9 / len(LAYERS) / SPECS[0].row_bytes)
    print(f"{platform.machine()}, {num_threads} threads, load {os.getloadavg()[0]:.1f}; page cache hot")
    with tempfile.TemporaryDirectory() as folder, make_store(Path(folder, "bench.zarr"), num_rows) as store:
        assert verify_store(store).ok
        files = [path for path in (store.path / "train/view-0").rglob("c/**/*") if path.is_file()]
        times: dict[str, list[float]] = {"plain read": [], "verify": []}
        for _ in range(options.rounds):
            times["plain read"].append(seconds(lambda: plain_read(files, num_threads)))
            times["verify"].append(seconds(lambda: verify_store(store)))
        size = store.size_bytes() / 1e9
    limit = statistics.median(times["plain read"])
    for name, taken in times.items():
        median = statistics.median(taken)
        spread = f"({size / max(taken):.2f}-{size / min(taken):.2f})"
        print(f"  {name:<12}{size / median:6.2f} GB/s  {spread}  ratio {limit / median:.2f}")


if __name__ == "__main__":
    main()
