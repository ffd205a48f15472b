"""How close is `vcache extract` to the slowest of its parts? Each part alone and the whole, in one run, on this machine.

    python benchmarks/extraction.py [--videos 48] [--model ViT-B-32] [--rounds 3]

Renders real H.264 videos, then times (a) decoding and preprocessing alone on all cores, (b) the forward pass alone on ready
tensors, (c) `run_extraction` from files to a committed store. Ratio = the larger of (a) and (b), over (c): 1 is the limit where
decoding and the device do not share cores; on a CPU they do, and the limit is then (a + b) / (c).
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

import torch

from vcache.extract.backbone import FrozenBackbone, load_backbone
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.decode import decode_clip
from vcache.extract.preprocess import from_open_clip_config
from vcache.pipelines.demo.render import render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        csv = render_world(Path(folder) / "world", train=args.videos, val=0)
        config = ExtractionConfig(
            dataset=str(csv),
            tsn=True,
            model=args.model,
            pretrained=None,
            random_weights=True,
            device="cpu",
            workers=cores,
        )
        backbone = load_backbone(args.model, None, random_weights=True)
        rows = measure(csv, config, backbone, Path(folder), args.rounds)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{platform.machine()}, {cores} cores, torch {torch.__version__}, {threads} threads, load {load:.1f}")
    print(
        f"{args.videos} videos of 8 frames, {args.model}, layers -4: with Q/K, float16; median of {args.rounds} (min-max)"
    )
    for name, values in rows.items():
        median = statistics.median(values)
        print(
            f"  {name:<22}{median:7.2f} s  ({min(values):.2f}-{max(values):.2f})  {args.videos / median:6.1f} videos/s"
        )
    decode, forward, whole = (statistics.median(values) for values in rows.values())
    print(f"  ratio to the slowest part {max(decode, forward) / whole:.2f}")
    print(f"  ratio to the sum of the parts, which share these cores, {(decode + forward) / whole:.2f}")


def measure(
    csv: Path, config: ExtractionConfig, backbone: FrozenBackbone, folder: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each part, interleaved round by round so that a change of load meets them all."""
    dataset = load_dataset(str(csv), root=None, splits=None)
    prepare = from_open_clip_config(backbone.preprocess_config, mode="fast")
    layers = range(backbone.facts.num_layers - 4, backbone.facts.num_layers)

    def decode() -> list[torch.Tensor]:
        with ThreadPoolExecutor(config.workers) as pool:
            paths = [dataset.root / video.path for video in dataset.videos]
            return list(pool.map(lambda path: prepare(decode_clip(path, config.sampling).frames), paths))

    clips = decode()
    batches = [torch.cat(clips[i : i + config.batch_size]) for i in range(0, len(clips), config.batch_size)]

    def forward() -> None:
        for batch in batches:
            backbone(batch, tokens=layers, qk=layers)

    rows: dict[str, list[float]] = {"decode + preprocess": [], "forward": [], "extract, end to end": []}
    forward()  # warm up
    for i in range(rounds):
        rows["decode + preprocess"].append(seconds(decode))
        rows["forward"].append(seconds(forward))
        store = folder / f"{i}.zarr"
        whole = ExtractionConfig(**{**vars(config), "store": store})
        rows["extract, end to end"].append(seconds(lambda whole=whole: run_extraction(whole)))
    return rows


if __name__ == "__main__":
    main()
