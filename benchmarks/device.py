"""How fast is the backbone with all its taps on a device, and does an extraction keep the device busy?

    python benchmarks/device.py [--device cuda] [--model ViT-B-16 ViT-L-14] [--precision float16] [--videos 256]

Limits, measured in the same run: the device's matrix products (one large one in the same precision), and open_clip's own forward
pass in that precision, without taps. Then a whole extraction of rendered videos against the forward pass alone, with what its
progress line says that limits. Multiply-adds are counted by torch. Runs on a CPU, too, for trying it out.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from vcache.extract.backbone import FrozenBackbone
from vcache.pipelines.demo.render import render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.progress import ExtractionProgress
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import ExtractionSetup, prepare_extraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", nargs="+", default=["ViT-B-16", "ViT-L-14"])
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, {args.precision}")
    peak = matmul_rate(device, getattr(torch, args.precision), args.rounds)
    print(f"  one large matrix product {peak / 1e12:8.2f} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        csv = render_world(Path(folder), train=args.videos, val=0)
        for model in args.model:
            config = ExtractionConfig(
                dataset=str(csv), tsn=True, model=model, pretrained=None, random_weights=True, device=args.device,
                precision=args.precision, decode_workers=os.cpu_count() or 1, store=Path(folder) / f"{model}.zarr",
            )  # fmt: skip
            measure(prepare_extraction(config), peak, args.rounds)


def measure(setup: ExtractionSetup, peak: float, rounds: int) -> None:
    backbone, config = setup.backbone, setup.config
    size = backbone.facts.image_size
    batch = setup.batch_size * config.frames
    images = torch.rand(batch, 3, size, size, device=backbone.device)
    layers = setup.layers
    flops = flops_of(backbone, images[:1]) * batch
    plain = open_clips_own(config, backbone)
    rows = {
        "open_clip's forward, no taps": seconds(lambda: plain(images), backbone.device, rounds),
        "forward with tokens and Q/K": seconds(
            lambda: backbone(images, tokens=layers, qk=layers), backbone.device, rounds
        ),
    }
    print(f"{config.model}: batches of {batch} frames, {flops / batch / 2e9:.2f} GMAC a frame")
    for name, times in rows.items():
        median = statistics.median(times)
        print(f"  {name:<30}{batch / median:9.1f} frames/s ({batch / max(times):.1f}-{batch / min(times):.1f}), "
              f"{flops / median / peak:.2f} of the matrix product's rate")  # fmt: skip
    rate, limits = extraction_rate(setup)
    forward = batch / statistics.median(rows["forward with tokens and Q/K"])
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in limits.items())
    print(f"  {'extraction, end to end':<30}{rate:9.1f} frames/s, {rate / forward:.2f} of the forward pass; {shares}")


def extraction_rate(setup: ExtractionSetup) -> tuple[float, dict[str, float]]:
    """Frames per second from the first video to the last commit, and what limited."""
    began: list[float] = []

    def on_progress(progress: ExtractionProgress) -> None:
        began.append(time.perf_counter())

    with mock.patch("vcache.pipelines.setup.load_backbone", lambda *args, **options: setup.backbone):
        summary = run_extraction(setup.config, on_progress)
    return summary.progress.frames_done / (time.perf_counter() - began[0]), summary.progress.limits


def open_clips_own(config: ExtractionConfig, backbone: FrozenBackbone) -> Callable[[torch.Tensor], torch.Tensor]:
    """The image tower as open_clip makes it for this precision: its weights do not matter for the time."""
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[config.precision]
    model = open_clip.create_model(config.model, precision=precision, device=backbone.device).visual.eval()

    @torch.no_grad()
    def forward(images: torch.Tensor) -> torch.Tensor:
        return model(images.to(backbone.dtype))

    return forward


def flops_of(backbone: FrozenBackbone, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        backbone(image)
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """FLOP/s of one product of square matrices, large enough to fill the device."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device, rounds))


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Of each of `rounds` calls, after two that warm up."""
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return times[2:]


if __name__ == "__main__":
    main()
