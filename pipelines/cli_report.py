"""`vcache report` and `compare`: what came of runs, and whether one is better than another or it is chance."""

from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import LOCATION, Device, Json
from vcache.store.object_path import store_path


def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, finished or not, or the folder of a sweep or few-shot.", metavar="RUN|SWEEP"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: report.html in that folder.", metavar="FILE.html")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where the store lies now, if it was moved; an imported head has none, and needs it.", metavar=LOCATION
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the videos lie, if they were moved.")] = None,
    split: Annotated[str | None, typer.Option(help="Report on this split. Default: the validation split.")] = None,
    videos: Annotated[
        int, typer.Option(min=0, help="Show so many right and so many wrong videos, those that the head is surest of.")
    ] = 6,
    explain: Annotated[
        int, typer.Option(min=0, help="Draw what the head looks at in so many of these videos.", metavar="N")
    ] = 4,
    no_explain: Annotated[
        bool, typer.Option("--no-explain", help="Draw none of that: it takes the videos and the backbone.")
    ] = False,
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Keep no predictions in the run where they are made for the report.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write one HTML file on a run or a sweep: results, curves, confusions, classes, videos, speed, settings and provenance.

    The file needs nothing else: pictures are in it, and it asks for nothing over the network. Predictions are those that
    `vcache eval` has saved; where there are none, or the split has other videos by now, they are made and saved as it does.
    Without the store, the report says what the run alone knows. A sweep has its table, a plot for each setting, all curves, and
    its best run in full.

    \b
    [bold]Examples:[/bold]
    vcache report runs/evl-1
    vcache report runs/sweep-1 --out sweep.html --no-explain
    vcache report runs/evl-1 --store /mnt/k400.zarr --root /mnt/k400
    """
    from vcache.pipelines.reporting.report import ReportConfig, write_report
    from vcache.pipelines.reporting.run_predictions import Asked
    from vcache.pipelines.reporting.run_report import Options

    asked = Asked(store=store_path(store) if store else None, split=split, device=device, save=not no_save)
    options = Options(asked=asked, root=root, num_videos=videos, num_explained=0 if no_explain else explain)
    with console.stages() as on_stage:
        written = write_report(ReportConfig(path=run, out=out, options=options), on_stage)
    for note in written.notes:
        _note(note)
    if as_json:
        console.print_json(written.to_json())
        return
    console.out.print(written.result, soft_wrap=True, markup=False, highlight=False)
    console.out.print(
        f"{written.path}  ({console.size(written.size_bytes)})", soft_wrap=True, markup=False, highlight=False
    )


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, folders of `vcache sweep`, whose settings are compared by their means over seeds, or .npz of any "
            "model as `vcache ensemble` takes them. The first is the reference.",
            metavar="RUN|SWEEP|FILE",
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Compare on this split. Default: the one evaluated, else the validation split.")
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(metavar="TxS", help="Take the predictions of these views, as 3x1. Default: those evaluated."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|best",
            help="What the others are compared with: a name as the table has it, or the best. Default: the first.",
        ),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Compare every run by itself, also those that differ in the seed alone.")
    ] = False,
    common: Annotated[
        bool, typer.Option("--common", help="Use the videos that all have; else they must have the same ones.")
    ] = False,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class",
            help="Also a table of the classes by their difference, with p-values corrected over the classes.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples of the videos.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Write all differences, those of every class among them."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Is one run better than another, or is it chance: paired differences on the same videos, with tests.

    Of two runs there is the difference in top-1, top-5 and mean class accuracy with its 95% interval by bootstrap over the
    videos, and McNemar's exact test of the videos that one alone has right. Of settings with several seeds it is the difference
    of means, with an interval over the videos and one over the seeds. Where videos have several classes it is mAP. A run that was
    not evaluated so far is evaluated first. The last lines say what can be concluded.

    \b
    [bold]Examples:[/bold]
    vcache compare runs/linear-1 runs/evl-1
    vcache compare runs/linear-1 runs/evl-1 scores.npz --per-class --out classes.csv
    vcache compare runs/sweep-1 --reference best
    """
    from vcache.pipelines.reporting.compare_screen import described, print_comparison, write_comparison_csv
    from vcache.pipelines.reporting.comparing import CompareConfig, run_comparison

    if out is not None and out.suffix.lower() != ".csv":
        raise typer.BadParameter(f"{out} is no name of a table; say one that ends in .csv", param_hint="--out")
    config = CompareConfig(
        runs=tuple(runs),
        split=split,
        views=views,
        reference=reference,
        each=each,
        common=common,
        seed=seed,
        device=device,
    )
    with console.stages() as on_stage:
        found = run_comparison(config, on_stage=on_stage, on_note=_note)
    if out is not None:
        write_comparison_csv(found, out)
    if as_json:
        console.print_json(described(found))
        return
    print_comparison(found, per_class=per_class)
    if out is not None:
        console.out.print(f"saved {out}", soft_wrap=True, markup=False, highlight=False)


def _note(note: str) -> None:
    console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
