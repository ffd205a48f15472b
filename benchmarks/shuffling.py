"""What does a full shuffle cost on a disk that has to look for every video, against shuffling by shards?

    python benchmarks/shuffling.py [--rounds 3] [--videos 1536] [--small-videos 65536]

An epoch of the loader that training uses, nothing computed, with `--shuffle full` and `--shuffle shards`: videos of 2.4 MB (one
layer of tokens of ViT-B/16) and of 12 kB (CLS alone). The store's files are dropped from this machine's page cache before every
epoch, not from that of a host below a virtual machine. The limit is a plain read of the same files from beginning to end, also
cold. Batches of 32; shards are shuffled 512 videos at a time, and the next 512 are read meanwhile.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from noise import noise_store  # the scripts beside this one
from reader import drop_page_cache, machine
from slow_disk import read_files

from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.reader import FeatureStore

NOTHING = ReadPlan(tokens={}, cls={}, maps={}, embed=False)
STORES = {"tokens/11": replace(NOTHING, tokens={-1: 11}), "cls/11": replace(NOTHING, cls={-1: 11})}
BATCH_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the stores (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=1536)
    parser.add_argument("--small-videos", type=int, default=65536)
    options = parser.parse_args()
    print(f"{machine()}; page cache cold (of this machine alone)")
    for name, num_videos in zip(STORES, (options.videos, options.small_videos), strict=True):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = noise_store(Path(folder, "bench.zarr"), [name], num_videos)
            report(name, path, measure(path, STORES[name], options.rounds))


def measure(path: Path, plan: ReadPlan, rounds: int) -> dict[str, list[float]]:
    """Seconds of an epoch, in turns."""
    seconds: dict[str, list[float]] = {"plain read: the limit": [], "shuffled by shards": [], "shuffled in full": []}
    with FeatureStore.open(path) as store:
        shards, full = (loader(store, plan, order) for order in (EpochOrder(shuffle="shards"), EpochOrder()))
        for number in range(rounds):
            for label in seconds:
                drop_page_cache(path)
                if "plain" in label:
                    seconds[label].append(read_files(path))
                else:
                    seconds[label].append(read_epoch(shards if "shards" in label else full, number))
    return seconds


def loader(store: FeatureStore, plan: ReadPlan, order: EpochOrder) -> ClipLoader:
    return ClipLoader(store, "train", plan, batch_size=BATCH_SIZE, device=torch.device("cpu"), order=order)


def read_epoch(loader: ClipLoader, number: int) -> float:
    began = time.perf_counter()
    for _ in loader.epoch(number):
        pass
    return time.perf_counter() - began


def report(name: str, path: Path, seconds: dict[str, list[float]]) -> None:
    with FeatureStore.open(path) as store:
        num_videos = store.splits["train"]
        gigabytes = num_videos * store.arrays("train")[name].row_bytes / 1e9
    print(f"\n{name}: {num_videos:,} videos, {gigabytes:.2f} GB, load {os.getloadavg()[0]:.1f}")
    print(f"  {'':24}{'s an epoch (min-max)':>24}{'MB/s':>8}{'limit / it':>12}")
    limit = statistics.median(next(iter(seconds.values())))
    for label, taken in seconds.items():
        median = statistics.median(taken)
        spread = f"{median:.2f} ({min(taken):.2f}-{max(taken):.2f})"
        print(f"  {label:24}{spread:>24}{1e3 * gigabytes / median:8.0f}{limit / median:12.2f}", flush=True)


if __name__ == "__main__":
    main()
