"""Does a text head train from a dataset of embeddings at the speed of compute, and from what would an ordinary DataLoader train?

    python benchmarks/embeddings.py [--videos 260000] [--steps 20] [--rounds 3] [--store FOLDER]

A store of noise of the size of Kinetics-400, 260k clips of 8 frames x 512 channels in float16 (2.1 GB), made once: with
--store it is kept, and used again. Text4Vis on it, in batches of 256, AdamW included: T-Trans of 6 blocks, and TAP, whose step
is so small that all else shows.

    the limit      the same steps on batches that are in memory already
    vcache         the batches of an epoch as `vcache train-head` reads them: kept in memory (what it does by itself where they
                   take less than half of what is free), and from disk
    DataLoader     torch's, on a Dataset that reads one clip with zarr-python, with two workers; and on one numpy array in memory

Each is given as a share of the limit, and without a head as clips a second, whose limit is `numpy.take` of the same rows into
memory that is there. All contestants in turns. A round takes `--steps` batches of T-Trans and twenty times as many of TAP.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
import zarr
from noise import NUM_CLASSES, noise_store  # the scripts beside this one
from reader import machine
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vcache.heads.requirements import ClipFeatures
from vcache.heads.text import ClassText
from vcache.heads.text4vis import Text4Vis
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.training.mixed_precision import MixedPrecision
from vcache.pipelines.training.step import TrainingStep
from vcache.store.reader import FeatureStore

CPU = torch.device("cpu")
BATCH = 256
PLAN = ReadPlan(tokens={}, cls={}, maps={}, embed=True)
HEADS = {"t_trans": 1, "tap": 20}
"""Steps of each, in multiples of --steps."""
WORKERS = 2

Batches = Iterable[tuple[Tensor, Tensor]]
"""Embeddings (B, T, E) and labels."""


class ZarrClips(Dataset[tuple[Any, int]]):
    """One clip at a time, as one would write it; the array is opened in each worker."""

    def __init__(self, folder: Path, num_videos: int) -> None:
        self.folder, self.num_videos, self.array = folder, num_videos, None

    def __len__(self) -> int:
        return self.num_videos

    def __getitem__(self, row: int) -> tuple[Any, int]:
        if self.array is None:
            self.array = zarr.open_array(str(self.folder), mode="r")
        return np.asarray(self.array[row]), row % NUM_CLASSES


class MemoryClips(Dataset[tuple[Any, int]]):
    def __init__(self, clips: np.ndarray) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.clips[row], row % NUM_CLASSES


class Contest:
    """The contestants on one store."""

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.epochs = store, 0
        self.disk = ClipLoader(store, "train", PLAN, batch_size=BATCH, device=CPU)
        self.memory = ClipLoader(store, "train", PLAN, batch_size=BATCH, device=CPU)
        began = time.perf_counter()
        self.memory.keep("ram")
        self.loading = time.perf_counter() - began
        self.kept = np.concatenate([x.numpy() for x, _ in self.of_vcache(self.memory, in_order=True)])

    def sources(self, number: int) -> dict[str, Callable[[], Batches]]:
        """Each gives at least so many batches, of an epoch in an order of its own."""
        self.epochs += 1
        first = list(islice(self.of_vcache(self.memory), min(number, 64)))
        return {
            "batches in memory already": lambda: (first[i % len(first)] for i in range(number)),
            "vcache, kept in memory": lambda: self.of_vcache(self.memory),
            "vcache, from disk": lambda: self.of_vcache(self.disk),
            "DataLoader, zarr, 2 workers": lambda: self.of_torch(ZarrClips(self.array, len(self.kept))),
            "DataLoader, numpy in memory": lambda: self.of_torch(MemoryClips(self.kept), workers=0),
        }

    @property
    def array(self) -> Path:
        return Path(str(self.store.path)) / "train" / "view-0" / "embed"

    def of_vcache(self, loader: ClipLoader, *, in_order: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader.in_order() if in_order else loader.epoch(self.epochs):
            features = batch.features()
            assert features.embed is not None
            yield features.embed, batch.targets

    def of_torch(self, clips: Dataset[tuple[Any, int]], workers: int = WORKERS) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.epochs)
        yield from DataLoader(clips, batch_size=BATCH, shuffle=True, num_workers=workers, generator=generator)

    def copied(self, number: int) -> float:
        """Clips a second of the least that has to be done: rows of an array to another."""
        rows = np.random.default_rng(self.epochs).permutation(len(self.kept))
        out = np.empty((BATCH, *self.kept.shape[1:]), self.kept.dtype)
        began = time.perf_counter()
        for i in range(number):
            np.take(self.kept, rows[i * BATCH : (i + 1) * BATCH], axis=0, out=out, mode="clip")
        return number * BATCH / (time.perf_counter() - began)


def learner(temporal: str) -> TrainingStep:
    torch.manual_seed(0)
    head = Text4Vis(Text4Vis.Config(num_classes=NUM_CLASSES, temporal=temporal)).train()
    head.set_text(ClassText(torch.randn(NUM_CLASSES, 1, 512), 4.6))
    return TrainingStep(
        head, head.recipe, MixedPrecision(name="float32", device=CPU), num_steps=10**6, steps_per_epoch=10**4
    )


def rate(batches: Batches, number: int, step: Callable[[Tensor, Tensor], object]) -> float:
    """Clips a second over `number` batches after the first, which starts processes and allocates."""
    source = iter(batches)
    step(*next(source))
    began, clips = time.perf_counter(), 0
    for embeddings, labels in islice(source, number):
        step(embeddings, labels)
        clips += len(labels)
    seconds = time.perf_counter() - began
    del source
    return clips / seconds


def measure(contest: Contest, num_steps: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    learners = {temporal: learner(temporal) for temporal in HEADS}
    for _ in range(rounds):
        for temporal, factor in HEADS.items():
            number = min(num_steps * factor, len(contest.memory) - 2)
            train = learners[temporal]
            for name, source in contest.sources(number + 1).items():
                clips = rate(source(), number, lambda x, y, train=train: train(ClipFeatures(embed=x), y, 0))
                found.setdefault(temporal, {}).setdefault(name, []).append(clips)
        number = min(num_steps * max(HEADS.values()), len(contest.memory) - 2)
        alone = found.setdefault("no head", {})
        alone.setdefault("numpy.take of the rows", []).append(contest.copied(number))
        for name, source in list(contest.sources(number + 1).items())[1:]:
            alone.setdefault(name, []).append(rate(source(), number, lambda x, y: None))
    return found


def report(found: dict[str, dict[str, list[float]]]) -> None:
    for what, rates in found.items():
        print(f"\n{what}")
        limit = statistics.median(next(iter(rates.values())))
        for name, of_name in rates.items():
            median = statistics.median(of_name)
            spread = f"({min(of_name):,.0f}-{max(of_name):,.0f})"
            print(f"  {name:<30}{median:>12,.0f} clips/s {spread:<24} {median / limit:6.3f} of the limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=260_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=Path, help="Keep the store here, and use it if it is there.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = args.store or Path(name) / "noise.zarr"
        if not path.exists():
            noise_store(path, ["embed"], args.videos)
        with FeatureStore.open(path) as store:
            contest = Contest(store)
            print(f"{machine()}, {torch.get_num_threads()} threads, batches of {BATCH}, load {os.getloadavg()[0]:.1f}")
            size = contest.memory.needed_bytes
            print(f"{len(contest.kept):,} clips, {size / 1e9:.2f} GB, read into memory in {contest.loading:.1f} s "
                  f"({size / 1e9 / contest.loading:.2f} GB/s)")  # fmt: skip
            found = measure(contest, args.steps, args.rounds)
    report(found)
    for temporal in HEADS:
        clips = statistics.median(found[temporal]["vcache, kept in memory"])
        print(f"an epoch of {args.videos:,} clips, {temporal}: {args.videos / clips / 60:.1f} min")


if __name__ == "__main__":
    main()
