"""What do stored maps, and Q/K derived on the device, save against stored Q/K? Bytes of a video and seconds of an epoch of EVL.

    python benchmarks/cross_frame.py [--videos 160] [--rounds 3]

Extracts the demo's world with the packaged tiny CLIP, with `--cross-frame qk`, `maps` and `derive`, and trains EVL with all its
modules on each, round by round in turn. The limit of an epoch is the one without cross-frame attention at all.
"""

import argparse
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from vcache.pipelines.demo.render import TINY_CLIP, render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.reports import EpochReport
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csv = render_world(folder / "world", train=args.videos, val=10)
        stores = {kind: extract(csv, folder / f"{kind}.zarr", kind) for kind in ("qk", "maps", "derive")}
        variants: dict[str, tuple[Path, dict[str, Any]]] = {
            "no T-CA: the limit": (stores["qk"], {"temporal_cross_attention": False}),
            "T-CA from Q/K": (stores["qk"], {}),
            "T-CA from maps": (stores["maps"], {}),
            "T-CA, Q/K derived": (stores["derive"], {}),
        }
        epochs: dict[str, list[EpochReport]] = {label: [] for label in variants}
        for i in range(args.rounds):
            for label, (store, settings) in variants.items():
                epochs[label] += train(store, folder / f"run-{label}-{i}".replace("/", "-"), settings)
        report(args.videos, stores, epochs)


def extract(csv: Path, store: Path, cross_frame: str) -> Path:
    run_extraction(
        ExtractionConfig(
            dataset=str(csv),
            tsn=True,
            model=f"local-dir:{TINY_CLIP}",
            pretrained=None,
            cross_frame=cross_frame,
            store=store,
        )
    )
    return store


def train(store: Path, out: Path, settings: dict[str, Any]) -> list[EpochReport]:
    """One epoch; a run warms nothing up for the next."""
    reports: list[EpochReport] = []
    config = TrainingConfig(head="evl", store=store, out=out, settings={"epochs": 1, "batch_size": 16, **settings})
    train_head(config, on_epoch=reports.append)
    return reports


def report(num_videos: int, stores: dict[str, Path], epochs: dict[str, list[EpochReport]]) -> None:
    for kind, path in stores.items():
        with FeatureStore.open(path) as store:
            print(f"  {kind:<6}{store.size_bytes() / sum(store.manifest.splits.values()) / 1e3:8.0f} kB a video")
    limit = statistics.median(epoch.seconds for epoch in next(iter(epochs.values())))
    print(
        f"epoch of {num_videos} videos, median of {len(next(iter(epochs.values())))} (min-max), ratio of the limit, last loss"
    )
    for label, done in epochs.items():
        seconds = [epoch.seconds for epoch in done]
        median, spread = statistics.median(seconds), f"({min(seconds):.2f}-{max(seconds):.2f})"
        print(f"  {label:<20}{median:6.2f} s  {spread}  {limit / median:5.2f}  {done[-1].train_loss:.7f}")


if __name__ == "__main__":
    main()
