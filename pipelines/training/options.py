"""The options that `vcache train-head`, `sweep` and `few-shot` share, each said once."""

import inspect
from typing import Annotated, Any

import typer

from vcache.pipelines.options import DEVICE_HELP, LOCATION, RUNNING
from vcache.pipelines.training.config import Resident, Shuffle

DATA = "Which videos, views and frames it is trained on"
"""A panel of the help."""


def given_options(
    store: Annotated[
        str | None,
        typer.Option(help="The store to train on. Default: the one in $VCACHE_HOME that fits.", metavar=LOCATION),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A row of the paper, as k400-b16-8f: `vcache heads HEAD` lists them. What is set goes before it.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the train split. Default: the paper's length.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips in one step. Default: the paper's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the paper's.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without a better validation. Default: never.")
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(rich_help_panel=DATA, help="Split to train on. Default: train.")
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=DATA,
            help="Draw from the first views of each video only; 1 is the evaluation view alone. Default: from all.",
        ),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=DATA, help="Train on so many videos of each class.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(rich_help_panel=DATA, help="Train on a share of the videos of each class, as 0.01.")
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=DATA,
            metavar="NAME|FILE",
            help="Train without this class, or those in a file (a name per line, .json, .csv of index,name); may be repeated. "
            "`vcache eval --classes left-out` then asks for them.",
        ),
    ] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", rich_help_panel=DATA, help="Draw every class equally often.")
    ] = False,
    frame_step: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=DATA,
            help="Read every N-th of the stored frames, N times as far apart in the video. Default: 1.",
        ),
    ] = None,
    data_seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            rich_help_panel=DATA,
            help="Seed of the data: the order, the views drawn, the videos of --shots and --fraction. Default: 0.",
        ),
    ] = None,
    allow_incomplete: Annotated[
        bool,
        typer.Option(
            "--allow-incomplete",
            rich_help_panel=DATA,
            help="Train although the extraction of the store has not finished.",
        ),
    ] = False,
    resident: Annotated[
        Resident | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="Where the features lie. auto (default): on the GPU or in memory if they take less than half of what is "
            "free there, else on disk.",
        ),
    ] = None,
    shuffle: Annotated[
        Shuffle | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="full: any order. shards: whole shards into a buffer, for spinning disks and buckets. auto (default): "
            "shards for buckets.",
        ),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            rich_help_panel=RUNNING,
            help="Between two checkpoints: a kill loses at most so much. 0: every step. Default: 5.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(rich_help_panel=RUNNING, help=f"{DEVICE_HELP} Default: auto.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RUNNING,
            help="Of the head's products: float32, bfloat16, or float16 on a GPU. auto (default): float32 on a CPU, half on "
            "a GPU.",
        ),
    ] = None,
) -> dict[str, Any]:
    """What was given, by name; what was not is left to the head's recipe, to a file, or to TrainingConfig."""
    given = {name: value for name, value in locals().items() if value is not None and value is not False}
    given.pop("leave_out", None)
    return given | ({"leave_out": tuple(leave_out)} if leave_out else {})


OF_RUN = tuple(
    name for name in inspect.signature(given_options).parameters if name not in ("epochs", "steps", "batch_size", "lr")
)
"""Options that are fields of a TrainingConfig; the others are those of the head's Recipe."""
