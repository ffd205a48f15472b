"""`vcache heads`, `train-head` and `import-head`: what can be trained, and runs of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vcache.pipelines import console
from vcache.pipelines.cli_sweep import resume_sweep
from vcache.pipelines.options import LOCATION, Json, takes
from vcache.pipelines.training.options import OF_RUN, given_options
from vcache.store.object_path import store_path


def heads(
    head: Annotated[str | None, typer.Argument(help="One head: its settings and presets.", metavar="HEAD")] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Parameters and multiply-adds, beside the paper's; nothing is run.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="This preset alone: its settings, recipe and store, or its --count."),
    ] = None,
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

    With HEAD: every setting with its meaning, and the rows of the paper as presets. With --preset: what it sets, and the
    store that it is trained from.

    \b
    [bold]Examples:[/bold]
    vcache heads
    vcache heads evl
    vcache heads evl --preset ssv2-b16-8f
    vcache heads dist --count
    vcache heads evl --count --preset k400-b16-8f --set layers=-2: --set qkv_dim=512 --set num_heads=8
    """
    from vcache.pipelines import head_listing as listing
    from vcache.pipelines.settings import parse_pairs

    if count and head:
        from vcache.pipelines.count_listing import print_counts
        from vcache.pipelines.counting import describe_count

        counts = describe_count(head, parse_pairs(settings or []), preset)
        console.print_json(counts) if as_json else print_counts(counts)
        return
    if count or settings or (preset and not head):
        raise typer.BadParameter("--count and --preset go with a HEAD, --set with --count: vcache heads evl --count")
    if head and preset:
        described = listing.describe_preset(head, preset)
        console.print_json(described) if as_json else listing.print_preset(described)
        return
    if head:
        row = listing.describe_head(head)
        console.print_json(row) if as_json else listing.print_head(row)
        return
    rows = listing.describe_heads()
    console.print_json(rows) if as_json else listing.print_heads(rows)


@takes(given_options)
def train_head(
    given: dict[str, Any],
    head: Annotated[str, typer.Argument(help="A head, see `vcache heads`.", metavar="HEAD")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any field of the head, of its recipe or of the run; may be repeated."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the head: its weights, dropout and mixing.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: runs/HEAD-1, -2, ...")] = None,
    as_json: Json = False,
) -> None:
    """Train a head from the stored features; no video is opened.

    Optimiser, schedule and length are the paper's unless set. Of a store with several training views (extract --views), every
    epoch draws one for each video. After each epoch the head is validated. What was stopped, by Ctrl-C or a kill, goes on with
    `vcache resume`. Many heads at once are a `vcache sweep`.

    The run folder gets a line per epoch in metrics.jsonl, up to a thousand over the run in steps.jsonl, and where TensorBoard is
    installed its files in tensorboard/.

    \b
    [bold]Examples:[/bold]
    vcache train-head evl --epochs 20 --batch-size 64 --set layers=-2:
    vcache train-head evl --preset ssv2-b16-8f
    vcache train-head dist --set gamma=4 --leave-out archery
    vcache train-head linear --shots 16 --patience 5
    """
    from dataclasses import asdict

    from vcache.pipelines.settings import build, parse_pairs
    from vcache.pipelines.training.config import TrainingConfig
    from vcache.pipelines.training.screen import print_training_summary, training_bar
    from vcache.pipelines.training.train_head import train_head as train

    said: dict[str, Any] = {"seed": seed, **parse_pairs(settings or []), **given}
    of_run = {name: said.pop(name) for name in (*OF_RUN, "seed") if name in said}
    if "store" in of_run:
        of_run["store"] = store_path(of_run["store"])
    config = build(TrainingConfig, {"head": head, "settings": said, "out": out, **of_run})
    with training_bar(head) as screen:
        summary = train(config, **screen.callbacks)
    console.print_json(asdict(summary)) if as_json else print_training_summary(summary)


def resume(
    run: Annotated[
        Path, typer.Argument(help="A run, sweep or few-shot folder that was stopped or killed.", metavar="RUN|SWEEP")
    ],
    store: Annotated[
        str | None, typer.Option(help="Where the store lies now, if it was moved.", metavar=LOCATION)
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: what the run was begun with.")] = None,
    as_json: Json = False,
) -> None:
    """Go on with a training, sweep or few-shot that was stopped or killed, from its last checkpoint.

    On a CPU it ends with the weights that it would have ended with, bit for bit. A store with another key, or with other
    videos to train on than when the run began, is refused.

    [bold]Examples:[/bold]  vcache resume runs/evl-1  |  vcache resume runs/sweep-1
    """
    from dataclasses import asdict

    from vcache.pipelines.training.sweep import is_sweep

    if is_sweep(run):
        resume_sweep(run, store=store, device=device, as_json=as_json)
        return
    from vcache.pipelines.training.screen import print_training_summary, training_bar
    from vcache.pipelines.training.train_head import begun_config, resume_run

    where = store_path(store) if store else None
    with training_bar(begun_config(run).head) as screen:
        summary = resume_run(run, store=where, device=device, **screen.callbacks)
    console.print_json(asdict(summary)) if as_json else print_training_summary(summary)


def import_head(
    head: Annotated[
        str,
        typer.Argument(help="A head with official checkpoints: actionclip, aim, dist, evl, text4vis.", metavar="HEAD"),
    ],
    file: Annotated[Path, typer.Argument(help="The checkpoint: .pth of torch, or .safetensors.", metavar="FILE")],
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
    and a file that does not fit is refused with the reason. Heads of dist, text4vis and actionclip compare videos with text: they
    take the classes of the store that they are evaluated on. Along with those of text4vis and actionclip CLIP's towers were
    trained, so they are evaluated on features of the towers in the file, and on no others. Files of aim hold the tower that its
    adapters are in: the run keeps it, and reads the stored pixels of any backbone.

    \b
    [bold]Examples:[/bold]
    vcache import-head evl k400_vitb16_8f_dec4x768.pth --classes k400_class_mappings.json
    vcache import-head dist DIST_VIT_B16_K400_16+32f_84.4.pyth
    vcache import-head text4vis k400-vitb-16-f8.pt
    vcache import-head aim aim_k400.pth --classes k400_class_mappings.json
    vcache import-head evl checkpoint-50000.pth --set num_frames=8 --out runs/ours
    """
    from dataclasses import asdict

    from vcache.pipelines import importing
    from vcache.pipelines.settings import parse_pairs

    summary = importing.import_head(
        importing.ImportConfig(head=head, file=file, classes=classes, settings=parse_pairs(settings or []), out=out)
    )
    console.print_json(asdict(summary)) if as_json else importing.print_import(summary)
