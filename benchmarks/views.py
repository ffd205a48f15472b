"""What do the images of a view cost? Milliseconds of one thread for a clip of 8 frames of 340x256, by recipe.

    python benchmarks/views.py [--clips 40]

Each clip is another draw of the recipe. The limit is view 0: one resize and the centre crop, without any draw.
"""

import argparse
import os
import platform
import statistics
import time

import numpy as np
import torch

from vcache.extract.preprocess import Preprocessing
from vcache.extract.video import DecodedVideo
from vcache.extract.views import EvaluationView, TrainingView, View
from vcache.pipelines.presets import RECIPES

T, H, W = 8, 256, 340


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, 1 of {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    views: dict[str, View] = {"view 0: the limit": EvaluationView()}
    views |= {name: TrainingView(seed=0, view=1, augmentation=augmentation) for name, augmentation in RECIPES.items()}
    views["crop-flip, 16 pixel frames"] = TrainingView(
        seed=0, view=1, augmentation=RECIPES["crop-flip"], pixels_per_frame=2
    )
    milliseconds = {name: measure(view, args.clips) for name, view in views.items()}
    limit = statistics.median(next(iter(milliseconds.values())))
    print(f"median of {args.clips} clips (10%-90%), ratio of the limit")
    for name, values in milliseconds.items():
        median, deciles = statistics.median(values), statistics.quantiles(values, n=10)
        print(f"  {name:<28}{median:7.1f} ms  ({deciles[0]:.1f}-{deciles[-1]:.1f})  {limit / median:5.2f}")


def measure(view: View, num_clips: int) -> list[float]:
    preprocessing = Preprocessing(image_size=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    video = make_video(T * max(view.pixels_per_frame, 1))
    milliseconds = []
    for i in range(num_clips + 2):
        start = time.perf_counter()
        view.prepare(video, 0, preprocessing, f"video {i}")
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return milliseconds[2:]


def make_video(num_frames: int) -> DecodedVideo:
    blocks = np.random.default_rng(0).integers(0, 256, (num_frames, H // 16, W // 16 + 1, 3), dtype=np.uint8)
    frames = np.ascontiguousarray(blocks.repeat(16, axis=1).repeat(16, axis=2)[:, :H, :W])
    numbers = tuple(range(num_frames))
    return DecodedVideo(frames=frames, numbers=numbers, clips=(numbers,), num_video_frames=num_frames, fps=None)


if __name__ == "__main__":
    main()
