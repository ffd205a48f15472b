"""`vcache demo`: the main job, end to end and offline, on a world where only the order of frames tells the classes apart.

Each step prints the command that a user would type for it and then calls the function behind that command.
"""

import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.demo.motions import MOTIONS
from vcache.pipelines.demo.render import TINY_CLIP, render_world
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import next_run_folder
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.screen import training_bar
from vcache.pipelines.training.train_head import train_head

# Chosen for 400 clips of a 128-wide backbone; the paper's 50,000 steps of 256 clips and dropout 0.5 are for Kinetics.
EVL_SETTINGS = {"epochs": 20, "batch_size": 16, "lr": 2e-3, "mlp_dropout": 0.1, "cls_dropout": 0.1}
LINEAR_SETTINGS = {"epochs": 30, "batch_size": 32}
TEMPORAL_MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")


@dataclass(frozen=True)
class DemoHead:
    """A row of the demo's table."""

    label: str
    head: str
    settings: Mapping[str, Any]


def demo_heads(tca_gain: float) -> list[DemoHead]:
    """The three heads of EVL's Table 8 in miniature, and a fourth when another gain than the paper's is asked for."""
    without = {name: False for name in TEMPORAL_MODULES}
    heads = [
        DemoHead("linear: mean of CLS", "linear", LINEAR_SETTINGS),
        DemoHead("EVL without temporal modules", "evl", {**EVL_SETTINGS, **without}),
        DemoHead("EVL with T-Conv, T-PE and T-CA", "evl", EVL_SETTINGS),
    ]
    if tca_gain != 1.0:
        settings = {**EVL_SETTINGS, "tca_gain": tca_gain}
        heads.append(DemoHead(f"EVL with all, T-CA x {tca_gain:g} (ours, not the paper's)", "evl", settings))
    return heads


def run_demo(
    out: Path, *, seed: int = 0, tca_gain: float = 1.0, train: int = 400, val: int = 200, show: bool = True
) -> dict[str, Any]:
    """Render, extract, train and evaluate under `out`; what is there from an earlier demo is used again.

    Returns a dict with the table's rows, chance, seconds of each stage, and the paths of everything written.
    """
    store, seconds = prepare_world(out, train=train, val=val, show=show)
    rows = [_train(row, out, store, seed, show) for row in demo_heads(tca_gain)]
    for row in rows:
        seconds[row["head"]] = row["seconds"]
    return {
        "rows": rows,
        "chance": 1 / len(MOTIONS),
        "seconds": seconds,
        "videos": str(out / "world"),
        "store": str(store),
        "runs": str(out / "runs"),
    }


def prepare_world(out: Path, *, train: int, val: int, show: bool) -> tuple[Path, dict[str, float]]:
    """Render `out/world` and extract it into `out/world.zarr`; what is there is used again.

    Returns the store, and the seconds that "render" and "extract" took.
    """
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    csv = _render(out / "world", train, val, show)
    seconds["render"] = time.perf_counter() - began

    store = out / "world.zarr"
    extraction = ExtractionConfig(
        dataset=str(csv),
        layers="-4:",
        tsn=True,
        model=f"local-dir:{TINY_CLIP}",
        pretrained=None,
        store=store,
    )
    _say(show, "extract", csv, "--layers", "-4:", "--tsn", "--model", extraction.model, "--store", store)
    began = time.perf_counter()
    with console.extraction_screen("extract") as screen:
        summary = run_extraction(extraction, screen.progress, screen.stage)
    seconds["extract"] = time.perf_counter() - began
    if show:
        console.print_extraction_summary(summary)
    return store, seconds


def print_demo(result: dict[str, Any]) -> None:
    """The table of accuracies, chance beside them, and where everything is."""
    table = Table(title="Which of ten motions? Only the order of the frames tells", title_justify="left")
    table.add_column("head")
    for column in ("top-1", "chance", "training"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(row["head"], f"{row['top1']:.1%}", f"{result['chance']:.0%}", f"{row['seconds']:.0f} s")
    console.out.print(table)
    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in list(result["seconds"].items())[:2])
    console.out.print(
        "A head that ignores the order cannot pass 50%: the motions are five pairs, each the other played backwards.\n"
        f"{times}. Every head was trained from the same store; no video was opened again.",
        highlight=False,
        soft_wrap=True,
    )
    for name in ("videos", "store", "runs"):
        console.out.print(f"  {name:<7}{result[name]}", highlight=False, soft_wrap=True)


def _render(folder: Path, train: int, val: int, show: bool) -> Path:
    if show:
        console.out.print(
            f"rendering {train + val} videos of moving shapes into {folder}", highlight=False, soft_wrap=True
        )
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("videos"))
    with Progress(*columns, console=console.err) as progress:
        task = progress.add_task("render", total=train + val)
        return render_world(
            folder,
            train=train,
            val=val,
            level="easy",
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _train(row: DemoHead, out: Path, store: Path, seed: int, show: bool) -> dict[str, Any]:
    run = next_run_folder(row.head, out / "runs")
    config = TrainingConfig(head=row.head, store=store, settings=row.settings, out=run, seed=seed)
    pairs = [word for name, value in row.settings.items() for word in ("--set", f"{name}={value}")]
    _say(show, "train-head", row.head, "--store", store, *pairs, "--out", run)
    began = time.perf_counter()
    with training_bar(row.head, epoch_lines=False) as screen:
        train_head(config, **screen.callbacks)
    metrics = evaluate_run(run)
    return {"head": row.label, "run": str(run), "seconds": time.perf_counter() - began, **asdict(metrics)}


def _say(show: bool, *words: Any) -> None:
    """The command behind the next step, as a user would type it here."""
    if show:
        command = shlex.join(str(word).replace(f"{Path.cwd()}/", "") for word in words)
        console.out.print(f"\n$ vcache {command}", highlight=False, soft_wrap=True, markup=False)
