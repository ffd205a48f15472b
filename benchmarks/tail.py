"""What does training the top k blocks on cached tokens save, against running the whole backbone in every step?

    python benchmarks/tail.py [--blocks 1 2 4 6 12] [--clips 2] [--rounds 5] [--dtypes float16 bfloat16] [--device cuda]

AIM with its adapters in the top k blocks of a ViT-B/16 (`--model`), 8 frames, random weights and images; a step is forward,
backward and AdamW, without dropout and drop path, so that all rows of one k must give the same logits:

    cached        the tokens of layer N-k-1 are there, in memory as float32, and the top k blocks are run
    whole         the patch embedding and the bottom N-k blocks are run in every step, frozen and without gradients, then the
                  same: what training without a cache does, its decoding left out
    written out   cached, with the block as the paper writes it on torch's own modules (tail_written_out.py)
    products      the matrix products of "cached" alone, forward and backward, at the same shapes: the limit (of one block of k-1,
                  and of the last one)
    float16, ...  cached, with the frozen weights kept in that dtype; "again" is with checkpointing

Of the last block only "written out" makes more than CLS. "of whole" is the time of a row to that of "whole"; "of N" is its time
to that of "cached" with all blocks, over k/N: 1 is in proportion to the blocks. "alive" is the most bytes at once in tensors that
a step makes (of a GPU: its allocator's peak above what was there), "kept" is what `activation_bytes` says. Every round times all
rows of one k, so that a busy spell is shared.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded

import torch
from dist_memory import LivingTensors  # the scripts beside this one
from evl_head import seconds
from reader import machine
from tail_written_out import WrittenOut
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.aim import AIM
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_memory import activation_bytes

SIZES = {"b32": (768, 12, 12, 7, 32, 512), "b16": (768, 12, 12, 14, 16, 512), "l14": (1024, 16, 24, 16, 14, 768)}
"""Width, heads, blocks, patches a side, pixels of a patch, embedding."""
LARGEST_ERROR = 1e-4
"""Of logits against those of "cached", relative to the largest. Half precision is of other weights, and is not compared."""


class Backbone(nn.Module):
    """A CLIP of random weights: its blocks are a tail of all of them."""

    def __init__(self, model: str, device: torch.device) -> None:
        super().__init__()
        width, heads, layers, self.side, patch, embed = SIZES[model]
        block = BlockShape(width=width, num_heads=heads, mlp_dim=4 * width)
        self.shape = TailShape(num_layers=layers, num_blocks=layers, block=block, embed_dim=embed)
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.cls = nn.Parameter(torch.randn(width))
        self.positions = nn.Parameter(torch.randn(1 + self.side**2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.weights = {name: drawn(name, x) for name, x in FrozenTail(self.shape).state_dict().items()}
        self.tail = self.tail_in(torch.float32)
        self.requires_grad_(False).to(device)

    def tail_in(self, dtype: torch.dtype) -> FrozenTail:
        return FrozenTail.of(self.shape, self.weights, dtype)

    @torch.no_grad()
    def tokens(self, images: Tensor, num_blocks: int) -> Tensor:
        """(B, T, 3, h, w) -> what enters the blocks above the first so many, (B, T, N, D)."""
        patches = self.conv1(images.flatten(0, 1)).flatten(2).mT
        cls = self.cls.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([cls, patches], dim=1) + self.positions).unflatten(0, images.shape[:2])
        for block in self.tail.top(self.shape.num_layers)[:num_blocks]:
            x = block(x)
        return x


def drawn(name: str, x: Tensor) -> Tensor:
    is_gain = x.ndim == 1 and name.endswith("weight")
    return torch.ones_like(x) if is_gain else 0.02 * torch.randn(x.shape)


@dataclass
class Row:
    """One way to train."""

    module: Any
    features: Callable[[], ClipFeatures]
    compared: bool = True
    kept: int = 0
    times: list[float] = field(default_factory=list)
    alive: int = 0

    def __post_init__(self) -> None:
        trained = self.module.trained() if isinstance(self.module, WrittenOut) else self.module.parameters()
        self.optimiser = torch.optim.AdamW(trained, lr=1e-6)

    def step(self, autocast: str | None) -> Tensor:
        device = next(self.module.parameters()).device.type
        dtype = getattr(torch, autocast) if autocast else None
        with torch.autocast(device, dtype=dtype, enabled=autocast is not None):
            logits: Tensor = self.module(self.features())
        logits.float().square().mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return logits.detach()


def make_rows(backbone: Backbone, images: Tensor, k: int, args: argparse.Namespace) -> dict[str, Row]:
    shape, cut = backbone.shape, backbone.shape.num_layers - k
    config = AIM.Config(
        num_classes=400,
        num_frames=images.shape[1],
        width=shape.block.width,
        num_layers=shape.num_layers,
        embed_dim=shape.embed_dim,
        grid=(backbone.side, backbone.side),
        blocks=k,
        drop_path=0.0,
        dropout=0.0,
    )
    stored = backbone.tokens(images, cut)
    item_bytes = 2 if args.autocast else 4

    def of(x: Tensor) -> ClipFeatures:
        return ClipFeatures(tokens={-k - 1: x}) if cut else ClipFeatures(stem=x)

    def cached(dtype: str = "float32", checkpointing: bool = False) -> Row:
        chosen = replace(config, checkpointing=checkpointing)
        tail = backbone.tail if dtype == "float32" else backbone.tail_in(getattr(torch, dtype)).to(images.device)
        kept = activation_bytes(chosen, shape.block, len(images), item_bytes)
        return Row(drawn_head(chosen, tail, images.device), lambda: of(stored), dtype == "float32", kept)

    rows = {"cached": cached()}
    rows["whole"] = Row(drawn_head(config, backbone.tail, images.device), lambda: of(backbone.tokens(images, cut)))
    rows["written out"] = Row(WrittenOut(drawn_head(config, backbone.tail, images.device)), lambda: of(stored))
    rows["float32, again"] = cached(checkpointing=True)
    for dtype in args.dtypes:
        rows |= {dtype: cached(dtype), f"{dtype}, again": cached(dtype, checkpointing=True)}
    return rows


def drawn_head(config: AIM.Config, tail: FrozenTail, device: torch.device) -> AIM:
    """The same weights whenever it is called, and none of them zero."""
    torch.manual_seed(1)
    head = AIM(config).to(device)
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    head.set_tail(tail)
    return head


class Products:
    """The matrix products of one adapted block: of linear layers, adapters, and both attentions.

    Of the `last` one queries, and all that comes behind the attention of frames, are of CLS alone.
    """

    def __init__(self, shape: TailShape, images: Tensor, tokens: int, autocast: str | None, *, last: bool) -> None:
        B, T, D = images.shape[0], images.shape[1], shape.block.width
        H, rows, wanted = shape.block.num_heads, B * T * tokens, B * T * (1 if last else tokens)
        dtype = getattr(torch, autocast) if autocast else torch.float32

        def noise(*size: int) -> Tensor:
            return torch.randn(*size, device=images.device, dtype=dtype)

        over_time = [(rows, 3 * D, D), (rows, D, D)]
        of_frames = [(rows, 2 * D, D), (wanted, D, D), (wanted, D, D)]
        mlp = [(wanted, 4 * D, D), (wanted, D, 4 * D)]
        self.linear = [(noise(n, i), noise(o, i), noise(n, o)) for n, o, i in over_time + of_frames + mlp]
        adapters = [(n, o, i) for n in (rows, wanted, wanted) for o, i in ((D // 4, D), (D, D // 4))]
        self.trained = [(noise(n, i), noise(o, i), noise(n, o)) for n, o, i in adapters]
        among = ((B * T * H, wanted // (B * T), tokens), (B * tokens * H, T, T))
        self.attention = [(noise(n, asking, D // H), noise(n, asked, D // H)) for n, asking, asked in among]

    def forward(self) -> None:
        for x, weight, _ in self.linear + self.trained:
            F.linear(x, weight)
        for q, k in self.attention:
            torch.bmm(torch.bmm(q, k.mT), k)

    def forward_and_backward(self) -> None:
        self.forward()
        for _, weight, grad in self.linear + self.trained:
            grad @ weight
        for x, _, grad in self.trained:
            grad.mT @ x
        for q, k in self.attention:
            weights = torch.bmm(q, k.mT)  # as large as their gradients
            torch.bmm(q, k.mT)
            torch.bmm(weights, k)
            for _ in range(2):
                torch.bmm(weights.mT, q)


def measure(backbone: Backbone, images: Tensor, k: int, args: argparse.Namespace) -> dict[str, Row]:
    rows = make_rows(backbone, images, k, args)
    first = rows["cached"].step(args.autocast)  # also the warm-up, of the optimiser's memory too
    for name, row in rows.items():
        logits = row.step(args.autocast) if name != "cached" else first
        if row.compared and not args.autocast and (error := relative(logits, first)) > LARGEST_ERROR:
            raise SystemExit(f"k = {k}: the logits of {name} differ from those of cached by {error:.1e}")
        row.alive = alive(row, args)
    tokens, of_products = 1 + backbone.side**2, list[float]()
    block, last = (Products(backbone.shape, images, tokens, args.autocast, last=last) for last in (False, True))
    for _ in range(args.rounds):
        for row in rows.values():
            row.times.append(seconds(lambda row=row: row.step(args.autocast), images.device)[0])
        below, above = (seconds(one.forward_and_backward, images.device)[0] for one in (block, last))
        of_products.append((k - 1) * below + above)
    limit = Row(nn.Linear(1, 1), ClipFeatures)
    limit.times = of_products
    return rows | {"products": limit}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def alive(row: Row, args: argparse.Namespace) -> int:
    if args.device == "cpu":
        with LivingTensors() as living:
            row.step(args.autocast)
        return living.most_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row.step(args.autocast)
    return torch.cuda.max_memory_allocated() - before


def report(k: int, num_layers: int, rows: dict[str, Row], of_all: float | None) -> None:
    whole, limit = statistics.median(rows["whole"].times), statistics.median(rows["products"].times)
    for name, row in rows.items():
        median = statistics.median(row.times)
        share = f"{median / of_all / (k / num_layers):.2f}" if of_all and name == "cached" else ""
        memory = [f"{size / 1e6:.0f}" if size else "" for size in (row.alive, row.kept)]
        spread = f"{median:.2f} ({min(row.times):.2f}-{max(row.times):.2f})"
        cells = [str(k), name, spread, f"{median / whole:.2f}", f"{median / limit:.2f}", share, *memory]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="b16", choices=list(SIZES))
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 6, 4, 2, 1], help="all of them first, for 'of N'")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["float16", "bfloat16"], help="of the frozen weights, more rows")
    parser.add_argument("--autocast", choices=["float16", "bfloat16"], help="of products, with all rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{machine()}, {args.threads} threads"
    print(f"{name}, torch {torch.__version__}; AIM, {args.model}, {args.clips} clips of {args.frames} frames\n")
    backbone = Backbone(args.model, device)
    size = backbone.side * backbone.conv1.kernel_size[0]
    images = torch.randn(args.clips, args.frames, 3, size, size, device=device)
    print("| k | row | s, median (min-max) | of whole | of products | of N | alive MB | kept MB |\n|" + "---|" * 8)
    of_all = None
    for k in args.blocks:
        rows = measure(backbone, images, k, args)
        if k == backbone.shape.num_layers:
            of_all = statistics.median(rows["cached"].times)
        report(k, backbone.shape.num_layers, rows, of_all)
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
