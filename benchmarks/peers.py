"""Extraction beside a peer's own code: the same videos, the same weights, pooled embeddings of the same number of frames.

    python benchmarks/peers.py --clip-video-encode CHECKOUT [--clips FOLDER] [--videos 16] [--rounds 3]

clip-video-encode at b5df2c7 is imported from a checkout; none of its code is here. Its requirements are not this package's:
what is missing here (it reads with OpenCV through video2numpy, and writes webdataset) is said, and its encoding alone is run:
FrameMapper and encode_chunk of frames that were decoded and resized before the clock starts, with np.save of each video. That is
less than its whole extraction, and is compared with the whole of ours: decoding, resizing, the forward pass, writing, syncing
and committing. Rounds are interleaved; CPU seconds count the processes that each starts.
"""

import argparse
import importlib
import importlib.util
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded

import numpy as np
import open_clip
import torch
from clip_copies import copies
from safetensors.torch import save_file

from vcache.extract.decode import decode_video
from vcache.extract.sampling import TSNSampling
from vcache.extract.video import DecodeRequest
from vcache.pipelines.demo.render import render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.store.reader import FeatureStore

MODEL = "ViT-B-32"
FRAMES = 8
NEEDED = ("cv2", "video2numpy", "webdataset", "braceexpand", "pyarrow")
"""What clip-video-encode imports that this package does not."""


class Files:
    """Its FileWriter, without the fsspec layer: one .npy for a video."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, values: np.ndarray, key: str, metadata: object = None) -> None:
        np.save(self.folder / f"{key}.npy", values)


def its_modules(checkout: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """simplemapper and handle_chunk of the checkout, without the package's __init__, which imports the rest."""
    package = types.ModuleType("clip_video_encode")
    package.__path__ = [str(checkout / "clip_video_encode")]
    sys.modules["clip_video_encode"] = package
    return tuple(importlib.import_module(f"clip_video_encode.{name}") for name in ("simplemapper", "handle_chunk"))  # type: ignore[return-value]


def frames_of(csv: Path, size: int) -> list[np.ndarray]:
    """The frames of each video as its reader would give them: size x size, uint8."""
    found = []
    for line in csv.read_text().splitlines()[1:]:
        request = DecodeRequest(path=csv.parent / line.split(",")[0], clips=(TSNSampling(num_frames=FRAMES),))
        frames = torch.from_numpy(decode_video(request).clip(0)).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(frames.float(), (size, size), mode="bicubic", antialias=True)
        found.append(resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy())
    return found


def ours(csv: Path, weights: Path, store: Path, layers: str) -> None:
    run_extraction(
        ExtractionConfig(
            dataset=str(csv),
            layers=layers,
            cross_frame="none" if layers == "none" else "qk",
            tsn=True,
            frames=FRAMES,
            model=MODEL,
            pretrained=str(weights),
            store=store,
            device="cpu",
            decode_workers=os.cpu_count() or 1,
        )
    )


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds, CPU seconds with those of ended child processes)."""

    def cpu() -> float:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    start, before = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - start, cpu() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip-video-encode", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument(
        "--clips", type=Path, help="Take the .mp4 of this folder in turns, in place of rendered videos."
    )
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    print(f"clip-video-encode's reader and writer cannot run here, without {', '.join(missing)}" if missing else
          "clip-video-encode's requirements are here; this script runs its encoding alone all the same")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csv = copies(folder, args.clips, args.videos) if args.clips else render_world(folder, train=args.videos, val=0)
        run(args, folder, csv)


def run(args: argparse.Namespace, folder: Path, csv: Path) -> None:
    weights = folder / "weights.safetensors"
    torch.manual_seed(0)
    save_file(open_clip.create_model(MODEL).state_dict(), weights)
    simplemapper, handle_chunk = its_modules(args.clip_video_encode)
    frames = frames_of(csv, 224)
    places = {i: (FRAMES * i, FRAMES * (i + 1), f"{i}.mp4") for i in range(len(frames))}
    ids = [str(i) for i in range(len(frames))]
    files, seconds = Files(folder), {}

    def theirs() -> None:
        mapper = simplemapper.FrameMapper(MODEL, str(weights), "cpu")
        handle_chunk.encode_chunk(frames, places, files, mapper, {}, ids, False, "cpu")

    for i in range(args.rounds):
        stores = [folder / f"{what}-{i}.zarr" for what in ("embed", "tokens")]
        ways: dict[str, Callable[[], None]] = {
            "clip-video-encode, its encoding alone": theirs,
            "vcache, whole, embeddings (--layers none)": lambda: ours(csv, weights, stores[0], "none"),  # noqa: B023
            "vcache, whole, 4 layers with Q/K": lambda: ours(csv, weights, stores[1], "-4:"),  # noqa: B023
        }
        for way, work in ways.items():
            seconds.setdefault(way, []).append(timed(work))
    report(args, seconds)
    agreement(stores[0], folder)


def report(args: argparse.Namespace, seconds: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print(
        f"{args.videos} videos of {FRAMES} frames, {MODEL}, loading the model included; median of {args.rounds} (min-max)"
    )
    base = statistics.median(cpu for _, cpu in seconds["clip-video-encode, its encoding alone"])
    print("| | s | CPU s | CPU, of its encoding |\n|---|---|---|---|")
    for way, times in seconds.items():
        wall, cpu = zip(*times, strict=True)
        spread = [f"{statistics.median(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in (wall, cpu)]
        print(f"| {way} | {spread[0]} | {spread[1]} | {statistics.median(cpu) / base:.2f} |")


def agreement(store: Path, folder: Path) -> None:
    """How far both embeddings of one video are from each other: they differ by the resize and by float16."""
    with FeatureStore.open(store) as opened:
        mine = opened.read("train", "embed", [0])[0].astype(np.float64)
    theirs = np.load(folder / "0.npy").astype(np.float64)
    cosine = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    print(f"embeddings of the first video: smallest cosine between both {cosine.min():.4f}")


if __name__ == "__main__":
    main()
