"""What does an epoch of training take from a store, and with the backbone in the loop? The same head, batches, order and seed.

    python benchmarks/training.py [--models ViT-B-32,ViT-B-16] [--videos 32,16] [--batch-size 8] [--rounds 2] [--clips FOLDER]

EVL on the last four layers, with all modules and without T-CA; random weights; rendered H.264 videos, or with --clips copies of
the videos in a folder.

    (a) cached: the loop of `vcache train-head`, from float16 stores with Q/K, maps or derived Q/K, and from int8 with derived
        Q/K, in the page cache. One epoch to warm up, the next is timed. Then where its time goes, and the floor: the same
        steps on batches that are in memory already.
    (b) online, decode excluded: prepared frames in memory, the frozen forward pass in float32 with its taps, the same step.
        Both heads train on one forward pass; each is counted as if it had been alone, with maps where it reads them.
    (c) online: (b) of the head with all modules, while decode processes prepare the next batches, two ahead.

Of the first epoch every loss must agree with that of (b), but for what the store's dtype loses: the run fails if not.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from clip_copies import copies
from torch import Tensor
from training_parts import Remembered, Spent, measured_parts

from vcache.extract.views import PreparedClip
from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.decoding import new_decoder
from vcache.pipelines.demo.render import render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.matching import build_head_config, match
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import prepare_extraction
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.mixed_precision import MixedPrecision
from vcache.pipelines.training.reports import EpochReport
from vcache.pipelines.training.step import TrainingStep
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

CPU = torch.device("cpu")
LAYERS = (8, 9, 10, 11)
TAPS = [f"{kind}/{layer}" for kind in ("tokens", "q", "k") for layer in LAYERS]
ALSO_STORED = [*(f"{kind}/{layer}" for kind in ("cls", "maps") for layer in LAYERS), "tokens/7", "embed"]
STORES = {
    "maps": ("float16", 1e-4),
    "qk": ("float16", 1e-4),
    "derive": ("float16", 1e-4),
    "derive-int8": ("int8", 5e-4),
}
"""dtype, and how far from the online one the first epoch's mean loss may be, relative to it. Without T-CA it is 2e-4 away."""
HEADS: dict[str, dict[str, Any]] = {"all modules": {}, "without T-CA": {"temporal_cross_attention": False}}
SETTINGS = {"schedule": "constant", "lr": 1e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-B-32,ViT-B-16")
    parser.add_argument("--videos", default="32,16", help="For each model.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clips", type=Path, help="The .mp4 of this folder in turns, in place of rendered videos.")
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"
    )
    for model, num_videos in zip(args.models.split(","), map(int, args.videos.split(",")), strict=True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            csv = (
                copies(folder, args.clips, num_videos) if args.clips else render_world(folder, train=num_videos, val=0)
            )
            bench = Bench(folder, csv, model, args.batch_size)
            for _ in range(args.rounds):
                bench.round()
            what = f"{num_videos} videos ({args.clips.name if args.clips else 'rendered'}) of 8 frames"
            print(f"\n{model}, {what}, batches of {args.batch_size}, median of {args.rounds} (min-max), "
                  f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
            bench.report(num_videos)


class Learner:
    """A head that trains beside others, with random numbers of its own."""

    def __init__(self, settings: Mapping[str, Any], store: FeatureStore) -> None:
        torch.manual_seed(0)
        self.head = get_head("evl")(build_head_config("evl", dict(settings), store.manifest))
        recipe = replace(self.head.recipe, **SETTINGS)
        precision = MixedPrecision(name="float32", device=CPU)
        self.step = TrainingStep(
            self.head.train(), recipe, precision, num_steps=1, steps_per_epoch=1
        )  # a constant rate
        self.random, self.losses, self.spent = torch.get_rng_state(), list[tuple[float, int]](), Spent()

    def __call__(self, features: ClipFeatures, labels: Tensor) -> None:
        torch.set_rng_state(self.random)
        with self.spent:
            self.losses.append((self.step(features, labels, 0).loss.item() / len(labels), len(labels)))
        self.random = torch.get_rng_state()

    @property
    def mean_loss(self) -> float:
        """Over the clips of the epoch, as an EpochReport has it."""
        return sum(loss * num_clips for loss, num_clips in self.losses) / sum(num_clips for _, num_clips in self.losses)


@dataclass
class Bench:
    """One model: its stores, its prepared clips, and what each way took, in turns so that a change of load meets them all."""

    folder: Path
    csv: Path
    model: str
    batch_size: int
    spent: dict[str, list[Spent]] = field(default_factory=dict)
    parts: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Where the time of the cached epochs went."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of the first epoch, the mean."""
    num_runs: int = 0

    def __post_init__(self) -> None:
        self.setup = prepare_extraction(self.config("maps"))
        self.extractor = self.setup.extractor()
        self.clips = self.decode()
        backbone, remembered = self.setup.backbone, Remembered(self.extractor.features, [*TAPS, *ALSO_STORED])
        with (
            mock.patch("vcache.pipelines.setup.load_backbone", lambda *args, **options: backbone),
            mock.patch.object(ClipExtractor, "features", remembered),
        ):
            self.stores = {kind: Path(run_extraction(self.config(kind)).store) for kind in STORES}

    def config(self, kind: str) -> ExtractionConfig:
        return ExtractionConfig(
            dataset=str(self.csv),
            tsn=True,
            model=self.model,
            pretrained=None,
            random_weights=True,
            cross_frame=kind.removesuffix("-int8"),
            dtype=STORES[kind][0],
            store=self.folder / f"{kind}.zarr",
            device="cpu",
        )

    def round(self) -> None:
        with self.time("decode and preprocess alone"):
            self.decode()
        for kind in STORES:
            self.cached(kind, "all modules")
        self.cached("maps", "without T-CA")
        for head in HEADS:
            self.in_memory(head)
        self.online()
        self.online_with_decode()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        spent = Spent()
        with spent:
            yield
        self.spent.setdefault(name, []).append(spent)

    def decode(self) -> list[PreparedClip]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(self.extractor.prepare, self.setup.dataset.videos))

    def cached(self, kind: str, head: str) -> None:
        """(a), and the parts of the timed epoch."""
        name, reports = f"(a) cached, {kind}, {head}", list[EpochReport]()
        ends = [time.process_time()]
        settings = {"epochs": 2, "batch_size": self.batch_size, **SETTINGS, **HEADS[head]}
        self.num_runs += 1
        config = TrainingConfig(
            head="evl",
            store=self.stores[kind],
            out=self.folder / f"run-{self.num_runs}",
            settings=settings,
            device="cpu",
            precision="float32",
            resident="disk",
        )

        def on_epoch(report: EpochReport) -> None:
            reports.append(report)
            ends.append(time.process_time())
            if len(reports) == 1:
                parts.clear()

        with measured_parts() as parts:
            train_head(config, on_epoch=on_epoch)
        self.spent.setdefault(name, []).append(Spent(reports[1].seconds, ends[2] - ends[1]))
        self.parts.setdefault(name, []).append({**parts, "rest": reports[1].seconds - sum(parts.values())})
        self.losses[name] = reports[0].train_loss

    def in_memory(self, head: str) -> None:
        """The floor of (a): an epoch of the same steps, on batches that were read before."""
        with FeatureStore.open(self.stores["maps"]) as store:
            learner = Learner(HEADS[head], store)
            plan = match("evl", learner.head.requires(learner.head.config), store, ["train"])
            loader = ClipLoader(store, "train", plan, batch_size=self.batch_size, device=CPU)
            batches: list[Batch] = list(loader.epoch(0))
        learner(batches[0].features(), batches[0].targets)  # allocates the optimiser's state
        learner.spent = Spent()
        for batch in batches:
            learner(batch.features(), batch.targets)
        self.spent.setdefault(f"head alone, in memory, {head}", []).append(learner.spent)

    def online(self) -> None:
        """(b) of both heads, on one forward pass; the maps are the one's alone."""
        forward, maps = Spent(), Spent()
        with FeatureStore.open(self.stores["maps"]) as store:
            learners = {head: Learner(settings, store) for head, settings in HEADS.items()}
            for rows, labels in self.order(store):
                with forward:
                    taps = self.forward([self.clips[row] for row in rows])
                with maps:
                    features = self.features(taps)
                for learner in learners.values():
                    learner(features, labels)
        self.spent.setdefault("forward pass alone", []).append(forward)
        for head, learner in learners.items():
            name = f"(b) online, decode excluded, {head}"
            self.spent.setdefault(name, []).append(forward + learner.spent + (Spent() if HEADS[head] else maps))
            self.losses[name] = learner.mean_loss

    def online_with_decode(self) -> None:
        """(c): two batches are being decoded and prepared while one is computed."""
        name, decoder = "(c) online, decode beside it, all modules", new_decoder(2)
        extractor, videos = self.setup.extractor(decode=decoder.decode), self.setup.dataset.videos
        with FeatureStore.open(self.stores["maps"]) as store, ThreadPoolExecutor(2) as pool:
            list(pool.map(extractor.prepare, videos[:2]))  # starts the processes
            learner, order = Learner({}, store), list(self.order(store))
            with self.time(name):
                ahead = [[pool.submit(extractor.prepare, videos[row]) for row in rows] for rows, _ in order[:2]]
                for i, (_, labels) in enumerate(order):
                    clips = [future.result() for future in ahead[i]]
                    if i + 2 < len(order):
                        ahead.append([pool.submit(extractor.prepare, videos[row]) for row in order[i + 2][0]])
                    learner(self.features(self.forward(clips)), labels)
        decoder.close()
        self.spent[name][-1].cpu += statistics.median(s.cpu for s in self.spent["decode and preprocess alone"])
        self.losses[name] = learner.mean_loss

    def order(self, store: FeatureStore) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Rows and labels of the batches of epoch 0, as the loader shuffles them."""
        rows, labels = np.random.default_rng([0, 0]).permutation(len(self.clips)), store.videos("train").labels
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            yield batch, torch.from_numpy(labels[batch])

    def forward(self, clips: list[PreparedClip]) -> dict[str, Tensor]:
        """The frozen forward pass with its taps, clip by clip."""
        made = self.extractor.features(clips, TAPS)
        return {name: x.unflatten(0, (len(clips), -1)) for name, x in made.items()}

    def features(self, taps: Mapping[str, Tensor]) -> ClipFeatures:
        """Of the head with all modules."""
        return ClipFeatures(
            tokens={layer - 12: taps[f"tokens/{layer}"] for layer in LAYERS},
            maps={layer - 12: cross_frame_maps(taps[f"q/{layer}"], taps[f"k/{layer}"]) for layer in LAYERS},
        )

    def report(self, num_videos: int) -> None:
        median = {name: statistics.median(s.seconds for s in spent) for name, spent in self.spent.items()}
        cpu = {name: statistics.median(s.cpu for s in spent) for name, spent in self.spent.items()}
        for name in sorted(self.spent, key=lambda name: (name.startswith("("), name)):
            seconds = [s.seconds for s in self.spent[name]]
            spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
            row = f"  {name:<44}{median[name]:7.2f} s {spread:<15}{1e3 * median[name] / num_videos:8.1f} ms a clip"
            row += f"{cpu[name]:8.2f} s of cores"
            print(row + (f"   mean loss {self.losses[name]:.5f}" if name in self.losses else ""))
        for head in HEADS:
            online = f"(b) online, decode excluded, {head}"
            for name in (name for name in self.parts if name.endswith(head)):
                self.check_losses(name, online)
                ratio = f"{median[online] / median[name]:5.1f} times, {cpu[online] / cpu[name]:5.1f} in time of cores"
                floor = median[f"head alone, in memory, {head}"] / median[name]
                print(f"  (b) / {name:<40}{ratio}   floor / cached {floor:.2f}")
        name, decoded = "(a) cached, maps, all modules", "(c) online, decode beside it, all modules"
        ratio = f"{median[decoded] / median[name]:5.1f} times, {cpu[decoded] / cpu[name]:5.1f} in time of cores"
        print(f"  (c) / {name:<40}{ratio}")
        for name, rounds in self.parts.items():
            shares = {part: statistics.median(parts[part] for parts in rounds) / median[name] for part in rounds[0]}
            print(f"  of {name:<42}" + "  ".join(f"{part} {share:.0%}" for part, share in shares.items()))

    def check_losses(self, cached: str, online: str) -> None:
        bound = next(bound for kind, (_, bound) in STORES.items() if f", {kind}, " in cached)
        a, b = self.losses[cached], self.losses[online]
        if not abs(a - b) <= bound * b:
            raise SystemExit(f"{cached}: the loss is {a}, online {b}: not the same training")


if __name__ == "__main__":
    main()
