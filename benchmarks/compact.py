"""How small is a store in each dtype and with each way to cross-frame attention, and what is lost? Bytes and errors, in one run.

    python benchmarks/compact.py [--videos 60] [--large-videos 5] [--dtypes float16,bfloat16,int8]

Extracts the demo's world with the packaged tiny CLIP, and a few of its videos with ViT-B/16 of random weights, once per dtype and
`--cross-frame`. Bytes per video are those of the files, next to the arithmetic of the arrays; the gap is checksums and indexes.
Random weights have no outlier channels, as CLIP's have: for these, tokens of that ViT are standardised and get log-normal channel
scales, Student-t biases and eight channels 50 to 100 times the others; int8 is compared with the same without channel statistics.
Last: the time to make float32 of int8 tokens on the CPU; the limit is to make it of float16, which no reading can avoid.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vcache.pipelines.demo.render import TINY_CLIP, render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.precision import dequantised, encoded
from vcache.pipelines.precision_error import ErrorSums
from vcache.pipelines.request import ExtractionConfig
from vcache.store.layout import ArraySpec
from vcache.store.quantise import ChannelMoments
from vcache.store.reader import FeatureStore

WAYS = ("qk", "maps", "derive", "none")
TINY: dict[str, Any] = {"model": f"local-dir:{TINY_CLIP}", "pretrained": None}
LARGE: dict[str, Any] = {"model": "ViT-B-16-quickgelu", "pretrained": None, "random_weights": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--large-videos", type=int, default=5)
    parser.add_argument("--dtypes", default="float16,bfloat16,int8")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        for title, model, videos in (("tiny CLIP", TINY, options.videos), ("ViT-B/16", LARGE, options.large_videos)):
            folder = Path(name, title.replace("/", "-"))
            csv = render_world(folder / "world", train=videos, val=0)
            print(f"{title}, {videos} videos of 8 frames, --layers -4:")
            for dtype in options.dtypes.split(","):
                for way in WAYS:
                    compare(extract(csv, folder / "s.zarr", dtype, way, model), dtype, way)
            tokens = exact_tokens(csv, folder / "exact.zarr", model) if model is LARGE else None
    if tokens is not None:
        outlier_channels(tokens)
        dequantise_speed(tokens)


def extract(csv: Path, store: Path, dtype: str, way: str, model: dict[str, Any]) -> FeatureStore:
    """A fresh store each time: one of another dtype would be refused."""
    for file in sorted(store.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    store.rmdir() if store.exists() else None
    run_extraction(ExtractionConfig(dataset=str(csv), tsn=True, cross_frame=way, dtype=dtype, store=store, **model))
    return FeatureStore.open(store)


def compare(store: FeatureStore, dtype: str, way: str) -> None:
    with store:
        (split,) = store.splits
        arithmetic = sum(spec.row_bytes for spec in store.arrays(split).values())
        files = [path for path in (store.path / split / "view-0").rglob("c/**/*") if path.is_file()]
        on_disk = sum(path.stat().st_size for path in files) / store.splits[split]
        errors = store.manifest.facts["errors"]
        worst = {
            label: f"{label} {max(found):.5f}"
            for label, kinds in (("tokens", ("tokens", "block_input")), ("Q/K", ("q", "k")))
            if (found := [errors[name]["relative_standardised"] for name in errors if name.split("/")[0] in kinds])
        }
        if moved := [error["maps_total_variation"] for error in errors.values() if "maps_total_variation" in error]:
            worst["maps"] = f"maps moved {max(moved):.5f}"
        cosine = min(error["min_cosine"] for error in errors.values())
        print(
            f"  {dtype:<9}{way:<7}{arithmetic / 1e6:9.4f} MB by arithmetic {on_disk / 1e6:9.4f} on disk   "
            f"smallest cosine {cosine:.6f}   standardised error: {', '.join(worst.values())}"
        )


def exact_tokens(csv: Path, path: Path, model: dict[str, Any]) -> np.ndarray:
    """(video, frame, token, channel) of the last layer in float32."""
    with extract_exact(csv, path, model) as store:
        (split,) = store.splits
        return store.read(split, "tokens/11", range(store.splits[split]))


def extract_exact(csv: Path, path: Path, model: dict[str, Any]) -> FeatureStore:
    config = ExtractionConfig(
        dataset=str(csv), layers="-1", tsn=True, cross_frame="none", dtype="float32", store=path, **model
    )
    run_extraction(config)
    return FeatureStore.open(path)


def outlier_channels(tokens: np.ndarray) -> None:
    """Statistics of all videos but the last, the error on the last."""
    rng, width = np.random.default_rng(0), tokens.shape[-1]
    scale = rng.lognormal(0, 0.5, width)
    scale[rng.choice(width, 8, replace=False)] *= rng.uniform(50, 100, 8)
    axes = tuple(range(tokens.ndim - 1))
    tokens = (tokens - tokens.mean(axes)) / tokens.std(axes)
    tokens = ((tokens + rng.standard_t(4, width)) * scale).astype(np.float32)
    moments = ChannelMoments()
    moments.add(tokens[:-1])
    mean, std = (torch.from_numpy(values) for values in moments.constants())
    schemes = {
        "int8, channel statistics taken out": ("int8", mean, std),
        "int8, as it is": ("int8", torch.zeros_like(mean), torch.ones_like(std)),
        "bfloat16": ("bfloat16", mean, std),
        "float16": ("float16", mean, std),
    }
    print("tokens/11 of ViT-B/16 with outlier channels: standardised error, relative error, smallest cosine")
    for label, (dtype, *statistics_) in schemes.items():
        constants = dict(zip(("tokens_mean/11", "tokens_std/11"), statistics_, strict=True))
        x = torch.from_numpy(tokens[-1])
        back = dequantised(encoded("tokens/11", x, dtype, constants), "tokens/11", constants).float()
        shape = tuple(x.shape)
        dims = ("frame", "token", "channel")
        sums = ErrorSums(ArraySpec(name="tokens/11", dims=dims, shape=shape, chunk=(1, *shape[1:]), dtype=dtype))
        sums.add(x, back, None)
        error = sums.result()
        print(f"  {label:<36}{error['relative_standardised']:.5f}  {error['relative']:.5f}  {error['min_cosine']:.6f}")


def dequantise_speed(tokens: np.ndarray, clips: int = 16, rounds: int = 9) -> None:
    x = torch.from_numpy(np.resize(tokens, (clips, *tokens.shape[1:])))
    constants = {"tokens_mean/11": torch.zeros(x.shape[-1]), "tokens_std/11": torch.ones(x.shape[-1])}
    stored = encoded("tokens/11", x, "int8", constants)
    half = x.half()
    times = {
        "float16 to float32: the limit": _seconds(lambda: half.float(), rounds),
        "int8 to float32": _seconds(lambda: dequantised(stored, "tokens/11", constants), rounds),
    }
    limit = statistics.median(next(iter(times.values())))
    print(
        f"making float32 of {clips} clips of tokens, {torch.get_num_threads()} threads, median of {rounds} (min-max), ratio"
    )
    for label, taken in times.items():
        median = statistics.median(taken)
        spread = f"({min(taken) * 1e3:.0f}-{max(taken) * 1e3:.0f})"
        rate = x.numel() * 4 / median / 1e9
        print(f"  {label:<32}{median * 1e3:6.1f} ms {spread}  {rate:.2f} GB/s  {limit / median:.2f}")


def _seconds(work: Callable[[], object], rounds: int) -> list[float]:
    work()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    main()
