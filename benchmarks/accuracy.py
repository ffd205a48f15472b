"""What does caching cost in accuracy? EVL on the demo's motions, from features that no epoch has seen before and from stores.

    python benchmarks/accuracy.py --folder FOLDER [--groups views,stores] [--seeds 3] [--train 240] [--val 600] [--epochs 20]
                                  [--frames 4] [--layers=-2,-1] [--threads 1] [--quick] [--figure FILE.png]

    views    online: every epoch draws its own views, which go through the backbone in the loop (accuracy_online.py); against
             `--views` 1 (unaugmented), 2, 4 and 8 in a store, and against one augmented view alone. A linear head as the floor.
    stores   float32, float16, bfloat16 and int8, with Q/K, maps or derived Q/K, one unaugmented view
    pooling  pooled tokens (Table 6c of EVL). "cls" reads no patches: without T-CA, to be compared with the row above it.

EVL with all its modules at the demo's settings, but for `--frames`, `--layers` and `--epochs`. A seed decides the head's first
weights, its dropout, the order of the videos, the draw of the views and, online, the views themselves; all arms of one seed run
before the next, and arms are compared seed by seed. Views are made by DiST's recipe without its flip (RECIPE), as left and right
are part of the classes, and by TSN's random frame of each segment. Nothing is validated until the last epoch is done.

Everything is kept in the folder, each finished run as a line of results.jsonl: what was stopped goes on with the same command,
and what is there is not run again. Prints the tables of results.md; FILE.png is the figure.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from accuracy_online import KeptFrames, online  # the scripts beside this one
from accuracy_report import figure, report
from reader import machine

from vcache.extract.views import TrainingView
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.demo.render import TINY_CLIP, render_world
from vcache.pipelines.demo.run import EVL_SETTINGS, LINEAR_SETTINGS
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.presets import RECIPES, recipe
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import prepare_extraction
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.reports import EpochReport
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

RECIPE = recipe("dist", "ssv2")  # of a dataset whose left and right are part of the class: without the flip
MOST_VIEWS = 8


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    source: str = "cached"
    """"cached": `--views` of a store; "augmented": its first augmented view alone; "online"."""
    views: int = 1
    dtype: str = "float16"
    way: str = "maps"
    head: str = "evl"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """All numbers of views come from one store."""
        many = (self.dtype, self.way) == (Arm.dtype, Arm.way)
        return f"{self.dtype}-{self.way}-{MOST_VIEWS if many else 1}.zarr"


REFERENCE = Arm(name="1 view, as it is")
ONLINE = Arm(name="online", source="online")
WAYS = {"qk": "Q/K", "maps": "maps", "derive": "derive"}
WITHOUT_TCA = {"temporal_cross_attention": False}
CACHED = [replace(REFERENCE, name=f"{views} views", views=views) for views in (8, 4, 2)]
STORES = [("float32", "qk"), ("int8", "derive"), ("float16", "qk"), ("int8", "maps"), ("float16", "derive"),
          ("int8", "qk"), ("bfloat16", "qk")]  # fmt: skip
GROUPS: dict[str, list[Arm]] = {
    "views": [
        REFERENCE,
        ONLINE,
        CACHED[0],
        Arm(name="1 view, augmented", source="augmented"),
        *CACHED[1:],
        Arm(name="linear, 1 view", head="linear"),
        Arm(name=f"linear, {MOST_VIEWS} views", head="linear", views=MOST_VIEWS),
    ],
    "stores": [REFERENCE] + [Arm(name=f"{dtype}, {WAYS[way]}", dtype=dtype, way=way) for dtype, way in STORES],
    "pooling": [
        REFERENCE,
        *(Arm(name=f"pooling={kind}", settings={"pooling": kind}) for kind in ("spatial_mean", "temporal_mean")),
        Arm(name="no pooling, without T-CA", settings=WITHOUT_TCA),
        Arm(name="pooling=cls, without T-CA", settings={"pooling": "cls", **WITHOUT_TCA}),
    ],
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    layers = tuple(map(int, args.layers.split(",")))
    bench = Bench(args.folder, args.train, args.val, args.epochs, args.frames, layers)
    arms = list({arm.name: arm for group in args.groups.split(",") for arm in GROUPS[group]}.values())
    print(f"{machine()}, torch {torch.__version__} with {torch.get_num_threads()} threads", flush=True)
    with mock.patch.dict(RECIPES, motions=RECIPE):
        for seed in range(args.seeds):
            for arm in arms:
                bench.run(arm, seed)
        bench.measure_decoding()
    for group in args.groups.split(","):
        lines = {arm.name: [bench.found(arm, seed) for seed in range(args.seeds)] for arm in GROUPS[group]}
        report(group, lines, REFERENCE.name, ONLINE.name)
        if group == "views" and args.figure:
            figure(lines, args.figure, bench.settings)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="to keep everything in, and to go on from")
    parser.add_argument("--groups", default="views,stores", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=240, help="videos to train on")
    parser.add_argument("--val", type=int, default=600, help="videos to evaluate on")
    parser.add_argument("--epochs", type=int, default=EVL_SETTINGS["epochs"])
    parser.add_argument("--frames", type=int, default=4, help="of a clip; the demo has 8")
    parser.add_argument("--layers", default="-2,-1", help="that EVL reads, of the tiny CLIP's four")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed of next to nothing: does it run?")
    parser.add_argument("--figure", type=Path, help="where to draw accuracy by the number of views")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.train, args.val, args.epochs = 1, 40, 20, 2
    return args


@dataclass
class Bench:
    """A world, stores of it, and the runs that are done."""

    folder: Path
    train: int
    val: int
    epochs: int
    frames: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.csv = render_world(self.folder / f"world-{self.train}-{self.val}", train=self.train, val=self.val)
        self.stores = self.folder / f"stores-{self.train}-{self.val}-{self.frames}-{-min(self.layers)}"
        self.results = self.folder / "results.jsonl"
        self._extractors: dict[str, ClipExtractor] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the results of one command have in common."""
        sizes = {"train": self.train, "val": self.val, "epochs": self.epochs, "frames": self.frames}
        return {**sizes, "layers": list(self.layers)}

    def found(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """The result of a run, if it is there."""
        wanted = {"arm": json.loads(json.dumps(asdict(arm))), "seed": seed, **self.settings}
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        results = (json.loads(line) for line in lines)
        return next((result for result in results if wanted.items() <= result.items()), None)

    def run(self, arm: Arm, seed: int) -> None:
        """Train and evaluate, unless that is done."""
        if self.found(arm, seed) is not None:
            return
        store, out = self.extract(arm), self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)  # what was stopped
        trained = self.train_head(arm, seed, store, out)
        predictions = evaluate(out, split="val", device="cpu").predictions
        right = predictions.scores.argmax(axis=1) == predictions.target_tensor().numpy()
        result = {"top1": float(right.mean()), "right": np.packbits(right).tobytes().hex(), **trained}
        result |= {"clip_bytes": clip_bytes(store), "load": os.getloadavg()[0]}
        self.keep({"arm": asdict(arm), "seed": seed, **self.settings, **result})
        print(f"seed {seed}, {arm.name}: {right.mean():.1%}, of the last epoch {trained['train_top1']:.1%}, "
              f"load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip

    def train_head(self, arm: Arm, seed: int, store: Path, out: Path) -> dict[str, float]:
        """What the epochs came to: seconds are medians over them."""
        clock, reports = [(time.perf_counter(), time.process_time())], list[EpochReport]()

        def on_epoch(epoch: EpochReport) -> None:
            clock.append((time.perf_counter(), time.process_time()))
            reports.append(epoch)

        config = TrainingConfig(
            head=arm.head,
            store=store,
            out=out,
            settings=self.head_settings(arm),
            views=arm.views,
            seed=seed,
            data_seed=seed,
            device="cpu",
        )
        with self.fed(arm, seed):
            train_head(config, on_epoch=on_epoch)
        seconds, of_cores = np.median(np.diff(np.array(clock), axis=0), axis=0).tolist()
        return {
            "train_top1": reports[-1].train_top1,
            "epoch_seconds": seconds,
            "epoch_core_seconds": of_cores,
        }

    def keep(self, result: Mapping[str, Any]) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def head_settings(self, arm: Arm) -> dict[str, Any]:
        if arm.head == "linear":
            return {**LINEAR_SETTINGS, "epochs": min(self.epochs, LINEAR_SETTINGS["epochs"])}
        return {**EVL_SETTINGS, "epochs": self.epochs, "layers": self.layers, **arm.settings}

    def request(self, arm: Arm) -> ExtractionConfig:
        return ExtractionConfig(
            dataset=str(self.csv),
            layers=f"{min(self.layers)}:",
            frames=self.frames,
            tsn=True,
            model=f"local-dir:{TINY_CLIP}",
            pretrained=None,
            dtype=arm.dtype,
            cross_frame=arm.way,
            views=MOST_VIEWS if arm.store == REFERENCE.store else 1,
            augment="motions",
            store=self.stores / arm.store,
            device="cpu",
        )

    def extract(self, arm: Arm) -> Path:
        """The store that the arm reads, or online validates on; what is there is not extracted again."""
        if not (done := self.stores / f"{arm.store}.done").exists():
            run_extraction(self.request(arm))
            done.touch()
        return self.stores / arm.store

    @contextmanager
    def fed(self, arm: Arm, seed: int) -> Iterator[None]:
        """Within this, training takes the views of the arm and does not validate."""
        preparation = "vcache.pipelines.training.preparation"
        with ExitStack() as stack:
            stack.enter_context(mock.patch(f"{preparation}.validation_split", lambda splits: None))
            if arm.source == "augmented":
                stack.enter_context(mock.patch(f"{preparation}.training_views", lambda *of_store: (1,)))
            if arm.source == "online":
                stack.enter_context(online(self.extractor(arm), lambda epoch: fresh_view(seed, epoch)))
            yield

    def extractor(self, arm: Arm) -> ClipExtractor:
        """With the frames of all videos in memory, for all seeds."""
        if arm.store not in self._extractors:
            self._extractors[arm.store] = prepare_extraction(self.request(arm)).extractor(decode=KeptFrames())
        return self._extractors[arm.store]

    def measure_decoding(self, num_videos: int = 40) -> None:
        """Milliseconds of a core for a clip: opened and decoded, and out of the frames in memory, both with its images."""
        setup = prepare_extraction(self.request(ONLINE))
        kept, videos = setup.extractor(decode=KeptFrames()), setup.dataset.videos[:num_videos]
        for name, extractor in (("decoded", setup.extractor()), ("", kept), ("in memory", kept)):
            began = time.process_time()
            for video in videos:
                extractor.prepare(video, fresh_view(0, 0))
            if name:
                spent = 1e3 * (time.process_time() - began) / len(videos)
                print(f"prepare a clip, {name}: {spent:.1f} ms of a core", flush=True)


def fresh_view(seed: int, epoch: int) -> TrainingView:
    """As a store would define its view of that number, and none that a store or another seed has."""
    return TrainingView(seed=1 + seed, view=1 + epoch, augmentation=RECIPE)


def clip_bytes(store: Path) -> float:
    """On the disk for one view of one video, the files with checksums and indexes."""
    with FeatureStore.open(store) as opened:
        num_clips = sum(num * len(opened.views(split)) for split, num in opened.splits.items())
        return opened.size_bytes() / num_clips


if __name__ == "__main__":
    main()
