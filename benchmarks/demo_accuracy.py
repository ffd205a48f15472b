"""What does a compact store cost in accuracy? Top-1 of EVL on the demo's world from each kind of store, over several seeds.

    python benchmarks/demo_accuracy.py [--seeds 3] [--train 400] [--val 200] [--epochs 20]

Renders the world once, extracts it once for each dtype and `--cross-frame`, and trains EVL with all its modules at the demo's
settings and the paper's gain of T-CA, all stores with one seed before the next, so that a busy spell of the machine is shared.
Equal seeds see the same videos in the same batches: the difference to float16 Q/K, which is the reference, is taken seed by seed.
The last rows pool the tokens of the reference (Table 6c of EVL). "cls" reads no patches, so it goes without T-CA and is to be
compared with the row above it. Seconds of an epoch are with its validation. Prints the table of results.md; about 45 minutes on
two quiet cores.
"""

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vcache.pipelines.demo.render import TINY_CLIP, render_world
from vcache.pipelines.demo.run import EVL_SETTINGS
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.reports import EpochReport
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

STORES = [(dtype, way) for dtype in ("float16", "int8") for way in ("qk", "maps", "derive")] + [("bfloat16", "qk")]
WAYS = {"qk": "Q/K", "maps": "maps", "derive": "derive"}
WITHOUT_TCA = {"temporal_cross_attention": False}


@dataclass
class Row:
    """A kind of store or a setting, and what its runs came to."""

    label: str
    store: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    megabytes: float = 0.0
    """Of one video, the files with checksums and indexes."""
    top1: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each epoch of each run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=EVL_SETTINGS["epochs"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csv = render_world(folder / "world", train=args.train, val=args.val)
        stores = {kind: folder / f"{'-'.join(kind)}.zarr" for kind in STORES}
        rows = make_rows(stores)
        megabytes = {path: extract(csv, path, *kind) for kind, path in stores.items()}
        for seed in range(args.seeds):
            for i, row in enumerate(rows):
                row.megabytes = megabytes[row.store]
                train(row, folder / f"run-{i}-{seed}", seed, args.epochs)
                load = f"load {os.getloadavg()[0]:.1f}"
                print(f"seed {seed}, {row.label}: {row.top1[-1]:.1%}, {load}", flush=True)
        report(rows, args.train, args.val, args.epochs)


def make_rows(stores: Mapping[tuple[str, str], Path]) -> list[Row]:
    """The reference first."""
    reference = stores["float16", "qk"]
    rows = [Row(f"{dtype}, {WAYS[way]}", path) for (dtype, way), path in stores.items()]
    rows += [Row(f"pooling={kind}", reference, {"pooling": kind}) for kind in ("spatial_mean", "temporal_mean")]
    rows.append(Row("no pooling, without T-CA", reference, WITHOUT_TCA))
    rows.append(Row("pooling=cls, without T-CA", reference, {"pooling": "cls", **WITHOUT_TCA}))
    return rows


def extract(csv: Path, store: Path, dtype: str, way: str) -> float:
    """MB on the disk for one video."""
    config = ExtractionConfig(
        dataset=str(csv),
        layers="-4:",
        tsn=True,
        model=f"local-dir:{TINY_CLIP}",
        pretrained=None,
        dtype=dtype,
        cross_frame=way,
        store=store,
    )
    run_extraction(config)
    with FeatureStore.open(store) as opened:
        return opened.size_bytes() / sum(opened.manifest.splits.values()) / 1e6


def train(row: Row, out: Path, seed: int, epochs: int) -> None:
    reports: list[EpochReport] = []
    settings = {**EVL_SETTINGS, "epochs": epochs, **row.settings}
    train_head(
        TrainingConfig(head="evl", store=row.store, out=out, settings=settings, seed=seed), on_epoch=reports.append
    )
    assert reports[-1].val_top1 is not None
    row.top1.append(reports[-1].val_top1)
    row.seconds += [report.seconds for report in reports]


def report(rows: list[Row], num_train: int, num_val: int, epochs: int) -> None:
    reference = rows[0]
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n"
        f"{num_train} videos to train on, {num_val} to validate on, {epochs} epochs; top-1 and its differences in percent\n\n"
        f"| store | MB a video | of {reference.label} | top-1 by seed | mean ± deviation | minus {reference.label}, by seed "
        "| s an epoch, median (min-max) |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        top1 = [100 * value for value in row.top1]
        minus = [100 * (a - b) for a, b in zip(row.top1, reference.top1, strict=True)]
        spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        cells = [
            row.label,
            f"{row.megabytes:.3f}",
            f"{row.megabytes / reference.megabytes:.2f}",
            ", ".join(f"{value:.1f}" for value in top1),
            f"{statistics.fmean(top1):.1f}{spread}",
            "" if row is reference else ", ".join(f"{value:+.1f}" for value in minus),
            f"{statistics.median(row.seconds):.2f} ({min(row.seconds):.2f}-{max(row.seconds):.2f})",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
