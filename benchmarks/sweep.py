"""What do 8 heads take in one sweep, against 8 runs one after the other, and against one run?

    python benchmarks/sweep.py [--rounds 3] [--cases slow,slower,mixed,cold,ram,compute] [--shrink 4]

Heads on clips of ViT-B/16 (noise, 400 classes), on the CPU, through `vcache sweep` and `vcache train-head`, in turns:

    slow     8 EVL heads of one layer, spatial means, from a disk that is slowed down so far that one of them waits for it
    slower   the same at half of that rate: of the 8 heads together, too, the disk is what limits
    mixed    2 such heads and 6 linear ones, from a faster disk; the run alone is that of an EVL head
    cold     8 linear heads; the store's files are dropped from this machine's page cache before every epoch
    ram      as slow, with `--resident ram`: the disk is read once, before the first epoch
    compute  8 EVL heads of two layers without pooling, page cache hot: the heads limit, not the disk

Slowed down is every read of every contestant: it takes as long as its bytes take at the stated MB/s, one read after the other.
The limit is the bytes of an epoch at the disk's rate: the stated one, or that of a plain read of the same files just before. Of
`ram` and `compute` it is the steps of all heads alone, on batches that are in memory. An epoch is timed after each head has
done one; the whole command has that one, the making of heads and the saving of weights in it. A member of the sweep must end
with the weights of its own run, bit for bit: the script fails if not (of `ram`, where only one is run alone, that one).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from noise import noise_store  # the scripts beside this one
from reader import drop_page_cache, machine
from slow_disk import SlowDisk, read_files

from vcache.heads.registry import get_head
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.training.group import TrainingEvents
from vcache.pipelines.training.preparation import prepare_head
from vcache.pipelines.training.reports import EpochReport
from vcache.pipelines.training.step import TrainingStep
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.sweep_spec import HeadGrid, SweepMember, expand
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

CPU = torch.device("cpu")
RUN = {"schedule": "constant", "lr": "1e-4", "device": "cpu", "precision": "float32", "shuffle": "full"}
POOLED = {"layers": "-1", "pooling": "spatial_mean", "temporal_cross_attention": "off"}
UNPOOLED = {"layers": "-2,-1", "temporal_cross_attention": "off"}
CONV = {"temporal_conv": ("on", "off")}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is read how, by which heads."""

    arrays: tuple[str, ...]
    heads: tuple[HeadGrid, ...]
    num_videos: int
    batch_size: int
    resident: str = "disk"
    mb_per_second: float | None = None
    """Of the slowed disk; None: it is as fast as it is."""
    cold: bool = False
    one_by_one: bool = True
    """Whether to measure the runs one after the other."""


SLOW = Case(
    arrays=("tokens/11",),
    heads=(HeadGrid(head="evl", settings=POOLED, grid=CONV, seeds=(0, 1, 2, 3)),),
    num_videos=96,
    batch_size=16,
    mb_per_second=50.0,
)
CASES = {
    "slow": SLOW,
    "slower": replace(SLOW, mb_per_second=25.0),
    "mixed": replace(
        SLOW,
        arrays=("tokens/11", "cls/11"),
        heads=(HeadGrid(head="evl", settings=POOLED, grid=CONV), HeadGrid(head="linear", seeds=(0, 1, 2, 3, 4, 5))),
        num_videos=192,
        mb_per_second=200.0,
    ),
    "cold": Case(
        arrays=("cls/11",),
        heads=(HeadGrid(head="linear", seeds=tuple(range(8))),),
        num_videos=8192,
        batch_size=64,
        cold=True,
    ),
    "ram": replace(SLOW, resident="ram", one_by_one=False),
    "compute": Case(
        arrays=("tokens/10", "tokens/11"),
        heads=(HeadGrid(head="evl", settings=UNPOOLED, grid=CONV, seeds=(0, 1, 2, 3)),),
        num_videos=32,
        batch_size=8,
    ),
}


@dataclass
class Measured:
    """One contestant in one round."""

    epochs: list[float]
    """Seconds of each after the first; of runs one after the other their sum."""
    waiting: list[float]
    """Shares of these in which the steps waited for reads."""
    command: float
    """Seconds of the whole."""


@dataclass
class Bench:
    """One case: its store, its heads, and what each contestant took, in turns so that a change of load meets them all."""

    name: str
    case: Case
    folder: Path
    store: Path
    epochs: int
    """Of each training; the first is not timed."""
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    limits: list[float] = field(default_factory=list)
    """Seconds of an epoch."""
    num_runs: int = 0

    def __post_init__(self) -> None:
        own = {**RUN, "store": str(self.store), "resident": self.case.resident, "epochs": str(self.epochs)}
        own |= {"batch_size": str(self.case.batch_size)}
        members = expand([replace(block, settings={**own, **block.settings}) for block in self.case.heads])
        self.plan = plan_sweep(members, together=len(members))
        self.disk = SlowDisk(1e6 * self.case.mb_per_second) if self.case.mb_per_second else None

    def round(self) -> None:
        members = self.plan.members if self.case.one_by_one else self.plan.members[:1]
        self.limits.append(self.limit())
        with self.disk.in_use() if self.disk else nullcontext():
            runs = [self.alone(member) for member in members]
            sweep, folder = self.sweep()
        for (_, path), member in zip(runs, members, strict=True):
            check_same(path, folder / member.folder)
        for label, one in zip(self.labels, (runs[0][0], total([run for run, _ in runs]), sweep), strict=True):
            self.measured.setdefault(label, []).append(one)

    @property
    def labels(self) -> tuple[str, str, str]:
        count = len(self.plan.members)
        return "1 run", f"{count} runs, one after the other", f"{count} heads in one sweep"

    def alone(self, member: SweepMember) -> tuple[Measured, Path]:
        path = self.next_folder()
        config = replace(member.config, out=path)
        return self.time(lambda on_epoch: train_head(config, on_epoch=on_epoch)), path

    def sweep(self) -> tuple[Measured, Path]:
        path = self.next_folder()

        def run(on_epoch: Callable[[EpochReport], None]) -> None:
            summary = run_sweep(Sweep.create(path, self.plan), TrainingEvents(on_epoch=on_epoch))
            if summary.num_failed:
                raise SystemExit(f"{summary.num_failed} heads failed: {[r.error for r in summary.results]}")

        return self.time(run), path

    def time(self, train: Callable[[Callable[[EpochReport], None]], object]) -> Measured:
        first: dict[int, EpochReport] = {}

        def on_epoch(report: EpochReport) -> None:
            if report.epoch not in first:  # of a sweep, the head that reports before the others
                first[report.epoch] = report
                self.cool()

        self.cool()
        began = time.perf_counter()
        train(on_epoch)
        command = time.perf_counter() - began
        timed = [report for epoch, report in first.items() if epoch > 0]
        shares = [report.waiting_seconds / report.seconds for report in timed]
        return Measured([report.seconds for report in timed], shares, command)

    def cool(self) -> None:
        if self.case.cold:
            drop_page_cache(self.store)

    def next_folder(self) -> Path:
        self.num_runs += 1
        return self.folder / f"{self.name}-{self.num_runs}"

    @property
    def is_limited_by_heads(self) -> bool:
        return self.name in ("ram", "compute")

    def limit(self) -> float:
        """Seconds of an epoch that nothing could beat: reading its bytes, or the steps of all heads."""
        if self.is_limited_by_heads:
            with FeatureStore.open(self.store) as store:
                return sum(self.step_seconds(member, store) for member in self.plan.members)
        if self.disk:
            return self.epoch_bytes() / self.disk.bytes_per_second
        self.cool()
        return read_files(self.store)

    def epoch_bytes(self) -> int:
        with FeatureStore.open(self.store) as store:
            row_bytes = sum(store.arrays("train")[name].row_bytes for name in self.case.arrays)
            return store.splits["train"] * row_bytes

    def step_seconds(self, member: SweepMember, store: FeatureStore) -> float:
        """An epoch of one head's steps, once it has its optimiser's state."""
        prepared = prepare_head(member.config, store, CPU)
        torch.manual_seed(0)
        head = get_head(member.config.head)(prepared.head_config).train()
        step = TrainingStep(head, prepared.recipe, prepared.precision, num_steps=1, steps_per_epoch=1)
        loader = ClipLoader(store, "train", prepared.plan, batch_size=self.case.batch_size, device=CPU)
        batches = [(batch.features(), batch.targets) for batch in loader.epoch(0)]
        step(*batches[0], 0)
        began = time.perf_counter()
        for features, targets in batches:
            step(features, targets, 0).loss.item()
        return time.perf_counter() - began

    def report(self) -> None:
        limit, gigabytes = statistics.median(self.limits), self.epoch_bytes() / 1e9
        kind = "steps in memory" if self.is_limited_by_heads else f"{gigabytes / limit * 1e3:.0f} MB/s"
        print(
            f"\n{self.name}: {len(self.plan.members)} heads, {gigabytes:.2f} GB an epoch; limit {limit:.2f} s ({kind}); "
            f"median of {len(self.limits)} rounds of {self.epochs - 1} timed epochs, load {os.getloadavg()[0]:.1f}\n"
            f"  {'':30}{'s an epoch (min-max)':>26}{'of 1 run':>10}{'limit / it':>12}{'waiting':>9}{'command, s':>12}"
        )
        alone = statistics.median(s for measured in self.measured[self.labels[0]] for s in measured.epochs)
        for label, rounds in self.measured.items():
            if label == self.labels[1] and not self.case.one_by_one:
                continue
            seconds = [s for measured in rounds for s in measured.epochs]
            median = statistics.median(seconds)
            spread = f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
            waiting = statistics.median(share for measured in rounds for share in measured.waiting)
            command = statistics.median(measured.command for measured in rounds)
            print(
                f"  {label:30}{spread:>26}{median / alone:10.2f}{limit / median:12.2f}{waiting:9.0%}{command:12.1f}",
                flush=True,
            )


def total(runs: list[Measured]) -> Measured:
    """One after the other."""
    epochs = [sum(times) for times in zip(*(run.epochs for run in runs), strict=True)]
    return Measured(epochs, [share for run in runs for share in run.waiting], sum(run.command for run in runs))


def check_same(alone: Path, member: Path) -> None:
    if (alone / "head.safetensors").read_bytes() != (member / "head.safetensors").read_bytes():
        raise SystemExit(f"{member} has other weights than the run alone: not the same training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the stores (default: the system's temporary folder)")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of each training; the first is not timed")
    parser.add_argument("--shrink", type=int, default=1, help="as many times fewer videos, to try the script")
    options = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__} with {torch.get_num_threads()} threads", flush=True)
    for name in options.cases.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            case, store = CASES[name], Path(folder, "bench.zarr")
            noise_store(store, case.arrays, max(2, case.num_videos // options.shrink))
            bench = Bench(name, case, Path(folder), store, options.epochs)
            for _ in range(options.rounds):
                bench.round()
            bench.report()


if __name__ == "__main__":
    main()
