"""What does the training engine cost beside the steps themselves, and a checkpoint beside writing its bytes?

    python benchmarks/engine.py [--rounds 5] [--videos 2048] [--checkpoints 3]

Steps: linear heads on one layer of CLS, batches of 8, kept in memory: the smallest steps there are, so that all else shows.
The limit is TrainingStep alone on the same batches. Epochs of one head and of 8 side by side give what a head adds to a step
(its random state, its share of loss and hits, waiting for them) and what each step costs whatever the heads are (gathering the
batch, pace, asking for a stop). A line of steps.jsonl and TensorBoard is timed apart, as a run has a thousand of them.

Checkpoints: EVL for ViT-B/16 with 4 layers, all modules: weights and AdamW's moments. The limit is `write` and `fsync` of as
many bytes to a file beside it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from noise import noise_store  # the scripts beside this one
from reader import machine
from torch import Tensor

from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures, Recipe
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.runs import Run
from vcache.pipelines.training.engine import TrainingLoop
from vcache.pipelines.training.head_training import HeadTraining
from vcache.pipelines.training.mixed_precision import MixedPrecision
from vcache.pipelines.training.random_state import RandomState
from vcache.pipelines.training.reports import StepReport
from vcache.pipelines.training.step import TrainingStep
from vcache.store.reader import FeatureStore

CPU = torch.device("cpu")
PRECISION = MixedPrecision(name="float32", device=CPU)
PLAN = ReadPlan(tokens={}, cls={-1: 11}, maps={}, embed=False)
RECIPE = Recipe(lr=1e-4, weight_decay=0.01, epochs=1, batch_size=8, schedule="constant")
HEADS = 8
EPOCHS = 3
"""Of each training; the first is not timed."""


@dataclass
class Steps:
    """Seconds of an epoch of as many steps: bare, and in the engine with one head and with several."""

    loader: ClipLoader
    folder: Path
    num_made: int = 0

    def bare(self) -> float:
        torch.manual_seed(0)
        step = TrainingStep(linear(), RECIPE, PRECISION, num_steps=1, steps_per_epoch=1)
        batches = [(batch.features(), batch.targets) for batch in self.loader.epoch(0)]
        step(*batches[0], 0)
        began = time.perf_counter()
        for features, targets in batches:
            step(features, targets, 0)
        return time.perf_counter() - began

    def engine(self, num_heads: int) -> float:
        seconds: dict[int, float] = {}
        loop = TrainingLoop(
            heads=[self.head() for _ in range(num_heads)],
            train=self.loader,
            val=None,
            num_classes=400,
            on_epoch=lambda report: seconds.setdefault(report.epoch, report.seconds),  # type: ignore[func-returns-value]
        )
        with mock.patch("vcache.pipelines.training.logs.MAX_STEP_LINES", 1):
            loop.run()
        return statistics.median(seconds[epoch] for epoch in range(1, EPOCHS))

    def head(self) -> HeadTraining:
        self.num_made += 1
        run = Run.create(self.folder / f"run-{self.num_made}", {"head": "linear"}, None)
        steps_per_epoch = len(self.loader)
        return HeadTraining(
            run.path.name,
            linear(),
            PLAN,
            RECIPE,
            PRECISION,
            RandomState(0, CPU),
            run,
            num_steps=EPOCHS * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            seed=0,
        )

    def log_line(self) -> float:
        """Seconds of one."""
        head = self.head()
        report = StepReport(
            heads=(),
            steps_per_second=1.0,
            read_bytes_per_second=1.0,
            waiting=0.0,
            limited_by=None,
            source="",
            seconds_left=None,
        )
        head.log.append_step(head.progress(0), report)  # makes the files
        began = time.perf_counter()
        for step in range(1, 201):
            head.step = step
            head.log.append_step(head.progress(0), report)
        return (time.perf_counter() - began) / 200


def linear() -> torch.nn.Module:
    head = get_head("linear")
    return head(head.Config(num_classes=400)).train()


def measure_steps(loader: ClipLoader, folder: Path, rounds: int) -> None:
    steps, num = Steps(loader, folder), len(loader)
    bare, one, several, lines = [], [], [], []
    for _ in range(rounds):
        bare.append(steps.bare() / num)
        one.append(steps.engine(1) / num)
        several.append(steps.engine(HEADS) / num)
        lines.append(steps.log_line())
    of_head = [(many - alone) / (HEADS - 1) - limit for many, alone, limit in zip(several, one, bare, strict=True)]
    of_step = [alone - limit - own for alone, limit, own in zip(one, bare, of_head, strict=True)]
    print(f"steps, microseconds, median of {rounds} (min-max); {num} steps an epoch, {len(loader.rows)} videos")
    rows = {
        "TrainingStep alone, in memory: the limit": bare,
        "engine, 1 head, a step": one,
        f"engine, {HEADS} heads, a step": several,
        "what the engine adds for each head": of_head,
        "what it adds for each step": of_step,
        "a line of the logs": lines,
    }
    for label, seconds in rows.items():
        print(f"  {label:44}{microseconds(seconds):>28}")
    ratio = HEADS * statistics.median(bare) / statistics.median(several)
    print(
        f"  limit / engine: {statistics.median(bare) / statistics.median(one):.2f} with 1 head, {ratio:.2f} with {HEADS}"
    )


def microseconds(seconds: list[float]) -> str:
    low, middle, high = (1e6 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


def measure_checkpoints(folder: Path, count: int) -> None:
    evl = get_head("evl")
    run = Run.create(folder / "evl", {"head": "evl"}, None)
    random = RandomState(0, CPU)
    with random.active():
        head = evl(evl.Config(num_classes=400))
    options = {"num_steps": 2, "steps_per_epoch": 2, "seed": 0}
    plan = ReadPlan(tokens={}, cls={}, maps={}, embed=False)
    training = HeadTraining("evl", head, plan, evl.recipe, PRECISION, random, run, **options)
    training._train_step(
        noise_features(), torch.zeros(1, dtype=torch.long), 0
    )  # AdamW's moments come with the first step
    saving, limit = list[float](), list[float]()
    for number in range(1, count + 1):
        saving.append(seconds_of(lambda number=number: training.save_checkpoint(number, 0, 1)))  # type: ignore[misc]
        size = sum(path.stat().st_size for path in training.checkpoints.folder.glob(f"{number:08}.*"))
        data = os.urandom(1 << 20) * (size >> 20)
        limit.append(seconds_of(lambda data=data: write(folder / "plain", data)))  # type: ignore[misc]
        (folder / "plain").unlink()
    pairs = [plain / own for plain, own in zip(limit, saving, strict=True)]
    print(
        f"checkpoint of EVL, {training.num_parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB, median of {count} (min-max)"
    )
    for label, seconds in (("write + fsync of as many bytes: the limit", limit), ("checkpoint", saving)):
        print(f"  {label:44}{statistics.median(seconds):8.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")
    print(f"  limit / checkpoint: {statistics.median(pairs):.2f} ({min(pairs):.2f}-{max(pairs):.2f})")


def noise_features() -> ClipFeatures:
    """Of one clip."""
    generator, layers = torch.Generator().manual_seed(0), (-4, -3, -2, -1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    maps = {layer: draw(1, 7, 2, 196, 196).softmax(-1) for layer in layers}
    return ClipFeatures(tokens={layer: draw(1, 8, 197, 768) for layer in layers}, maps=maps)


def write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--videos", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoints", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__} with {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        with FeatureStore.open(noise_store(folder / "bench.zarr", ["cls/11"], options.videos)) as store:
            loader = ClipLoader(store, "train", PLAN, batch_size=8, device=CPU, resident="ram")
            measure_steps(loader, folder, options.rounds)
        measure_checkpoints(folder, options.checkpoints)


if __name__ == "__main__":
    main()
