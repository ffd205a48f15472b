"""`vcache ...`: thin commands that build a dataclass and call one function.

torch, zarr and everything that loads them are imported inside the command that needs them, so that help is instant.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vcache.pipelines import console

# With OpenMP's default the idle threads of two torch pools spin against each other and against the decode threads:
# measured twice the CPU time for nothing. Has to be set before torch loads its OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Panels of `vcache extract --help`: the first is what the store's key is made of.
VALUES = "What the features are (another value is another store)"
CONTENT = "What is stored, and where"
RUNNING = "How it runs"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:1 ...")]


def _print_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(f"vcache {version('vcache')}")
        raise typer.Exit
    return asked


@app.callback(no_args_is_help=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Extract frozen CLIP video features once, train video-recognition heads on them many times."""


@app.command()
def extract(
    dataset: Annotated[
        str, typer.Argument(help="k400, a folder of class folders, or a CSV file path,label\\[,split].")
    ],
    layers: Annotated[
        str,
        typer.Option(
            rich_help_panel=CONTENT,
            help="Blocks whose tokens are kept: -4: (the last four), 0,3,6, all.",
            metavar="LAYERS",
        ),
    ] = "-4:",
    split: Annotated[
        str | None, typer.Option(rich_help_panel=CONTENT, help="Splits to extract, as train,val. Default: all.")
    ] = None,
    frames: Annotated[int, typer.Option(rich_help_panel=VALUES, help="Frames of a clip.")] = 8,
    stride: Annotated[
        int, typer.Option(rich_help_panel=VALUES, help="Frames of the video between two of the clip.")
    ] = 16,
    tsn: Annotated[
        bool,
        typer.Option(
            "--tsn", rich_help_panel=VALUES, help="Centres of equal segments of the whole video, not a strided clip."
        ),
    ] = False,
    cross_frame: Annotated[
        str,
        typer.Option(
            rich_help_panel=CONTENT,
            help="For attention between frames. qk: store queries and keys of the layers; maps: the softmax maps, 4.5 times "
            "smaller than both for ViT-B/16; derive: what enters the layers, from which training makes Q/K again, 2.4 times "
            "smaller than tokens with Q/K; none.",
        ),
    ] = "qk",
    dtype: Annotated[str, typer.Option(rich_help_panel=VALUES, help="float16 or float32.")] = "float16",
    model: Annotated[
        str, typer.Option(rich_help_panel=VALUES, help="An open_clip model name, or local-dir:FOLDER.")
    ] = "ViT-B-16-quickgelu",
    pretrained: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=VALUES,
            help="A tag of that model in open_clip, or a checkpoint file. \\[default: openai]",
            show_default=False,
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", rich_help_panel=VALUES, help="Use a backbone that was never trained (tests only)."
        ),
    ] = False,
    preprocess: Annotated[
        str,
        typer.Option(
            rich_help_panel=VALUES,
            help="fast: uint8 tensors, within 2/255 of open_clip's transform; exact: equal to it, with PIL.",
        ),
    ] = "fast",
    root: Annotated[
        Path | None, typer.Option(rich_help_panel=CONTENT, help="Folder of the videos. Default: $VCACHE_DATA/DATASET.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=CONTENT,
            help="Where to write, or the store to extend. Default: a name of its own in $VCACHE_HOME.",
        ),
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(rich_help_panel=CONTENT, help="Share held out as val where the dataset has no splits of its own."),
    ] = 0.2,
    workers: Annotated[
        int | None,
        typer.Option(rich_help_panel=RUNNING, help="Decode threads. \\[default: the cores]", show_default=False, min=1),
    ] = None,
    batch_size: Annotated[int, typer.Option(rich_help_panel=RUNNING, help="Clips in one forward pass.")] = 4,
    max_failures: Annotated[
        float,
        typer.Option(
            rich_help_panel=RUNNING, help="Share of videos that may fail (at least one) before the exit status is 1."
        ),
    ] = 0.01,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run the frozen CLIP once over sampled frames and store multi-layer features.

    The same command again resumes; with more --layers, or more videos in the dataset, it adds them and keeps what is stored.

    A video that cannot be decoded is recorded with its reason and skipped.

    [bold]Example:[/bold]  vcache extract k400 --layers -4:
    """
    from dataclasses import asdict

    from vcache.pipelines.extraction import ExtractionConfig, run_extraction

    config = ExtractionConfig(
        dataset=dataset,
        layers=layers,
        split=tuple(name.strip() for name in split.split(",")) if split else None,
        frames=frames,
        stride=stride,
        tsn=tsn,
        cross_frame=cross_frame,
        dtype=dtype,
        model=model,
        pretrained=pretrained or _default_pretrained(model, random_weights),
        random_weights=random_weights,
        preprocess=preprocess,
        root=root,
        store=store,
        val_fraction=val_fraction,
        device=device,
        workers=workers or os.cpu_count() or 1,
        batch_size=batch_size,
        max_failures=max_failures,
    )
    try:
        with console.extraction_bar(Path(dataset).absolute().name) as on_progress:
            summary = run_extraction(config, on_progress)
    except KeyboardInterrupt:
        console.err.print("stopped; what is committed is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    too_many = summary.too_many_failures(max_failures)
    if as_json:
        _print_json({**asdict(summary), "too_many_failures": too_many})
    else:
        console.print_extraction_summary(summary)
    if too_many:
        _fail(
            f"{len(summary.failures)} of {summary.num_videos} videos failed, more than --max-failures {max_failures:g} allows. "
            "The others are stored; mend the files and extract into a new --store, or raise --max-failures."
        )


@app.command("train-head")
def train_head(
    head: Annotated[str, typer.Argument(help="A head, see `vcache heads`.")],
    store: Annotated[
        Path | None, typer.Option(help="The store to train on. Default: the one in $VCACHE_HOME that fits.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any field of the head or of its recipe; may be repeated."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the train split. Default: the paper's length.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips in one step. Default: the paper's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the paper's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights, the order and the dropout.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: runs/HEAD-1, -2, ...")] = None,
    train_split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Train although the extraction of the store has not finished.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a head from the stored features; no video is opened.

    Optimiser, schedule and length are the paper's unless set.

    [bold]Example:[/bold]  vcache train-head evl --epochs 20 --batch-size 64 --set layers=-2:
    """
    from dataclasses import asdict

    from vcache.pipelines.settings import parse_pairs
    from vcache.pipelines.training import TrainingConfig
    from vcache.pipelines.training import train_head as train

    flags = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr}
    given = parse_pairs(settings or []) | {name: value for name, value in flags.items() if value is not None}
    config = TrainingConfig(
        head=head,
        store=store,
        settings=given,
        out=out,
        train_split=train_split,
        seed=seed,
        device=device,
        allow_incomplete=allow_incomplete,
    )
    with console.training_bar(head) as screen:
        summary = train(config, on_plan=screen.plan, on_step=screen.step, on_epoch=screen.epoch)
    if as_json:
        _print_json(asdict(summary))
        return
    console.out.print(f"[bold]{escape(summary.run)}[/bold]", soft_wrap=True)
    if summary.last.val_top1 is not None:
        console.out.print(
            f"  top-1 {summary.last.val_top1:.1%} of {summary.num_val} validation videos", highlight=False
        )
    command = shlex.join(["vcache", "eval", summary.run])
    console.out.print(f"  evaluate with:  {escape(command)}", soft_wrap=True, highlight=False)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A folder written by `vcache train-head`.")],
    store: Annotated[Path | None, typer.Option(help="Where the store lies now, if it was moved.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: the validation split.")] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Evaluate although the extraction of the split has not finished.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Top-1, top-5 and mean class accuracy of a trained head on the validation split.

    [bold]Example:[/bold]  vcache eval runs/evl-1
    """
    from dataclasses import asdict

    from vcache.pipelines.evaluation import evaluate_run

    metrics = evaluate_run(run, store=store, split=split, device=device, allow_incomplete=allow_incomplete)
    if as_json:
        _print_json(asdict(metrics))
        return
    console.out.print(
        f"top-1 {metrics.top1:.1%}   top-5 {metrics.top5:.1%}   mean class accuracy {metrics.mean_class_accuracy:.1%}   "
        f"({metrics.num_videos} videos)",
        highlight=False,
    )


@app.command()
def info(store: Annotated[Path, typer.Argument(help="A store.")], as_json: Json = False) -> None:
    """What a store holds: arrays, rows, failures, and how its features were made.

    [bold]Example:[/bold]  vcache info STORE.zarr
    """
    from vcache.pipelines.listing import describe_store, print_store

    description = describe_store(store)
    _print_json(description) if as_json else print_store(description)


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="A store.")], as_json: Json = False) -> None:
    """Read every committed byte of a store and check it; exit status 1 if anything is damaged or missing.

    [bold]Example:[/bold]  vcache verify STORE.zarr
    """
    from vcache.pipelines.verification import print_verification
    from vcache.pipelines.verification import verify as run

    result = run(store)
    _print_json(result) if as_json else print_verification(result)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command("ls")
def list_stores(
    folder: Annotated[Path | None, typer.Argument(help="Default: $VCACHE_HOME.")] = None, as_json: Json = False
) -> None:
    """The stores in a folder.

    [bold]Example:[/bold]  vcache ls
    """
    from vcache.pipelines.listing import describe_folder, print_folder
    from vcache.pipelines.stores import vcache_home

    where = folder or vcache_home()
    rows = describe_folder(where)
    _print_json(rows) if as_json else print_folder(where, rows)


@app.command()
def heads(as_json: Json = False) -> None:
    """The heads that can be trained, what each reads and what can be set.

    [bold]Example:[/bold]  vcache heads
    """
    from vcache.pipelines.listing import describe_heads, print_heads

    rows = describe_heads()
    _print_json(rows) if as_json else print_heads(rows)


@app.command()
def datasets(as_json: Json = False) -> None:
    """The datasets that `vcache extract` knows, and the layout it expects on disk.

    [bold]Example:[/bold]  vcache datasets
    """
    from vcache.pipelines.listing import describe_datasets, print_datasets

    rows = describe_datasets()
    _print_json(rows) if as_json else print_datasets(rows)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the videos, the store and the runs.")] = Path("vcache-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the heads.")] = 0,
    tca_gain: Annotated[
        float,
        typer.Option(help="Also train EVL with its cross-frame attention term times this (ours; the paper's is 1)."),
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Render a small world of moving shapes, extract it with a tiny CLIP, train three heads: everything, offline, in minutes.

    [bold]Example:[/bold]  vcache demo
    """
    from vcache.pipelines.demo.run import print_demo, run_demo

    result = run_demo(out, seed=seed, tca_gain=tca_gain, show=not as_json)
    _print_json(result) if as_json else print_demo(result)


def main() -> None:
    """Entry point: a foreseen error is one message and exit status 1 (2 for usage), an interruption 130."""
    try:
        app()
    except KeyboardInterrupt:
        console.err.print("stopped")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("VCACHE_TRACEBACK"):
            raise
        _fail(_message(error))


def _message(error: Exception) -> str:
    """Our own errors and the system's explain themselves; anything else is a bug of ours and says how to see it."""
    if type(error).__module__.startswith("vcache.") or isinstance(error, OSError):
        return str(error)
    return (
        f"{type(error).__name__}: {error}\n"
        "This is not an error vcache foresaw. Run again with VCACHE_TRACEBACK=1 to see where, and please report it."
    )


def _fail(message: str) -> None:
    console.err.print("[bold red]error:[/bold red]", end=" ")
    console.err.print(message, soft_wrap=True, markup=False, highlight=False)
    sys.exit(1)


def _print_json(value: Any) -> None:
    """Plain JSON on standard output, not wrapped and not coloured."""
    print(json.dumps(value, indent=2, default=str))


def _default_pretrained(model: str, random_weights: bool) -> str | None:
    """A local-dir model brings its weights, random ones have none; any other is OpenAI's unless said."""
    return None if random_weights or model.startswith("local-dir:") else "openai"
