"""`vcache correlation`: which classes are alike to a text tower, and which to a trained classifier."""

from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import Json


def correlation(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Stores, of which it is the text of the classes, and runs, of which it is the classifier.",
            metavar="STORE|RUN",
        ),
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="So many classes at even distances in the order of the first SOURCE, or those in a file (a name per line, "
            ".json, .csv of index,name). Default: 20.",
        ),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(metavar="SET", help="Of the text of a store, as `vcache info` lists them. Default: label."),
    ] = None,
    limits: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="LOW,HIGH",
            help="Ends of the colours of all maps. Default: of each map its least and largest cosine of two classes.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="PNG", help="The picture; the numbers go beside it as JSON.")] = Path(
        "correlation.png"
    ),
    as_json: Json = False,
) -> None:
    """Inter-class correlation maps: cosines between the embeddings of the classes, of text and of trained classifiers.

    The maps are drawn side by side, with the same classes in the same order, up to 40 of them with their names. The rank
    correlation of each map with the first says in a number whether the same classes are alike in both: put the text first to see
    how much of it a classifier has learnt that never saw it. Of several templates the mean is taken.

    \b
    [bold]Examples:[/bold]
    vcache correlation STORE.zarr runs/linear-1 runs/evl-1
    vcache correlation STORE.zarr --templates text4vis --classes 40 --range 0.5,1 --out text.png
    """
    from vcache.pipelines.class_correlation import class_correlation
    from vcache.pipelines.correlation_maps import print_correlation, write_correlation

    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"{out} is no name of a picture; say one that ends in .png", param_hint="--out")
    ends = _ends(limits) if limits is not None else None
    described = write_correlation(class_correlation(sources, classes=classes, templates=templates), out, ends)
    console.print_json(described) if as_json else print_correlation(described)


def _ends(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise typer.BadParameter(f"{text} is not two numbers, the lower one first, as in 0.5,1", param_hint="--range")
    return low, high
