"""Does reading hide behind training?

    python benchmarks/overlap.py [--rounds 5] [--threads 1]

Epochs of the loader that training uses, four layers of tokens: read alone; a stand-in for a head alone, on one thread of torch;
and both. The stand-in takes a given multiple of the time of reading. If reading were free, both would take as long as the
longer of the two alone: that is the limit. The page cache is hot, which is the hard case: reading is then work of the
processor, and with two cores there is one for it and one for torch.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from reader import LAYERS, SPECS, machine, make_store  # the script beside this one

from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.reader import FeatureStore

PLAN = ReadPlan(tokens={layer: layer for layer in LAYERS}, cls={}, maps={}, embed=False)
SIDE = 512


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read_epoch(loader: ClipLoader) -> None:
    for _ in loader.epoch(0):
        pass


def compute(features: ClipFeatures, weight: torch.Tensor, products: int) -> float:
    """Some tokens are looked at, then matrices are multiplied: a little memory, and arithmetic in the cache."""
    x = torch.stack([tokens[:, :, ::16].float().mean() for tokens in features.tokens.values()])
    y = x.mean() * weight
    for _ in range(products):
        y = torch.tanh(y @ weight)
    return y.sum().item()


def train_epoch(loader: ClipLoader, weight: torch.Tensor, products: int) -> None:
    for batch in loader.epoch(0):
        compute(batch.features(), weight, products)


def products_for(target: float, features: ClipFeatures, weight: torch.Tensor) -> int:
    """How many products make `compute` take the target seconds; 0 if looking at tokens takes longer."""
    bare = min(seconds(lambda: compute(features, weight, 0)) for _ in range(3))
    one = min(seconds(lambda: compute(features, weight, 20)) - bare for _ in range(3)) / 20
    return max(0, round((target - bare) / one))


def run(loader: ClipLoader, multiple: float, rounds: int) -> None:
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / SIDE**0.5
    first = next(iter(loader.in_order())).features()
    read_epoch(loader)
    reading = statistics.median(seconds(lambda: read_epoch(loader)) for _ in range(3)) / len(loader)
    products = products_for(multiple * reading, first, weight)
    read, alone, both, ratios = [], [], [], []
    for _ in range(rounds):
        read.append(seconds(lambda: read_epoch(loader)))
        alone.append(seconds(lambda: [compute(first, weight, products) for _ in range(len(loader))]))
        both.append(seconds(lambda: train_epoch(loader, weight, products)))
        ratios.append(both[-1] / max(read[-1], alone[-1]))
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    times = "".join(f"{statistics.median(taken):14.2f}" for taken in (read, alone, both))
    print(f"{multiple:10.1f}{times}{middle:12.2f} ({low:.2f}-{high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the store (default: the system's temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="threads that read")
    parser.add_argument("--multiples", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="compute / read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_rows = int(options.gigabytes * 1e9 / len(SPECS) / SPECS[0].row_bytes)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = make_store(Path(folder, "bench.zarr"), num_rows).path
        with FeatureStore.open(path, num_threads=options.threads) as store:
            loader = ClipLoader(store, "train", PLAN, batch_size=options.batch, device=torch.device("cpu"))
            print(
                f"{machine()}; page cache hot; {options.threads} reading, 1 computing; {len(loader)} batches an epoch\n"
            )
            print(
                f"{'multiple':>10}{'read, s':>14}{'compute, s':>14}{'both, s':>14}{'both / longer, median (min-max)':>36}"
            )
            for multiple in options.multiples:
                run(loader, multiple, options.rounds)


if __name__ == "__main__":
    main()
