"""`vcache info`, `verify`, `repair` and `text`: what lies in a store, whether it is whole, and the names of its classes."""

from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import Device, Json, MovedCheckpoint, MovedModel
from vcache.pipelines.templates import ALL, EVERY_STORE, TEMPLATE_SETS
from vcache.store.object_path import store_path


def info(
    store: Annotated[str, typer.Argument(help="A store.", metavar="STORE")],
    other: Annotated[
        str | None, typer.Argument(help="Another store: say what differs, and by how much.", metavar="OTHER")
    ] = None,
    videos: Annotated[int, typer.Option(min=1, help="With OTHER: how many videos of each split to compare.")] = 32,
    as_json: Json = False,
) -> None:
    """What a store holds: arrays, rows, failures, and how its features were made. Of two, why their features differ.

    With OTHER: the fields of the keys that differ, and the errors of the arrays on the videos that both stores hold.

    [bold]Examples:[/bold]  vcache info STORE.zarr  |  vcache info MINE.zarr THEIRS.zarr --videos 100
    """
    if other is not None:
        from vcache.pipelines.store_difference import compare_stores, print_difference

        told = compare_stores(store_path(store), store_path(other), max_videos=videos)
        console.print_json(told) if as_json else print_difference(told)
        return
    from vcache.pipelines.listing import describe_store, print_store

    description = describe_store(store_path(store))
    console.print_json(description) if as_json else print_store(description)


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
    console.print_json(result) if as_json else print_verification(result)
    if not result["ok"]:
        raise typer.Exit(1)


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
    console.print_json(result) if as_json else print_repair(result)
    if not result["ok"]:
        raise typer.Exit(1)


def text(
    store: Annotated[str, typer.Argument(help="A store.", metavar="STORE")],
    templates: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A set of templates ({', '.join(TEMPLATE_SETS)}), {ALL} of them, or a file with one template a line and {{}} "
            "for the name, as 'a video of {}'; the set is called as the file is. May be repeated. \\[default: those that "
            f"extract adds: {', '.join(EVERY_STORE)}]",
            metavar="NAME|FILE",
            show_default=False,
        ),
    ] = None,
    model: MovedModel = None,
    pretrained: MovedCheckpoint = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Another text encoder than CLIP's: a folder with a text model of Hugging Face, as DistilBERT, or its name on "
            "the hub. Its sets are called SET_ENCODER. Needs transformers: pip install transformers.",
            metavar="FOLDER|NAME",
        ),
    ] = None,
    pooling: Annotated[
        str,
        typer.Option(
            metavar="mean|cls",
            help="For --encoder: mean of the hidden states of all tokens of a text, or cls, the first one.",
        ),
    ] = "mean",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Add text embeddings of the class names, which heads classify by, to a store that is there.

    `vcache extract` adds the sets that heads need itself. Another checkpoint than the store's is
    refused, and what is stored is never changed: other templates need another name.

    Text of another encoder has channels of its own, which text4vis alone can take (--set templates=SET_ENCODER).

    \b
    [bold]Examples:[/bold]
    vcache text STORE.zarr
    vcache text STORE.zarr --templates clip_kinetics --templates my_prompts.txt
    vcache text STORE.zarr --templates text4vis --encoder distilbert/distilbert-base-uncased
    """
    from vcache.pipelines.text_command import add_text, print_text

    with console.stages() as on_stage:
        result = add_text(
            store_path(store),
            templates or EVERY_STORE,
            model=model,
            pretrained=pretrained,
            encoder=encoder,
            pooling=pooling,
            device=device,
            on_stage=on_stage,
        )
    console.print_json(result) if as_json else print_text(result)
