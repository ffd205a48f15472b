"""Does reading a part cost what its bytes cost?

    python benchmarks/selections.py [--batch 32] [--batches 30] [--cold]

Random rows of a store with tokens and CLS of four layers: half the layers, every second frame, one frame, CLS alone, each
against the full read of the same rows just before. A cost above the share of the bytes is what the reader loses on small pieces.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reader import LAYERS, NAMES, SPECS, D, T, drop_page_cache, machine, make_store  # the script beside this one

from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore

CLS = tuple(
    ArraySpec(name=f"cls/{layer}", dims=("frame", "channel"), shape=(T, D), chunk=(T, D), dtype="float16")
    for layer in LAYERS
)


@dataclass(frozen=True)
class Part:
    names: tuple[str, ...]
    frames: list[int] | None = None


FULL = Part(NAMES)
PARTS = {
    "full: 4 layers, 8 frames": FULL,
    "2 of 4 layers": Part(NAMES[2:]),
    "every second frame": Part(NAMES, [0, 2, 4, 6]),
    "one frame": Part(NAMES, [3]),
    "2 of 4 layers, every second frame": Part(NAMES[2:], [0, 2, 4, 6]),
    "CLS alone": Part(tuple(spec.name for spec in CLS)),
}


def empty(store: FeatureStore, part: Part, batch: int) -> dict[str, np.ndarray]:
    specs = {name: store.arrays("train")[name] for name in part.names}
    shapes = {
        name: spec.shape if part.frames is None else (len(part.frames), *spec.shape[1:]) for name, spec in specs.items()
    }
    return {name: np.zeros((batch, *shape), dtype=np.float16) for name, shape in shapes.items()}


def check(part: Part, read: dict[str, np.ndarray], full: dict[str, np.ndarray]) -> None:
    """What was read of the part is what the full read has there."""
    for name in part.names:
        if name in full:
            right = full[name] if part.frames is None else full[name][:, part.frames]
            assert np.array_equal(read[name].view(np.uint16), right.view(np.uint16)), f"{name} {part.frames}"


def measure(store: FeatureStore, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every batch by part."""
    rng, num_rows = np.random.default_rng(1), store.manifest.splits["train"]
    out = {name: empty(store, part, options.batch) for name, part in PARTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    for batch in range(-1, options.batches):
        rows = rng.integers(0, num_rows, size=options.batch)
        for name, part in PARTS.items():
            if options.cold:
                drop_page_cache(store.path)
            began = time.perf_counter()
            store.read_many("train", part.names, rows, frames=part.frames, out=out[name])
            if batch >= 0:
                seconds[name].append(time.perf_counter() - began)
            check(part, out[name], out["full: 4 layers, 8 frames"])
    return seconds


def report(store: FeatureStore, seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    sizes = {name: sum(array.nbytes for array in empty(store, part, 1).values()) for name, part in PARTS.items()}
    full = next(iter(PARTS))
    print(f"{machine()}; page cache {'cold (of this machine alone)' if options.cold else 'hot'}")
    print(f"{options.batches} random batches of {options.batch} rows\n")
    print(f"{'part':36}{'GB/s median':>12}{'of the bytes':>14}{'of the time':>13}{'time / bytes':>14}")
    for name, taken in seconds.items():
        share = sizes[name] / sizes[full]
        cost = statistics.median(own / whole for own, whole in zip(taken, seconds[full], strict=True))
        speed = options.batch * sizes[name] / 1e9 / statistics.median(taken)
        print(f"{name:36}{speed:12.2f}{share:14.3f}{cost:13.3f}{cost / share:14.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the store (default: the system's temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every read")
    options = parser.parse_args()
    num_rows = int(options.gigabytes * 1e9 / len(SPECS) / SPECS[0].row_bytes)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = make_store(Path(folder, "bench.zarr"), num_rows, (*SPECS, *CLS)).path
        with FeatureStore.open(path, num_threads=options.threads) as store:
            report(store, measure(store, options), options)


if __name__ == "__main__":
    main()
