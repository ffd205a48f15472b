"""The options that several commands share, each said once: above all those of `vcache extract` and `vcache plan`."""

import functools
import inspect
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vcache.store.object_path import store_path

if TYPE_CHECKING:  # imported late: it loads torch and zarr
    from vcache.pipelines.request import ExtractionConfig

# Panels of the help: the first is what the store's key is made of.
VALUES = "What the features are (another value is another store)"
CONTENT = "What is stored, and where"
VIEWS = "Several views of a video, and its pixels"
BROKEN = "Broken videos"
RUNNING = "How it runs"

LOCATION = "PATH|URL"
DEFAULT_MODEL = "ViT-B-16-quickgelu"

DEVICE_HELP = "auto (CUDA if there is one), cpu, cuda, cuda:1 ..."
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]
PerClass = Annotated[
    bool, typer.Option("--per-class", help="Show each class, the worst first, and what it is taken for.")
]
EvenIncomplete = Annotated[
    bool, typer.Option("--allow-incomplete", help="Evaluate although the extraction of the split has not finished.")
]
AverageWay = Annotated[
    str | None,
    typer.Option(
        metavar="WAY",
        help="Average the views' softmax, logits or embeddings. Default: as the head's paper does, else softmax.",
    ),
]
Which = Annotated[
    str, typer.Option(metavar="last|best", help="The last weights, or those that were best in validation.")
]
MovedModel = Annotated[
    str | None, typer.Option(help="Where the store's model lies, if it was moved: a name, or local-dir:FOLDER.")
]
MovedCheckpoint = Annotated[str | None, typer.Option(help="The store's checkpoint, if it was moved: a tag, or a file.")]


def takes(
    build: Callable[..., Any], *, own_first: bool = False, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the parameters of `build` too; what `build` makes of them is the command's first argument.

    @takes(extraction_config)
    def extract(config, as_json: bool = False): ...      # extract(dataset, layers, ..., as_json)

    The help shows them in this order, or with `own_first` the command's own before those of `build`; arguments that must be
    given come before all. Those `without` are left at their defaults, and the command may have its own of these names.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        of_build = inspect.signature(build).parameters
        shared = {name: parameter for name, parameter in of_build.items() if name not in without}
        _, *own = inspect.signature(command).parameters.values()

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(build(**{name: given.pop(name) for name in shared}), **given)

        parameters = [*own, *shared.values()] if own_first else [*shared.values(), *own]
        parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)
        # typer reads both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def extraction_config(
    dataset: Annotated[
        str,
        typer.Argument(
            help="k400 (see vcache datasets), a folder of classes, a CSV path,label\\[,split], or a .txt of path label.",
            metavar="DATASET",
        ),
    ],
    layers: Annotated[
        str,
        typer.Option(
            rich_help_panel=CONTENT,
            help="Blocks whose tokens are kept: -4: (the last four), 0,3,6, all. stem: what enters the first, as in stem,-4:. "
            "none: the embedding alone.",
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
        str | None,
        typer.Option(
            rich_help_panel=CONTENT,
            help="For attention between frames. qk: store queries and keys of the layers; maps: the softmax maps, 4.5 times "
            "smaller than both for ViT-B/16; derive: what enters the layers, from which training makes Q/K again, 2.4 times "
            "smaller than tokens with Q/K; none. Default: qk, and none with --layers none.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            rich_help_panel=VALUES,
            help="float16; bfloat16; float32; int8: tokens and Q/K with a scale per token, half of float16.",
        ),
    ] = "float16",
    model: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=VALUES,
            help="An open_clip model name (ViTs with a class token, EVA-CLIP, SigLIP, the ViTs of MobileCLIP), or "
            "local-dir:FOLDER; may be repeated: then each model has its own store, and the videos are decoded once. "
            f"\\[default: {DEFAULT_MODEL}]",
            show_default=False,
        ),
    ] = None,
    pretrained: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=VALUES,
            help="A tag of that model in open_clip, or a checkpoint file; of several models one for each, in the same order, or "
            "one for all. \\[default: openai]",
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
    decoder: Annotated[
        str,
        typer.Option(
            rich_help_panel=VALUES,
            help="pyav: right on every video we tried; decord, torchcodec: refuse the kinds of video that they get wrong.",
        ),
    ] = "pyav",
    precision: Annotated[
        str,
        typer.Option(
            rich_help_panel=VALUES,
            help="Of the backbone: float32, float16, bfloat16, or auto: float32 on a CPU, that of --dtype on a GPU; one named "
            "with --store keeps the precision it was made in.",
        ),
    ] = "auto",
    root: Annotated[
        Path | None, typer.Option(rich_help_panel=CONTENT, help="Folder of the videos. Default: $VCACHE_DATA/DATASET.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CONTENT,
            help="Where to write, or the store to extend: a folder, or s3://bucket/path. Default: a name of its own in "
            "$VCACHE_HOME.",
            metavar=LOCATION,
        ),
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(rich_help_panel=CONTENT, help="Share held out as val where the dataset has no splits of its own."),
    ] = 0.2,
    views: Annotated[
        int,
        typer.Option(
            rich_help_panel=VIEWS,
            help="Views of each training video: view 0, the centre, and N-1 with random frames, crop, flip and colours.",
            metavar="N",
            min=1,
        ),
    ] = 1,
    eval_views: Annotated[
        str,
        typer.Option(
            rich_help_panel=VIEWS,
            help="Views of each val or test video: T clips along it times S crops of each, as 3x1, 1x3, 4x3, 10x3.",
            metavar="TxS",
        ),
    ] = "1x1",
    augment: Annotated[
        str,
        typer.Option(
            rich_help_panel=VIEWS,
            help="What makes the random views: crop-flip, or as the papers' code: evl (evl-flip as EVL's paper), dist, "
            "text4vis, actionclip, aim. Something-Something is never flipped.",
            metavar="RECIPE",
        ),
    ] = "crop-flip",
    view_seed: Annotated[
        int, typer.Option(rich_help_panel=VIEWS, help="Seed of the random views; another one adds others.")
    ] = 0,
    pixels: Annotated[
        int,
        typer.Option(
            rich_help_panel=VIEWS,
            help="Store K frames of each clip as uint8 pixels too, with its crop and flip: a multiple of --frames (dist).",
            metavar="K",
            min=0,
        ),
    ] = 0,
    decode_workers: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="Videos decoded at the same time, by each worker. \\[default: the cores, or a worker's share of them]",
            show_default=False,
            min=1,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="Extract in so many worker processes of this machine, the GPUs dealt out to them; 0: one for each GPU.",
            metavar="N",
            min=0,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="Extract on the workers of this dask scheduler, as tcp://HOST:8786; see pipelines/clusters.md.",
            metavar="ADDRESS",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="Clips in one forward pass. \\[default: as the store was made; of a new one 4, on a GPU 256 frames]",
            show_default=False,
            min=1,
        ),
    ] = None,
    max_failures: Annotated[
        float,
        typer.Option(
            rich_help_panel=BROKEN, help="Share of videos that may fail (at least one) before the exit status is 1."
        ),
    ] = 0.01,
    max_error: Annotated[
        float,
        typer.Option(
            rich_help_panel=RUNNING,
            help="What --dtype may lose of the standardised features, measured on a sample before anything is stored.",
        ),
    ] = 0.03,
    ignore_free_space: Annotated[
        bool,
        typer.Option(
            "--ignore-free-space",
            rich_help_panel=RUNNING,
            help="Begin although the disk has less room than the features take.",
        ),
    ] = False,
    allow_partial: Annotated[
        bool,
        typer.Option(
            "--allow-partial",
            rich_help_panel=BROKEN,
            help="Store what can be decoded of a cut or damaged video, and record the damage; else it fails.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            rich_help_panel=BROKEN,
            help="Extract the videos again that failed before, and write their shards anew.",
        ),
    ] = False,
    failures: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=BROKEN,
            help="List failed videos here, as JSON lines. \\[default: STORE.failures.jsonl]",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="Write one of N shares of the shards, as 3/16, beside processes on other machines that write the others.",
            metavar="I/N",
        ),
    ] = None,
    device: Annotated[str, typer.Option(rich_help_panel=RUNNING, help=DEVICE_HELP)] = "auto",
) -> "ExtractionConfig":
    """The request that the options stand for."""
    from vcache.extract.layers import keeps_no_layer
    from vcache.pipelines.request import ExtractionConfig, parse_part

    (first_model, first_pretrained), *more_models = _paired(model or [DEFAULT_MODEL], pretrained or [], random_weights)
    return ExtractionConfig(
        dataset=dataset,
        layers=layers,
        split=tuple(name.strip() for name in split.split(",")) if split else None,
        frames=frames,
        stride=stride,
        tsn=tsn,
        cross_frame=cross_frame or ("none" if keeps_no_layer(layers) else "qk"),
        dtype=dtype,
        model=first_model,
        pretrained=first_pretrained,
        more_models=tuple(more_models),
        random_weights=random_weights,
        preprocess=preprocess,
        decoder=decoder,
        precision=precision,
        root=root,
        store=store_path(store) if store else None,
        val_fraction=val_fraction,
        views=views,
        eval_views=eval_views,
        augment=augment,
        view_seed=view_seed,
        pixels=pixels,
        device=device,
        decode_workers=decode_workers or os.cpu_count() or 1,
        cluster_decode_workers=decode_workers,
        workers=workers,
        scheduler=scheduler,
        batch_size=batch_size,
        max_failures=max_failures,
        max_error=max_error,
        ignore_free_space=ignore_free_space,
        allow_partial=allow_partial,
        retry_failed=retry_failed,
        failures=failures,
        part=parse_part(part) if part else None,
    )


def _paired(models: list[str], pretrained: list[str], random_weights: bool) -> list[tuple[str, str | None]]:
    """Each model with its weights."""
    if len(pretrained) > 1 and len(pretrained) != len(models):
        raise typer.BadParameter(
            f"{len(pretrained)} for {len(models)} models: give one for each --model, in the same order, or one for all.",
            param_hint="--pretrained",
        )
    given: list[str | None] = [*pretrained] if len(pretrained) > 1 else [*pretrained, None][:1] * len(models)
    return [
        (model, weights or _default_pretrained(model, random_weights))
        for model, weights in zip(models, given, strict=True)
    ]


def _default_pretrained(model: str, random_weights: bool) -> str | None:
    """A local-dir model brings its weights, random ones have none; any other is OpenAI's unless said."""
    return None if random_weights or model.startswith("local-dir:") else "openai"
