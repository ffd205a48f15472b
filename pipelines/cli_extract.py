"""`vcache extract`, `plan` and `datasets`: from videos to stored features."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import Json, extraction_config, takes

if TYPE_CHECKING:  # imported late: it loads torch and zarr
    from vcache.pipelines.request import ExtractionConfig


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
    vcache extract ssv2 --layers 0: --pixels 16 --tsn --cross-frame none
    vcache extract k400 --views 8 --augment evl --eval-views 3x1
    vcache extract k400 --dtype int8 --cross-frame maps
    vcache extract k400 --layers none --tsn
    vcache extract k400 --layers stem,-4:
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
        console.print_json(told if config.more_models else told[0])
    else:
        for one in summaries:
            console.print_extraction_summary(one, len(summaries))
    if any(too_many):
        console.fail(
            f"{len(summary.failures)} of {summary.num_videos} videos failed, more than --max-failures "
            f"{config.max_failures:g} allows. The others are stored; "
            "mend the files and run the command again with --retry-failed, or raise --max-failures."
        )


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
    console.print_json(describe_plan(made)) if as_json else print_plan(made)


def datasets(
    dataset: Annotated[
        str | None, typer.Argument(help="A name, a folder, a CSV or a list in a .txt.", metavar="DATASET")
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
        console.print_json(rows) if as_json else listing.print_datasets(rows)
        return
    description = listing.describe_dataset(dataset, root)
    console.print_json(description) if as_json else listing.print_dataset(description)
    if not description["ok"]:
        raise typer.Exit(1)
