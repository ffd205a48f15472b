"""Train the tiny CLIP of the demo: `python -m vcache.pipelines.demo.train_tiny_clip --out DIR`, about 25 minutes of one core.

What makes it work is the order of difficulty. First every batch shows each of the 48 seen combinations once, large and
plain at the start and anywhere on anything at the end, with captions that name colour and shape only. Then come two
objects, sizes and places, each combination twice per batch. With everything from step 0 the model learns colours and
places and stays at chance on the shapes for more than twice the time.
"""

import argparse
import gzip
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Float, UInt8
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from vcache.pipelines.demo.stills import (
    COMBINATIONS,
    HELD_OUT,
    SEEN,
    Difficulty,
    Still,
    combination_name,
    draw_stills,
    random_still,
)

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
VOCABULARY_FILE = "bpe_2k.txt.gz"

CONTEXT_LENGTH = 24
# 256 bytes, the same 256 at the end of a word, start and end of text, and the merges: 2048 together. CLIP's own 49408
# would be 12.6 MB of embeddings; with bytes to fall back to, no word is unknown to the short vocabulary either.
NUM_MERGES = 1534
VOCABULARY_SIZE = 2048
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "quick_gelu": False,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": VOCABULARY_SIZE,
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
_TEST_SEED = 10**6  # of the stills that no training step draws


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the weights depend on, but the versions of the libraries and the kind of processor."""

    steps: int = 2300
    easy_share: float = 1500 / 2300  # of the steps that show one object with a short caption
    repeats: int = 2  # of each seen combination in a batch of the steps after those
    lr: float = 1.2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    threads: int = 1  # sums of another number of threads round differently: the same to three digits, not bit by bit

    @property
    def easy_steps(self) -> int:
        """How many steps the first phase has."""
        return round(self.steps * self.easy_share)


def train_tiny_clip(
    out: Path, recipe: Recipe, *, evaluate_every: int = 100, num_test_stills: int = 1024
) -> dict[str, float]:
    """Train, write the folder that `local-dir:` loads, and return the zero-shot accuracies of what was written.

    Writes the config, the vocabulary, the weights in float16 (again at each evaluation) and log.txt, one JSON per line.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    write_vocabulary(out / VOCABULARY_FILE)
    (out / CONFIG_FILE).write_text(json.dumps(CONFIG, indent=1) + "\n")
    tokenizer = load_tokenizer(out)
    model = open_clip.create_model(f"local-dir:{out}", load_weights=False).train()
    optimizer = _optimizer(model, recipe)
    batches = np.random.default_rng(recipe.seed)
    with (out / "log.txt").open("w") as file:
        log = _logger(file.write, file.flush)
        log(recipe=asdict(recipe), torch=torch.__version__, open_clip=open_clip.__version__)
        average = math.nan
        for step in range(recipe.steps):
            loss = _train_step(model, optimizer, tokenizer, random_batch(batches, step, recipe), step, recipe)
            average = loss if step == 0 else 0.97 * average + 0.03 * loss
            if (step + 1) % evaluate_every == 0 and step + 1 < recipe.steps:
                save_weights(model, out)
                log(step=step + 1, loss=round(average, 3), **zero_shot(model, tokenizer, num_test_stills // 2))
        save_weights(model, out)
        saved = open_clip.create_model(f"local-dir:{out}")
        accuracies = zero_shot(saved, tokenizer, num_test_stills)
        digest = hashlib.sha256((out / WEIGHTS_FILE).read_bytes()).hexdigest()
        log(step=recipe.steps, loss=round(average, 3), **accuracies, num_test_stills=num_test_stills, sha256=digest)
    return accuracies


def random_batch(rng: np.random.Generator, step: int, recipe: Recipe) -> list[Still]:
    """The stills of one step: never two with the same caption, which the loss would tell apart."""
    if step < recipe.easy_steps:
        done = step / recipe.easy_steps
        easy = Difficulty(two_objects=0.0, full_caption=False, smallest=0.45 - 0.28 * done, spread=0.1 + 0.9 * done)
        return [random_still(rng, [SEEN[index]], easy) for index in rng.permutation(len(SEEN))]
    stills: dict[str, Still] = {}
    for index in np.concatenate([rng.permutation(len(SEEN)) for _ in range(recipe.repeats)]):
        still = random_still(rng, [SEEN[index]])
        while still.caption in stills:
            still = random_still(rng, [SEEN[index]])
        stills[still.caption] = still
    return list(stills.values())


def to_model_input(pictures: UInt8[Tensor, "N S S 3"]) -> Float[Tensor, "N 3 S S"]:
    """What the `preprocess_cfg` of CONFIG does with pictures that have the size already."""
    return (pictures.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def zero_shot(model: open_clip.CLIP, tokenizer: SimpleTokenizer, num_stills: int) -> dict[str, float]:
    """Top-1 by the names alone, on `num_stills` of the seen and as many of the held-out combinations, one object each.

    "seen" and "held_out" choose among all 64 names (chance 1.6%), "held_out_of_16" among the 16 held-out ones (6.2%).
    """
    rng = np.random.default_rng(_TEST_SEED)
    stills = [random_still(rng, SEEN, _ONE_OBJECT) for _ in range(num_stills)]
    new_stills = [random_still(rng, HELD_OUT, _ONE_OBJECT) for _ in range(num_stills)]
    scores, labels = _similarity(model, tokenizer, new_stills)
    absent = torch.tensor([combination in SEEN for combination in COMBINATIONS])
    among = scores.masked_fill(absent, -math.inf)
    return {
        "seen": _top1(*_similarity(model, tokenizer, stills)),
        "held_out": _top1(scores, labels),
        "held_out_of_16": _top1(among, labels),
    }


def load_tokenizer(folder: Path) -> SimpleTokenizer:
    """The tokenizer of a folder written here; by default open_clip gives ids of 49408 words, which the model lacks."""
    return SimpleTokenizer(bpe_path=str(folder / VOCABULARY_FILE), context_length=CONTEXT_LENGTH)


def write_vocabulary(path: Path) -> None:
    """The first merges of CLIP's byte-pair encoding, as the same kind of file; equal bytes for one zlib."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: 1 + NUM_MERGES]  # the first line is a header
    # No newline at the end: it would be read as one merge more. No time and no name in the gzip header.
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def save_weights(model: nn.Module, folder: Path) -> None:
    """The weights in float16, readable by all: safetensors itself makes files that only their owner can read."""
    path = folder / WEIGHTS_FILE
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, path)
    path.chmod(0o644)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description="Train the tiny CLIP of `vcache demo` on rendered stills.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; load it with local-dir:DIR")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="default: %(default)s")
    parser.add_argument("--test-stills", type=int, default=1024, help="of each kind at the end; default: %(default)s")
    chosen = parser.parse_args(arguments)
    recipe = Recipe(steps=chosen.steps, seed=chosen.seed, threads=chosen.threads)
    print(json.dumps(train_tiny_clip(chosen.out, recipe, num_test_stills=chosen.test_stills)))


_ONE_OBJECT = Difficulty(two_objects=0.0)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW as CLIP has it: no weight decay of biases, norms and the temperature."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6)


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up times a cosine to zero."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _train_step(
    model: open_clip.CLIP,
    optimizer: torch.optim.Optimizer,
    tokenizer: SimpleTokenizer,
    stills: list[Still],
    step: int,
    recipe: Recipe,
) -> float:
    pictures = draw_stills(stills, noise_seed=recipe.seed * 10**6 + step)
    image, text, scale = model(to_model_input(pictures), tokenizer([still.caption for still in stills]))
    loss = open_clip.ClipLoss()(image, text, scale)
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(step, recipe)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))  # as CLIP's paper, section 2.5
    return loss.item()


@torch.no_grad()
def _similarity(
    model: open_clip.CLIP, tokenizer: SimpleTokenizer, stills: list[Still]
) -> tuple[Float[Tensor, "N 64"], Tensor]:
    """Cosine of each still to each of the 64 names, and the index of the right one."""
    was_training = model.training
    model.eval()
    names = normalize(model.encode_text(tokenizer([combination_name(pair) for pair in COMBINATIONS])), dim=-1)
    pictures = to_model_input(draw_stills(stills))
    embedded = normalize(torch.cat([model.encode_image(some) for some in pictures.split(256)]), dim=-1)
    model.train(was_training)
    return embedded @ names.T, torch.tensor([COMBINATIONS.index(still.combination) for still in stills])


def _top1(scores: Float[Tensor, "N 64"], labels: Tensor) -> float:
    return round((scores.argmax(1) == labels).float().mean().item(), 4)


def _logger(write: Callable[[str], Any], flush: Callable[[], Any]) -> Callable[..., None]:
    began, cpu_began = time.perf_counter(), time.process_time()

    def log(**values: Any) -> None:
        spent = {"wall": round(time.perf_counter() - began), "cpu": round(time.process_time() - cpu_began)}
        write(json.dumps({**values, **spent}) + "\n")
        flush()

    return log


if __name__ == "__main__":
    main()
