"""How fast is DiST's head, forward and backward, against the paper written out and the official module, and in how much memory?

    python benchmarks/dist_head.py [--batches 4] [--rounds 5] [--official CHECKOUT] [--device cuda]

ViT-B/16, 8 frames of tokens of 12 layers in float16, 16 frames of uint8 pixels, 2 pooling layers, the same weights and random
features for all; every row must agree in the video's embedding and in the gradients with the first. CHECKOUT is a folder with
alibaba-mmai-research/DiST: its own module then is a row, too. It is given float32 tokens and normalised images in its own layout,
made before the clock starts; the other rows make theirs within the step.

The limit is the rate of one matrix product of a layer's size, timed in the same run; the products counted are those of the
paper's form, forward and backward. Peak memory is what one step adds to features and weights, on a CPU in a process of its own.
The last line is a step of EVL (4 layers, all modules, from maps) with as many clips: in the paper's Table 3 one of DiST takes
0.52 s, one of EVL 0.71 s, both with their backbones.
"""

import argparse
import ctypes
import dataclasses
import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded

import torch
from dist_official import OfficialHead, official_features
from evl_head import Inputs, Row, make_rows, resident, seconds
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vcache.heads.dist import DiST
from vcache.heads.evl import EVL
from vcache.heads.requirements import ClipFeatures

LARGEST_ERROR = 1e-4
"""Of the embedding and of all gradients, each relative to the largest."""


class Embedding(torch.nn.Module):
    """The head without its text, which nothing is trained of."""

    def __init__(self, head: DiST) -> None:
        super().__init__()
        self.net = head

    def forward(self, features: ClipFeatures) -> Tensor:
        return self.net.embed(features)


def draw(config: DiST.Config, batch: int, device: torch.device) -> ClipFeatures:
    torch.manual_seed(0)
    shape, side = (batch, config.num_frames, 1 + config.grid[0] * config.grid[1], config.width), config.patch_size
    frames = (batch, config.num_frames * config.gamma, config.grid[0] * side, config.grid[1] * side, 3)
    return ClipFeatures(
        tokens={layer: torch.randn(*shape, device=device).half() for layer in config.read_layers},
        pixels=torch.randint(256, frames, dtype=torch.uint8, device=device),
    )


def rows_of(
    config: DiST.Config, features: ClipFeatures, checkout: Path | None, only: str | None = None
) -> dict[str, Row]:
    device = features.pixels.device
    torch.manual_seed(1)
    weights = {name: x for name, x in DiST(config).state_dict().items() if not name.startswith("text.")}

    def ours(formulation: str = "channels_last", **options: object) -> Row:
        head = DiST(dataclasses.replace(config, formulation=formulation))
        head.load_state_dict(weights, strict=False)
        return Row(Embedding(head).to(device), lambda: features, **options)

    def official() -> Row:
        module = OfficialHead(config, checkout)
        module.net.load_state_dict(weights)
        given = official_features(config, features)
        return Row(module.to(device), lambda: given)

    makers: dict[str, Callable[[], Row]] = {"vcache": ours, "vcache, plain": lambda: ours("plain")}
    if checkout is not None:
        makers["official, its module"] = official
    if device.type == "cuda":
        makers["vcache, bfloat16"] = lambda: ours(autocast=torch.bfloat16, exact=False)
        makers["plain, bfloat16"] = lambda: ours("plain", autocast=torch.bfloat16, exact=False)
    return {name: make() for name, make in makers.items() if only in (None, name)}


def outcome(row: Row) -> tuple[Tensor, dict[str, Tensor]]:
    """The embedding of a step and the gradients that it leaves."""
    row.module.zero_grad()
    embedding = row.step().detach().float()
    gradients = {name: p.grad for name, p in row.module.named_parameters() if p.grad is not None}
    row.module.zero_grad()
    return embedding, gradients


def error_against(row: Row, expected: Tensor, gradients: dict[str, Tensor]) -> float:
    """The largest difference in embeddings or gradients, to the largest of them."""
    got, others = outcome(row)
    assert others.keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    of_gradients = max((gradients[name] - others[name]).abs().max().item() for name in gradients) / largest
    return max(of_gradients, ((got - expected).abs().max() / expected.abs().max()).item())


def giga_products(config: DiST.Config) -> float:
    """Multiply-adds of a step of one clip as the paper writes it, forward and backward, in 10^9."""
    with torch.device("meta"):
        head = DiST(dataclasses.replace(config, formulation="plain"))
        features = draw(config, 1, torch.device("meta"))
        with FlopCounterMode(display=False) as counter:
            head.embed(features).sum().backward()
    return counter.get_total_flops() / 2e9


def measure(batch: int, args: argparse.Namespace) -> None:
    device, config = torch.device(args.device), DiST.Config(num_classes=174, num_frames=args.frames)
    features = draw(config, batch, device)
    rows = rows_of(config, features, args.official)
    first = outcome(next(iter(rows.values())))
    errors = {name: error_against(row, *first) for name, row in rows.items()}  # also the warm-up
    for name, row in rows.items():
        if row.exact and errors[name] > LARGEST_ERROR:
            raise SystemExit(f"{name} differs from {next(iter(rows))} by {errors[name]:.1e} of the largest gradient")
    left, right = torch.randn(batch * 1576, 768, device=device), torch.randn(768, 384, device=device)
    evl = evl_row(batch, args)
    evl.step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in [*rows, "EVL", "limit"]}
    for _ in range(args.rounds):
        for name, row in [*rows.items(), ("EVL", evl)]:
            times[name].append(seconds(row.step, device))
            row.module.zero_grad()
        times["limit"].append(seconds(lambda: [left @ right for _ in range(8)], device))
    memory = {name: peak_memory(name, row, batch, args) for name, row in [*rows.items(), ("EVL", evl)]}
    report(batch, giga_products(config), 8 * left.numel() * 384 / 1e9, times, memory, errors)


def evl_row(batch: int, args: argparse.Namespace) -> Row:
    config = EVL.Config(num_classes=174, num_frames=args.frames)
    inputs = Inputs.draw(config, batch, True, torch.device(args.device))
    return make_rows("T-CA from maps", inputs, config, None, "vcache")["vcache"]


def report(batch: int, products: float, of_limit: float, times: dict, memory: dict, errors: dict) -> None:
    wall = {name: statistics.median(each for each, _ in taken) for name, taken in times.items()}
    cpu = {name: statistics.median(each for _, each in taken) for name, taken in times.items()}
    limit, first = of_limit / wall["limit"], next(iter(wall))
    print(f"batch {batch}; limit {limit:.1f} GMAC/s; {products:.1f} GMAC a clip and step as the paper writes it")
    print(f"  {'':<22}{'ms, median (min-max)':>30}{'of first':>10}{'CPU s':>8}{'of first':>10}"
          f"{'GMAC/s':>8}{'of limit':>10}{'peak MB':>9}{'error':>10}")  # fmt: skip
    for name in errors:
        spread = f"{wall[name] * 1e3:.0f} ({min(times[name])[0] * 1e3:.0f}-{max(times[name])[0] * 1e3:.0f})"
        rate = batch * products / wall[name]
        print(f"  {name:<22}{spread:>30}{wall[name] / wall[first]:>10.2f}{cpu[name]:>8.2f}{cpu[name] / cpu[first]:>10.2f}"
              f"{rate:>8.1f}{rate / limit:>10.2f}{memory[name] / 1e6:>9.0f}{errors[name]:>10.1e}")  # fmt: skip
    print(f"  EVL {wall['EVL'] * 1e3:.0f} ms, {cpu['EVL']:.2f} CPU s: DiST takes {wall[first] / wall['EVL']:.2f} times as long, "
          f"{cpu[first] / cpu['EVL']:.2f} times the CPU seconds; peak {memory['EVL'] / 1e6:.0f} MB, DiST "
          f"{memory[first] / memory['EVL']:.2f} times")  # fmt: skip


def peak_memory(name: str, row: Row, batch: int, args: argparse.Namespace) -> int:
    """Bytes that one step adds to features and weights; the gradients of the weights count."""
    if args.device == "cpu":
        options = ["--memory-of", name, "--batches", str(batch), "--frames", str(args.frames)]
        options += ["--official", str(args.official)] if args.official else []
        run = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
        return int(run.stdout)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row.step()
    row.module.zero_grad()
    return torch.cuda.max_memory_allocated() - before


def resident_peak_of_a_step(name: str, batch: int, args: argparse.Namespace) -> int:
    """In this fresh process: the high-water mark of a step above what is resident before it."""
    config, cpu = DiST.Config(num_classes=174, num_frames=args.frames), torch.device("cpu")

    def make(clips: int) -> Row:
        return (
            evl_row(clips, args)
            if name == "EVL"
            else rows_of(config, draw(config, clips, cpu), args.official, name)[name]
        )

    make(1).step()  # what is loaded at the first step
    row = make(batch)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is resident no longer
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = resident("VmRSS")
    row.step()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the processor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--official", type=Path, help="folder with a checkout of alibaba-mmai-research/DiST")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(resident_peak_of_a_step(args.memory_of, args.batches[0], args))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    load = os.getloadavg()[0]
    print(f"{name}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}, load {load:.1f}")
    for batch in args.batches:
        measure(batch, args)


if __name__ == "__main__":
    main()
