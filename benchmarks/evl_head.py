"""How fast is EVL's head, forward and backward, against the official formulation, and how far from the memory's speed?

    python benchmarks/evl_head.py [--batches 8 16] [--rounds 5] [--official CHECKOUT] [--device cuda]

ViT-B/16, 8 frames, 4 layers, float32, evaluation mode, the same weights and random features for all; every row must agree in
logits and gradients with the first. CHECKOUT is a folder with model.py of OpenGVLab/efficient-video-recognition: its own module
then is a row, too. It has no way to read maps and always starts from Q/K; it is given a copy of the features, since it writes to
them.

The floor is reading X once forward and once backward, as many bytes as copying it once moves: that copy is timed in the same run.
Peak memory is what one step adds to inputs and weights, on a CPU in a process of its own. On a GPU there are rows more: bfloat16
autocast and torch.compile.
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
import time
from collections.abc import Callable
from pathlib import Path

import torch
from evl_official import official_head, restated_head
from torch import Tensor, nn

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.evl import EVL
from vcache.heads.requirements import ClipFeatures

VARIANTS = {"no T-CA": False, "T-CA from maps": True, "T-CA from Q/K": True}
LARGEST_ERROR = 1e-4
"""Of the logits and of all gradients, each relative to the largest."""


@dataclasses.dataclass
class Inputs:
    """Random features of B clips: X, and Q and K as the official code has them, (B, T, N, H, d)."""

    x: list[Tensor]
    q: list[Tensor]
    k: list[Tensor]
    maps: list[Tensor]

    @classmethod
    def draw(cls, config: EVL.Config, batch: int, cross_frame: bool, device: torch.device) -> "Inputs":
        torch.manual_seed(0)
        shape = (batch, config.num_frames, 1 + config.grid[0] * config.grid[1])
        layers = range(len(config.layers))
        x = [torch.randn(*shape, config.width, device=device) for _ in layers]
        if not cross_frame:
            return cls(x, [], [], [])
        d = config.width // config.num_heads
        q, k = ([torch.randn(*shape, config.num_heads, d, device=device) for _ in layers] for _ in range(2))
        maps = [cross_frame_maps(a.transpose(2, 3), b.transpose(2, 3)) for a, b in zip(q, k, strict=True)]
        return cls(x, q, k, maps)

    def ours(self, config: EVL.Config, from_qk: bool) -> ClipFeatures:
        maps = self.maps
        if from_qk:
            maps = [cross_frame_maps(q.transpose(2, 3), k.transpose(2, 3)) for q, k in zip(self.q, self.k, strict=True)]
        return ClipFeatures(
            tokens=dict(zip(config.layers, self.x, strict=True)),
            maps=dict(zip(config.layers, maps, strict=True)) if maps else {},
        )

    def officials(self, from_qk: bool) -> list[dict[str, Tensor]]:
        layers = [{"out": x} for x in self.x]
        for i, layer in enumerate(layers if self.maps else []):
            layer |= {"q": self.q[i], "k": self.k[i]} if from_qk else {"maps": self.maps[i]}
        return layers


@dataclasses.dataclass
class Row:
    """One way to compute the head."""

    module: nn.Module
    features: Callable[[], object]
    """Made within the time of a step."""
    before: Callable[[], None] = lambda: None
    autocast: torch.dtype | None = None
    exact: bool = True

    def step(self) -> Tensor:
        """Forward and backward; the gradients are left in the module."""
        device = next(self.module.parameters()).device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.module(self.features())
        logits.float().square().mean().backward()
        return logits


def make_rows(
    variant: str, inputs: Inputs, config: EVL.Config, checkout: Path | None, only: str | None = None
) -> dict[str, Row]:
    from_qk, device = variant == "T-CA from Q/K", inputs.x[0].device
    torch.manual_seed(1)
    weights = EVL(config)
    for parameter in weights.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)

    def built(make: Callable[[], nn.Module]) -> nn.Module:
        module = make()
        module.load_state_dict(weights.state_dict())
        return module.to(device).eval()

    def ours(formulation: str = "absorbed", **options: object) -> Row:
        module = built(lambda: EVL(dataclasses.replace(config, formulation=formulation)))
        return Row(module, lambda: inputs.ours(config, from_qk), **options)

    def compiled() -> Row:
        row = ours(exact=False)
        row.module.compile()
        return row

    def official() -> Row:
        given = inputs.officials(from_qk=bool(inputs.q))

        def refresh() -> None:
            for layer, x in zip(given, inputs.x, strict=True):
                layer["out"] = x.clone()

        return Row(built(lambda: official_head(config, checkout)), lambda: given, before=refresh)

    makers: dict[str, Callable[[], Row]] = {"vcache": ours, "vcache, plain": lambda: ours("plain")}
    makers["official, restated"] = lambda: Row(built(lambda: restated_head(config)), lambda: inputs.officials(from_qk))
    if checkout is not None:
        makers["official, its module"] = official
    if device.type == "cuda":
        makers["vcache, bfloat16"] = lambda: ours(autocast=torch.bfloat16, exact=False)
        makers["vcache, compiled"] = compiled
    return {name: make() for name, make in makers.items() if only in (None, name)}


def error_against(row: Row, first: Row) -> float:
    """The largest difference in logits or gradients of a step, to the largest of them."""
    compared = []
    for each in (first, row):
        each.before()
        each.module.zero_grad()
        logits = each.step().detach().float()
        compared.append(
            (logits, {name.removeprefix("_orig_mod."): p.grad for name, p in each.module.named_parameters()})
        )
        each.module.zero_grad()
    (expected, gradients), (got, others) = compared
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    of_gradients = max((gradients[name] - others[name]).abs().max().item() for name in gradients) / largest
    return max(of_gradients, ((got - expected).abs().max() / expected.abs().max()).item())


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """By the clock, and of the processor."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, time.process_time() - cpu


def measure(variant: str, batch: int, args: argparse.Namespace) -> None:
    device, config = torch.device(args.device), configured(variant, args)
    inputs = Inputs.draw(config, batch, VARIANTS[variant], device)
    rows = make_rows(variant, inputs, config, args.official)
    first = next(iter(rows.values()))
    errors = {name: error_against(row, first) for name, row in rows.items()}  # also the warm-up
    for name, row in rows.items():
        if row.exact and errors[name] > LARGEST_ERROR:
            raise SystemExit(f"{name} differs from {next(iter(rows))} by {errors[name]:.1e} of the largest gradient")
    copy, times = torch.empty_like(inputs.x[0]), {name: [] for name in [*rows, "floor"]}
    for _ in range(args.rounds):
        for name, row in rows.items():
            row.before()
            times[name].append(seconds(row.step, device))
            row.module.zero_grad()
        times["floor"].append(seconds(lambda: [copy.copy_(x) for x in inputs.x], device))
    memory = {name: peak_memory(name, row, variant, batch, args) for name, row in rows.items()}
    report(variant, batch, inputs, times, memory, errors)


def report(variant: str, batch: int, inputs: Inputs, times: dict, memory: dict, errors: dict) -> None:
    wall = {name: statistics.median(each for each, _ in taken) for name, taken in times.items()}
    cpu = {name: statistics.median(each for _, each in taken) for name, taken in times.items()}
    size = sum(x.nbytes for x in inputs.x)
    floor, first = wall["floor"], next(iter(wall))
    print(f"{variant}, batch {batch}; floor {floor * 1e3:.1f} ms: "
          f"X, {size / 1e6:.0f} MB, copied at {2 * size / floor / 1e9:.1f} GB/s")  # fmt: skip
    print(f"  {'':<22}{'ms, median (min-max)':>28}{'of first':>10}{'CPU s':>8}{'of first':>10}"
          f"{'floors':>8}{'peak MB':>9}{'error':>10}")  # fmt: skip
    for name in memory:
        spread = f"{wall[name] * 1e3:.1f} ({min(times[name])[0] * 1e3:.1f}-{max(times[name])[0] * 1e3:.1f})"
        print(f"  {name:<22}{spread:>28}{wall[name] / wall[first]:>10.2f}{cpu[name]:>8.2f}{cpu[name] / cpu[first]:>10.2f}"
              f"{wall[name] / floor:>8.1f}{memory[name] / 1e6:>9.0f}{errors[name]:>10.1e}")  # fmt: skip


def peak_memory(name: str, row: Row, variant: str, batch: int, args: argparse.Namespace) -> int:
    """Bytes that one step adds to inputs and weights."""
    if args.device == "cpu":
        options = ["--memory-of", name, "--variants", variant, "--batches", str(batch), "--frames", str(args.frames)]
        options += ["--official", str(args.official)] if args.official else []
        run = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
        return int(run.stdout)
    row.before()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row.step()
    row.module.zero_grad()
    return torch.cuda.max_memory_allocated() - before


def resident_peak_of_a_step(name: str, variant: str, batch: int, args: argparse.Namespace) -> int:
    """In this fresh process: the high-water mark of a step above what is resident before it."""
    config = configured(variant, args)
    warm = make_rows(
        variant, Inputs.draw(config, 1, VARIANTS[variant], torch.device("cpu")), config, args.official, name
    )
    warm[name].before()
    warm[name].step()
    del warm
    row = make_rows(
        variant, Inputs.draw(config, batch, VARIANTS[variant], torch.device("cpu")), config, args.official, name
    )[name]
    row.before()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is resident no longer
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = resident("VmRSS")
    row.step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def configured(variant: str, args: argparse.Namespace) -> EVL.Config:
    return EVL.Config(num_classes=400, num_frames=args.frames, temporal_cross_attention=VARIANTS[variant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the processor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--official", type=Path, help="folder with the official model.py")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(resident_peak_of_a_step(args.memory_of, args.variants[0], args.batches[0], args))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(
        f"{name}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    for variant in args.variants:
        for batch in args.batches:
            measure(variant, batch, args)


if __name__ == "__main__":
    main()
