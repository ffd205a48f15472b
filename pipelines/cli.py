"""`vcache ...`: thin commands that build a dataclass and call one function.

torch, zarr and everything that loads them are imported inside the command that needs them, so that help is instant.
"""

import inspect
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vcache.pipelines import console
from vcache.pipelines.options import LOCATION, Device, extraction_config, takes
from vcache.store.object_path import store_path

if TYPE_CHECKING:  # imported late: it loads torch and zarr
    from vcache.pipelines.request import ExtractionConfig

# With OpenMP's default the idle threads of two torch pools spin against each other and against the decode threads:
# measured twice the CPU time for nothing. Has to be set before torch loads its OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]


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
@takes(extraction_config)
def extract(config: "ExtractionConfig", as_json: Json = False) -> None:
    """Run the frozen CLIP once over sampled frames and store multi-layer features.

    The same command again resumes; with more --layers, --views or videos in the dataset, it adds them and keeps what is stored.

    A video that cannot be decoded is recorded with its reason and skipped; once its file is mended, --retry-failed fills the gap.

    With --model A --model B each model has a store of its own, and the videos are decoded once.

    Without a scheduler, --part 1/4 ... --part 4/4 on as many machines write one store together.

    \b
    [bold]Examples:[/bold]
    vcache extract k400 --layers -4:
    vcache extract ./my-videos --layers -4: --tsn
    vcache extract k400 --views 8 --augment evl --eval-views 3x1
    vcache extract k400 --dtype int8 --cross-frame maps
    vcache extract k400 --retry-failed
    """
    from dataclasses import asdict

    from vcache.pipelines.extraction import run_extractions
    from vcache.pipelines.request import per_model

    try:
        with console.extraction_screen(Path(config.dataset).absolute().name) as screen:
            summaries = run_extractions(per_model(config), screen.progress, screen.stage)
    except KeyboardInterrupt:
        console.err.print("stopped; what is committed is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    summary = max(summaries, key=lambda one: len(one.failures))
    too_many = [one.too_many_failures(config.max_failures) for one in summaries]
    if as_json:
        told = [{**asdict(one), "too_many_failures": bad} for one, bad in zip(summaries, too_many, strict=True)]
        _print_json(told if config.more_models else told[0])
    else:
        for one in summaries:
            console.print_extraction_summary(one, len(summaries))
    if any(too_many):
        _fail(
            f"{len(summary.failures)} of {summary.num_videos} videos failed, more than --max-failures "
            f"{config.max_failures:g} allows. The others are stored; "
            "mend the files and run the command again with --retry-failed, or raise --max-failures."
        )


@app.command()
@takes(extraction_config)
def plan(
    config: "ExtractionConfig",
    seconds: Annotated[float, typer.Option(min=1, help="Time to spend on measuring this machine.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and free space only: measure nothing.")] = False,
    as_json: Json = False,
) -> None:
    """What `vcache extract` with the same options would write, how long it would take, and whether that pays.

    Decoding, the forward pass and the disk are measured here, on a sample of the videos; nothing is extracted.

    The table has the choices beside it: an epoch is one view of every video, and a store pays from the epoch at which extracting
    and reading have taken less time than decoding and running the backbone again and again.

    [bold]Example:[/bold]  vcache plan k400 --layers -4: --cross-frame maps
    """
    from vcache.pipelines.plan import plan_extraction
    from vcache.pipelines.plan_screen import describe_plan, print_plan

    with console.stages() as on_stage:
        made = plan_extraction(config, seconds=None if quick else seconds, on_stage=on_stage)
    _print_json(describe_plan(made)) if as_json else print_plan(made)


@app.command("train-head")
def train_head(
    head: Annotated[str, typer.Argument(help="A head, see `vcache heads`.")],
    store: Annotated[
        str | None,
        typer.Option(help="The store to train on. Default: the one in $VCACHE_HOME that fits.", metavar=LOCATION),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A row of the paper, as k400-b16-8f: `vcache heads HEAD` lists them. --set goes before it.",
        ),
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
    views: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw from the first views of each video only; 1 is the evaluation view alone. Default: from all.",
        ),
    ] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Train although the extraction of the store has not finished.")
    ] = False,
    device: Device = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="Of the head's products: float32, bfloat16, or float16 on a GPU. auto: float32 on a CPU, half on a GPU."
        ),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Train a head from the stored features; no video is opened.

    Optimiser, schedule and length are the paper's unless set. Of a store with several training views (extract --views), every
    epoch draws one for each video.

    \b
    [bold]Examples:[/bold]
    vcache train-head evl --epochs 20 --batch-size 64 --set layers=-2:
    vcache train-head evl --preset ssv2-b16-8f
    vcache train-head evl --views 1
    """
    from dataclasses import asdict

    from vcache.pipelines.settings import parse_pairs
    from vcache.pipelines.training import TrainingConfig
    from vcache.pipelines.training import train_head as train

    flags = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr}
    given = parse_pairs(settings or []) | {name: value for name, value in flags.items() if value is not None}
    config = TrainingConfig(
        head=head,
        preset=preset,
        store=store_path(store) if store else None,
        settings=given,
        out=out,
        train_split=train_split,
        views=views,
        seed=seed,
        device=device,
        precision=precision,
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


@app.command("import-head")
def import_head(
    head: Annotated[str, typer.Argument(help="A head with official checkpoints: evl.")],
    file: Annotated[Path, typer.Argument(help="The checkpoint: .pth of torch, or .safetensors.")],
    classes: Annotated[
        Path | None,
        typer.Option(help="Names of its classes: .json, .csv of index,name, or a name per line. Default: the store's."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A field of the head that no weight tells; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: runs/HEAD-1, -2, ...")] = None,
    as_json: Json = False,
) -> None:
    """Make a run of a checkpoint of the head's official code, to evaluate it on stored features.

    Its configuration is read off the shapes of its weights, and what to extract for it is printed. No code in the file is run,
    and a file that does not fit is refused with the reason.

    \b
    [bold]Examples:[/bold]
    vcache import-head evl k400_vitb16_8f_dec4x768.pth --classes k400_class_mappings.json
    vcache import-head evl checkpoint-50000.pth --set num_frames=8 --out runs/ours
    """
    from dataclasses import asdict

    from vcache.pipelines import importing
    from vcache.pipelines.settings import parse_pairs

    summary = importing.import_head(
        importing.ImportConfig(head=head, file=file, classes=classes, settings=parse_pairs(settings or []), out=out)
    )
    _print_json(asdict(summary)) if as_json else importing.print_import(summary)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A folder written by `vcache train-head` or `vcache import-head`.")],
    store: Annotated[
        str | None,
        typer.Option(
            help="Where the store lies now, if it was moved; an imported head has none, and needs it.", metavar=LOCATION
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Default: the validation split.")] = None,
    views: Annotated[
        str | None,
        typer.Option(
            metavar="TxS",
            help="Average the scores of T views along the video times S crops, as 3x1. Default: the most the store has.",
        ),
    ] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Evaluate although the extraction of the split has not finished.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Top-1, top-5 and mean class accuracy of a trained or imported head on the validation split.

    Where the store has evaluation views (extract --eval-views), their softmax scores are averaged.

    [bold]Examples:[/bold]  vcache eval runs/evl-1  |  vcache eval runs/evl-1 --views 3x1
    """
    from dataclasses import asdict

    from vcache.pipelines.evaluation import evaluate_run
    from vcache.pipelines.stored_views import describe_grid, parse_grid

    where, grid = store_path(store) if store else None, parse_grid(views) if views else None
    metrics = evaluate_run(
        run,
        store=where,
        split=split,
        views=grid,
        device=device,
        allow_incomplete=allow_incomplete,
        on_note=lambda note: console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False),
    )
    if as_json:
        _print_json(asdict(metrics))
        return
    console.out.print(
        f"top-1 {metrics.top1:.1%}   top-5 {metrics.top5:.1%}   mean class accuracy {metrics.mean_class_accuracy:.1%}   "
        f"({metrics.num_videos} videos, {describe_grid(metrics.views)})",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="A folder written by `vcache train-head`.")],
    video: Annotated[
        str | None,
        typer.Argument(help="A video id or path of the run's store, or any video file.", metavar="[VIDEO]"),
    ] = None,
    row: Annotated[int | None, typer.Option(min=0, help="A row of the split, in place of VIDEO.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of VIDEO or row. Default: the validation split, then the others.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="The backbone layer whose decoder layer is shown, or all. Default: the last one.", metavar="N|all"
        ),
    ] = None,
    frame: Annotated[
        int | None, typer.Option(help="Frame of the clip, from 0, whose patch looks at its neighbours.")
    ] = None,
    patch: Annotated[
        str | None,
        typer.Option(help="That patch. Default: the one that the query attends to most.", metavar="ROW,COLUMN"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: RUN/explain/VIDEO-ID.")] = None,
    store: Annotated[
        str | None, typer.Option(help="Where the store lies now, if it was moved.", metavar=LOCATION)
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the videos lie, if they were moved.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw what a trained head attends to in a video, beside the attention of CLIP's own CLS token.

    The video is decoded and goes through the store's backbone once more. attention.png has the weights of the head's query over
    all frames, cross-frame.png those of one patch over the frames before and after it, explain.json the numbers.

    [bold]Examples:[/bold]  vcache explain runs/evl-1 VIDEO.mp4  |  vcache explain runs/evl-1 --row 12 --layer all
    """
    from vcache.pipelines.explaining import explain as ask
    from vcache.pipelines.explanation import Question, parse_layer, parse_patch
    from vcache.pipelines.explanation_sheets import print_explanation, write_explanation

    question = Question(
        video=video,
        row=row,
        split=split,
        layer=parse_layer(layer) if layer else None,
        frame=frame,
        patch=parse_patch(patch) if patch else None,
    )
    where = store_path(store) if store else None
    described = write_explanation(ask(run, question, store=where, root=root, device=device), out)
    _print_json(described) if as_json else print_explanation(described)


@app.command()
def info(store: Annotated[str, typer.Argument(help="A store.", metavar="STORE")], as_json: Json = False) -> None:
    """What a store holds: arrays, rows, failures, and how its features were made.

    [bold]Example:[/bold]  vcache info STORE.zarr
    """
    from vcache.pipelines.listing import describe_store, print_store

    description = describe_store(store_path(store))
    _print_json(description) if as_json else print_store(description)


@app.command()
def verify(
    store: Annotated[str, typer.Argument(help="A store.", metavar="STORE")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also extract random rows again from their videos, and compare them.")
    ] = False,
    sample: Annotated[int, typer.Option(min=1, help="For --deep: how many rows.")] = 16,
    seed: Annotated[int, typer.Option(help="For --deep: another seed takes other rows.")] = 0,
    root: Annotated[Path | None, typer.Option(help="For --deep: where the videos lie, if they were moved.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Read every committed byte of a store and check it; exit status 1 if anything is damaged or missing.

    With --deep, stored features that are not what their videos and the backbone give are found, too: another video under the
    same name, other weights. Last bits may differ on another device; the bounds are in store/compare.py.

    [bold]Examples:[/bold]  vcache verify STORE.zarr  |  vcache verify STORE.zarr --deep --sample 100
    """
    from vcache.pipelines.verification import print_verification
    from vcache.pipelines.verification import verify as run

    result = run(store_path(store), deep=sample if deep else None, seed=seed, root=root, device=device)
    _print_json(result) if as_json else print_verification(result)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def repair(
    store: Annotated[str, typer.Argument(help="A store in a local folder.", metavar="STORE")],
    root: Annotated[Path | None, typer.Option(help="Where the videos lie, if they were moved.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to mend, and change nothing.")] = False,
    decode_workers: Annotated[int, typer.Option(min=1, help="Videos decoded at the same time.")] = 2,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Verify a store and mend exactly what is damaged; exit status 1 if something is left.

    Sound rows are copied, damaged ones extracted again from their videos, and a file is replaced whole. Metadata and commit
    records are written anew from what the others say; what killed extractions left is removed.

    [bold]Examples:[/bold]  vcache repair STORE.zarr --dry-run  |  vcache repair STORE.zarr --root /where/the/videos/are
    """
    from vcache.pipelines.repairing import print_repair
    from vcache.pipelines.repairing import repair as run

    result = run(store_path(store), root=root, dry_run=dry_run, device=device, workers=decode_workers)
    _print_json(result) if as_json else print_repair(result)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command("ls")
def list_stores(
    folder: Annotated[
        str | None, typer.Argument(help="A folder, or s3://bucket/path. Default: $VCACHE_HOME.", metavar="[FOLDER]")
    ] = None,
    as_json: Json = False,
) -> None:
    """The stores in a folder.

    [bold]Example:[/bold]  vcache ls
    """
    from vcache.pipelines.listing import describe_folder, print_folder
    from vcache.pipelines.stores import vcache_home

    where = store_path(folder) if folder else vcache_home()
    rows = describe_folder(where)
    _print_json(rows) if as_json else print_folder(where, rows)


@app.command()
def heads(
    head: Annotated[str | None, typer.Argument(help="One head: its settings and presets.", metavar="[HEAD]")] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Parameters and multiply-adds, beside the paper's; nothing is run.")
    ] = False,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="For --count: this preset alone.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="For --count: this configuration; any field of the head, and model=ViT-L-14-quickgelu. May be repeated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The heads that can be trained, what each reads and what can be set.

    With HEAD: every setting with its meaning, and the rows of the paper as presets, each with the store that it is trained from.

    \b
    [bold]Examples:[/bold]
    vcache heads
    vcache heads evl
    vcache heads evl --count
    vcache heads evl --count --preset k400-b16-8f --set layers=-2: --set qkv_dim=512 --set num_heads=8
    """
    from vcache.pipelines import head_listing as listing
    from vcache.pipelines.settings import parse_pairs

    if count and head:
        from vcache.pipelines.counting import describe_count

        counts = describe_count(head, parse_pairs(settings or []), preset)
        _print_json(counts) if as_json else listing.print_counts(counts)
        return
    if count or preset or settings:
        raise typer.BadParameter("--count goes with a HEAD, --preset and --set with --count: vcache heads evl --count")
    if head:
        row = listing.describe_head(head)
        _print_json(row) if as_json else listing.print_head(row)
        return
    rows = listing.describe_heads()
    _print_json(rows) if as_json else listing.print_heads(rows)


@app.command()
def datasets(
    dataset: Annotated[
        str | None, typer.Argument(help="A name, a folder, a CSV or a list in a .txt.", metavar="[DATASET]")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the videos of DATASET lie.")] = None,
    as_json: Json = False,
) -> None:
    """The datasets that `vcache extract` knows, and the layout it expects on disk.

    With DATASET: its splits and classes, which listed videos are missing, and which videos on the disk no list names. Exit
    status 1 if a listed video is missing or the annotation is malformed; videos that no list names do no harm.

    [bold]Examples:[/bold]  vcache datasets  |  vcache datasets k400 --root /data/k400
    """
    from vcache.pipelines import dataset_listing as listing

    if dataset is None:
        if root is not None:
            raise typer.BadParameter("--root goes with a DATASET, as in  vcache datasets k400 --root FOLDER")
        rows = listing.describe_datasets()
        _print_json(rows) if as_json else listing.print_datasets(rows)
        return
    description = listing.describe_dataset(dataset, root)
    _print_json(description) if as_json else listing.print_dataset(description)
    if not description["ok"]:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the videos, the store and the runs.")] = Path("vcache-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the heads.")] = 0,
    tca_gain: Annotated[
        float,
        typer.Option(
            help="Also train EVL with its cross-frame attention term times this (ours; the paper's is 1). With --ablation: "
            "in every row that has it."
        ),
    ] = 1.0,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation",
            help="Train EVL's Table 8 in place of three heads: each choice of temporal modules, each depth, over several seeds.",
        ),
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="For --ablation: seeds 0 to N-1. Default: 3", metavar="N")
    ] = None,
    as_json: Json = False,
) -> None:
    """Render a small world of moving shapes, extract it with a tiny CLIP, train three heads: everything, offline, in minutes.

    With --ablation, EVL's Table 8 from the same store, beside the paper's numbers. Runs that are finished are not trained again:
    the command goes on after a stop, and trains only what more seeds add.

    [bold]Examples:[/bold]  vcache demo  |  vcache demo --ablation --seeds 3
    """
    if ablation:
        if seed:
            raise typer.BadParameter("--ablation takes --seeds N, for seeds 0 to N-1, in place of --seed")
        _demo_ablation(out, seeds or 3, tca_gain, as_json)
        return
    if seeds is not None:
        raise typer.BadParameter("--seeds goes with --ablation; the seed of one demo is --seed")
    from vcache.pipelines.demo.run import print_demo, run_demo

    result = run_demo(out, seed=seed, tca_gain=tca_gain, show=not as_json)
    _print_json(result) if as_json else print_demo(result)


def _demo_ablation(out: Path, seeds: int, tca_gain: float, as_json: bool) -> None:
    from vcache.pipelines.demo.ablation import run_ablation
    from vcache.pipelines.demo.ablation_screen import print_ablation

    try:
        result = run_ablation(out, seeds=seeds, tca_gain=tca_gain, show=not as_json)
    except KeyboardInterrupt:
        console.err.print("stopped; finished runs are kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    _print_json(result) if as_json else print_ablation(result)
    if failed := result["failed"]:
        _fail(f"{console.count(len(failed), 'run')} failed, see above. The same command trains them again.")


def _flowing(text: str) -> str:
    """A docstring for any width: paragraphs without line breaks, each example on a line of its own."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("[bold]Example"):
            title, _, examples = paragraph.partition("  ")
            paragraph = "\n".join(["\b", title, *examples.split("  |  ")])
        elif not paragraph.startswith("\b"):
            paragraph = " ".join(paragraph.split())
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


for _command in app.registered_commands:
    _command.help = _flowing((_command.callback and _command.callback.__doc__) or "")


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
