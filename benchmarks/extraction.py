"""How close is `vcache extract` to the slowest of its parts? Each part alone and the whole, in one run, on this machine.

    python benchmarks/extraction.py [--videos 48] [--model ViT-B-32] [--rounds 3] [--clips FOLDER] [--limits abc]

Rendered H.264 videos, or with --clips copies of the videos in a folder. Three limits, each with the others out of the way:

    (a) the backbone, on the CPU: decoding shares its cores, so that the limit is the sum of the parts; the forward pass alone is
        shown, too.
    (b) decoding, before a simulated accelerator: a forward pass that sleeps for half of the time that decoding takes.
    (c) the disk: a writer that is throttled to half of the speed of the stages before it.

Parts alone: decoding and preprocessing in threads; the forward pass with encoding, on ready clips; writing and committing, of
ready rows. The whole is timed from the first video to the last commit, without loading the model. Beside it the way of
clip-video-encode's main loop, restated: a video is decoded, goes through the backbone, is saved, and then comes the next.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from clip_copies import copies

from vcache.extract.views import PreparedClip
from vcache.pipelines.batches import ClipExtractor, EncodedBatch, RowArrays
from vcache.pipelines.demo.render import render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.progress import ExtractionProgress
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import prepare_extraction
from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--clips", type=Path, help="Take the .mp4 of this folder in turns, in place of rendered videos."
    )
    parser.add_argument("--limits", default="abc", help="Which of the three to measure.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csv = copies(folder, args.clips, args.videos) if args.clips else render_world(folder, train=args.videos, val=0)
        bench = Bench(folder, make_config(csv, args.model), args.limits)
        for _ in range(args.rounds):
            bench.round()
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
        print(f"{args.videos} videos ({args.clips.name if args.clips else 'rendered'}) of 8 frames, {args.model}, layers -4: "
              f"with Q/K, float16; median of {args.rounds} (min-max)")  # fmt: skip
        bench.report(args.videos)


def make_config(csv: Path, model: str) -> ExtractionConfig:
    return ExtractionConfig(
        dataset=str(csv),
        tsn=True,
        model=model,
        pretrained=None,
        random_weights=True,
        device="cpu",
        decode_workers=os.cpu_count() or 1,
    )


@dataclass
class Bench:
    """The parts and the wholes of one dataset and model, timed in turns so that a change of load meets them all."""

    folder: Path
    config: ExtractionConfig
    limits_wanted: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """Processor time of all threads and of the processes that have ended."""
    limits: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.setup = prepare_extraction(self.config).in_store(None)
        backbone = self.setup.backbone
        mock.patch("vcache.pipelines.setup.load_backbone", lambda *args, **options: backbone).start()
        self.extractor = self.setup.extractor()
        self.clips = self.decode()
        self.rows = [row for batch in self.batches() for row in self.extractor.forward(batch, self.setup.arrays)]
        self.num_stores = 0

    def round(self) -> None:
        self.time("decode", self.decode)
        self.write("write")
        if "a" in self.limits_wanted:
            self.time("forward", self.forward)
            self.time("naive loop", self.naive)
            self.whole("(a) whole")
        decode, write = statistics.median(self.seconds["decode"]), statistics.median(self.seconds["write"])
        if "b" in self.limits_wanted:
            with sleeping_forward(decode / 2 / len(list(self.batches())), self.rows[0]):
                self.whole("(b) whole, simulated accelerator")
        slowed = 2 * max(decode, write) / len(self.clips)
        if "c" in self.limits_wanted:
            with throttled(slowed), sleeping_forward(0, self.rows[0]):
                self.write("(c) write, slow disk")
                self.whole("(c) whole, slow disk")

    def time(self, name: str, work: Callable[[], object]) -> None:
        began, cpu = time.perf_counter(), processor_seconds()
        work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        self.cpu.setdefault(name, []).append(processor_seconds() - cpu)

    def batches(self) -> Iterator[list[PreparedClip]]:
        for start in range(0, len(self.clips), self.extractor.batch_size):
            yield self.clips[start : start + self.extractor.batch_size]

    def decode(self) -> list[PreparedClip]:
        with ThreadPoolExecutor(self.config.decode_workers) as pool:
            return list(pool.map(self.extractor.prepare, self.setup.dataset.videos))

    def forward(self) -> None:
        for batch in self.batches():
            self.extractor.forward(batch, self.setup.arrays)

    def new_store(self) -> Path:
        self.num_stores += 1
        shutil.rmtree(self.folder / f"{self.num_stores - 1}.zarr", ignore_errors=True)
        return self.folder / f"{self.num_stores}.zarr"

    def write(self, name: str) -> None:
        """The rows of all videos, ready, through the same writer."""
        with mock.patch("vcache.pipelines.extraction.run_jobs"):  # leaves an empty store
            path = run_extraction(replace(self.config, store=self.new_store())).store
        self.time(name, lambda: self.write_rows(path))

    def write_rows(self, path: str) -> None:
        with FeatureStore.open(path) as store:
            (part,) = store.parts("train")
            for shard in range(store.num_shards(part)):
                with ShardWriter(store, part, shard, self.setup.arrays) as writer:
                    for row in store.shard_rows(part, shard):
                        writer.write(row, self.rows[row])

    def naive(self) -> None:
        """One video after the other, nothing beside it."""
        for number, video in enumerate(self.setup.dataset.videos):
            (row,) = self.extractor.forward([self.extractor.prepare(video)], self.setup.arrays)
            for name, array in row.items():
                np.save(self.folder / f"{number}-{name.replace('/', '-')}.npy", array)

    def whole(self, name: str) -> None:
        began: list[tuple[float, float]] = []

        def on_progress(progress: ExtractionProgress) -> None:
            began.append((time.perf_counter(), processor_seconds()))

        summary = run_extraction(replace(self.config, store=self.new_store()), on_progress)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began[0][0])
        self.cpu.setdefault(name, []).append(processor_seconds() - began[0][1])
        self.limits[name] = summary.progress.limits

    def report(self, num_videos: int) -> None:
        median = {name: statistics.median(values) for name, values in self.seconds.items()}
        for name, values in self.seconds.items():
            spread = f"({min(values):.2f}-{max(values):.2f})"
            cores = f"{statistics.median(self.cpu[name]):6.2f} s of cores"
            shares = "  ".join(f"{stage} {share:.0%}" for stage, share in self.limits.get(name, {}).items())
            rate = f"{num_videos / median[name]:7.1f} videos/s"
            print(f"  {name:<34}{median[name]:7.2f} s  {spread:<15}{cores}{rate}  {shares}")
        cpu = {name: statistics.median(values) for name, values in self.cpu.items()}
        ratios: dict[str, float] = {}
        if "a" in self.limits_wanted:
            whole, parts = median["(a) whole"], ("decode", "forward", "write")
            ratios |= {
                "(a) to the sum of the parts, in processor time": sum(cpu[p] for p in parts) / cpu["(a) whole"],
                "(a) to the sum of the parts, which share these cores": sum(median[p] for p in parts) / whole,
                "(a) to the forward pass alone": median["forward"] / whole,
                "(a) to the naive loop, times as fast": median["naive loop"] / whole,
            }
        if "b" in self.limits_wanted:
            ratios["(b) to decoding alone"] = median["decode"] / median["(b) whole, simulated accelerator"]
        if "c" in self.limits_wanted:
            ratios["(c) to writing alone"] = median["(c) write, slow disk"] / median["(c) whole, slow disk"]
        for name, ratio in ratios.items():
            print(f"  {name:<54}{ratio:5.2f}")


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def sleeping_forward(seconds: float, row: RowArrays) -> Iterator[None]:
    """Batches take this long, and no processor: the features of one row for all."""

    def start(self: ClipExtractor, slots: list[PreparedClip | None], arrays: tuple[ArraySpec, ...]) -> EncodedBatch:
        time.sleep(seconds)
        names = {spec.name for spec in arrays}
        same = {name: torch.from_numpy(row[name]) for name in names if name not in ("frame_index", "crop", "flip")}
        expanded = {name: array.expand(len(slots), *array.shape) for name, array in same.items()}
        return EncodedBatch(tuple(slots), frozenset(names), expanded)

    with mock.patch.object(ClipExtractor, "start", start):
        yield


@contextmanager
def throttled(seconds: float) -> Iterator[None]:
    """Each row takes this long to write, above what it takes."""
    write = ShardWriter.write

    def slow(self: ShardWriter, row: int, arrays: RowArrays, **options: object) -> None:
        time.sleep(seconds)
        write(self, row, arrays, **options)

    with mock.patch.object(ShardWriter, "write", slow):
        yield


if __name__ == "__main__":
    main()
