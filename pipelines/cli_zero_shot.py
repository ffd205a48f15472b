"""`vcache zero-shot`: how good CLIP itself is, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import Device, EvenIncomplete, Json, MovedCheckpoint, MovedModel, PerClass
from vcache.store.object_path import store_path


def zero_shot(
    store: Annotated[str, typer.Argument(help="A store with text embeddings of its class names.", metavar="STORE")],
    templates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="A set of templates of the store, as label, text4vis, actionclip, clip_kinetics (vcache text adds them); may be "
            "repeated. \\[default: all that the store has]",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Names to tell apart, one a line. Of those that are classes of the store the videos are taken, and no others; "
            "the rest are encoded now, and videos can be taken for them. Default: the classes of the store.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Default: the validation split.")] = None,
    views: Annotated[
        str | None,
        typer.Option(
            metavar="TxS",
            help="Average T views along the video times S crops, as 3x1. Default: the most the store has.",
        ),
    ] = None,
    ensemble: Annotated[
        str,
        typer.Option(
            metavar="embeddings|probabilities",
            help="Of the templates of a set: the mean of their text embeddings, as CLIP, or of the probabilities that each "
            "gives, as ActionCLIP.",
        ),
    ] = "embeddings",
    half_classes: Annotated[
        bool,
        typer.Option(
            "--half-classes", help="Also the mean over 10 draws of half of the classes, as zero-shot papers do."
        ),
    ] = False,
    per_class: PerClass = False,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz|FOLDER",
            help="Write the predictions, members for vcache ensemble. Default: nothing is written.",
        ),
    ] = None,
    allow_incomplete: EvenIncomplete = False,
    model: MovedModel = None,
    pretrained: MovedCheckpoint = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How well CLIP knows the videos of a store by the names of their classes: nothing is trained.

    The mean of the frames' stored embeddings is compared with the text of every class. There is a row for each set of templates,
    which a head trained on the same store should beat. Brackets are 95% confidence intervals by bootstrap over the videos.

    \b
    [bold]Examples:[/bold]
    vcache zero-shot STORE.zarr
    vcache zero-shot STORE.zarr --templates clip_kinetics --half-classes
    vcache zero-shot STORE.zarr --classes unseen.txt --per-class
    vcache zero-shot STORE.zarr --templates label --save clip.npz
    """
    from vcache.pipelines.stored_views import parse_grid
    from vcache.pipelines.zero_shot import ZeroShotConfig, save_zero_shot
    from vcache.pipelines.zero_shot import zero_shot as run
    from vcache.pipelines.zero_shot_screen import described_zero_shot, print_zero_shot

    config = ZeroShotConfig(
        store=store_path(store),
        templates=tuple(templates or ()),
        classes=classes,
        split=split,
        views=parse_grid(views) if views else None,
        ensemble=ensemble,
        half_classes=half_classes,
        device=device,
        allow_incomplete=allow_incomplete,
        save=save,
        model=model,
        pretrained=pretrained,
    )
    with console.stages() as on_stage:
        found = run(config, on_stage=on_stage, on_note=_note)
    saved = save_zero_shot(found, save) if save else ()
    console.print_json(described_zero_shot(found, saved)) if as_json else print_zero_shot(
        found, per_class=per_class, saved=saved
    )


def _note(note: str) -> None:
    console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
