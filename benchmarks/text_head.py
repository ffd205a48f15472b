"""How fast is the temporal modelling of Text4Vis and ActionCLIP, forward and backward, against their official modules?

    python benchmarks/text_head.py [--official CHECKOUT] [--batch 256] [--width 512] [--rounds 7]

8 frames of embeddings in float32, the same weights and features for both, in turns; outputs and all gradients must agree.
CHECKOUT is a folder with sallymmx/ActionCLIP, whose modules/Visual_Prompt.py has all (that of Text4Vis has the same transformer);
without it only ours are timed. The limit of Transf is its products of matrices alone, as one batch of rows, forward and backward,
timed in the same run. The last line is the step of AdamW over Transf's parameters.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from reader import machine  # the script beside this one
from torch import Tensor, nn

from vcache.heads.actionclip import ActionCLIP

T = 8
OFFICIAL = {"meanp": "meanP", "conv1d": "Conv_1D", "lstm": "LSTM", "transf": "Transf", "transf_cls": "Transf_cls"}
LARGEST_ERROR = 1e-4
"""Of output and gradients, each relative to the largest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(
        f"{machine()}, torch {torch.__version__} with {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{args.batch} clips of {T} frames x {args.width}, forward + backward, median of {args.rounds} (min-max)")
    official = _load(args.official / "modules/Visual_Prompt.py") if args.official else None
    x = torch.randn(args.batch, T, args.width, generator=torch.Generator().manual_seed(0))
    for prompt in ("conv1d", "lstm", "transf_cls", "transf"):
        torch.manual_seed(1)
        config = ActionCLIP.Config(num_classes=2, embed_dim=args.width, num_frames=T, prompt=prompt, scrambled=True)
        ours = ActionCLIP(config).fusion_model.eval()
        steps: dict[str, Callable[[], object]] = {"vcache": lambda ours=ours: step(ours, x)}
        if official is not None:
            module = official.visual_prompt(OFFICIAL[prompt], clip_sizes(args.width), T).eval()
            module.load_state_dict(ours.state_dict())
            agree(ours, module, x)
            steps["official"] = lambda module=module: step(module, x)
        if prompt == "transf":
            steps["its products alone"] = products(args.batch * T, args.width)
            optimiser = torch.optim.AdamW(ours.parameters(), lr=0.0, fused=True)
            steps["AdamW"] = optimiser.step
        report(prompt, steps, args.rounds)


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("official_prompt", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clip_sizes(width: int) -> dict[str, Tensor]:
    """What the official module looks at of CLIP's state dict."""
    shapes = {
        "text_projection": (width, width),
        "positional_embedding": (77, width),
        "token_embedding.weight": (9, width),
        "ln_final.weight": (width,),
    }
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def step(module: nn.Module, x: Tensor) -> Tensor:
    module.zero_grad(set_to_none=True)
    out = module(x.clone())  # the official Transf_cls changes what it is given
    out.square().mean().backward()
    return out


def agree(ours: nn.Module, official: nn.Module, x: Tensor) -> None:
    pairs = [(step(ours, x).detach(), step(official, x).detach())]
    theirs = dict(official.named_parameters())
    pairs += [(p.grad, theirs[name].grad) for name, p in ours.named_parameters() if p.grad is not None]
    largest = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs if b.any())
    if largest > LARGEST_ERROR:
        raise SystemExit(f"outputs or gradients differ by {largest:.1e}")


def products(num_rows: int, width: int) -> Callable[[], object]:
    """Those of six blocks: Q, K and V, output, and both of the MLP, each forward and twice backward."""
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    rows = {size: torch.randn(num_rows, size) for size in {size for pair in sizes for size in pair}}
    weights = [torch.randn(inputs, outputs) for inputs, outputs in sizes]

    def run() -> None:
        for _ in range(6):
            for weight in weights:
                inputs, outputs = rows[weight.shape[0]], rows[weight.shape[1]]
                inputs @ weight, outputs @ weight.mT, inputs.mT @ outputs

    return run


def report(prompt: str, steps: dict[str, Callable[[], object]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):  # the first is not counted
        for name, run in steps.items():
            began = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - began)
    ours = statistics.median(seconds["vcache"])
    for name, of_name in seconds.items():
        median = statistics.median(of_name)
        spread = f"({1e3 * min(of_name):.1f}-{1e3 * max(of_name):.1f})"
        ratio = "" if name == "vcache" else f"  {median / ours:5.2f} of vcache's"
        print(f"  {prompt:<11}{name:<20}{1e3 * median:9.1f} ms {spread:<18}{ratio}")


if __name__ == "__main__":
    main()
