"""`vcache predict` and `export`: a trained head on new videos, here and elsewhere."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import LOCATION, AverageWay, Device, Json, Which
from vcache.store.object_path import store_path


def predict(
    run: Annotated[
        Path,
        typer.Argument(
            help="A folder written by `vcache train-head`, `vcache import-head` or `vcache export`.", metavar="RUN"
        ),
    ],
    videos: Annotated[
        list[str],
        typer.Argument(
            help="Video files, folders with videos in them or below, or ids of the run's store.", metavar="VIDEO"
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many of the most probable classes are told.")] = 5,
    window: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Predict windows of this length along each video, as for recordings of minutes or hours, and draw a timeline.",
        ),
    ] = None,
    stride: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Between the beginnings of two windows. \\[default: --window]", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Write the predictions: FILE.npz, a member for vcache ensemble, or FILE.csv; nothing unless asked. With "
            "--window the folder of the timelines, a CSV and a PNG each. \\[default: RUN/timelines]",
            show_default=False,
        ),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(
            metavar="TxS",
            help="Average T views along the video times S crops of each, as 3x1, whatever the store has. \\[default: 1x1]",
            show_default=False,
        ),
    ] = None,
    average: AverageWay = None,
    which: Which = "last",
    store: Annotated[
        str | None,
        typer.Option(
            help="Where the store lies now, if it was moved; an imported head has none, and needs it.", metavar=LOCATION
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Clips in one forward pass. \\[default: as the store was made]", show_default=False),
    ] = None,
    decode_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Videos decoded at the same time. \\[default: the cores]", show_default=False),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What a trained head says of new videos. Nothing is asked again: decoder, sampling, preprocessing, backbone and layers are
    those that it was trained on.

    A video is one clip, as in training, and the same clip has the scores that vcache eval gives it. A broken video is named with
    its reason, and the others go on; the exit status is then 1. Of a folder, every video in it or below is taken.

    \b
    [bold]Examples:[/bold]
    vcache predict runs/evl-1 VIDEO.mp4
    vcache predict runs/evl-1 my-videos --out predictions.csv
    vcache predict runs/evl-1 a.mp4 b.mp4 --views 3x1 --top 1 --json
    vcache predict runs/evl-1 RECORDING.mp4 --window 4 --stride 2
    """
    from vcache.pipelines.prediction.predict import PredictConfig
    from vcache.pipelines.prediction.predict import predict as run_prediction
    from vcache.pipelines.prediction.screen import TimelineSheets, described, print_prediction, save_predictions
    from vcache.pipelines.stored_views import ONE_VIEW, parse_grid

    _check_out(run, out, window)
    config = PredictConfig(
        run=run,
        videos=tuple(videos),
        store=store_path(store) if store else None,
        which=which,
        views=parse_grid(views) if views else ONE_VIEW,
        average=average,
        window=window,
        stride=stride,
        batch_size=batch_size,
        decode_workers=decode_workers,
        device=device,
    )
    timelines = TimelineSheets(out if out and window else run / "timelines", run, top)
    with console.stages() as on_stage:
        found = run_prediction(config, on_stage=on_stage, on_note=_note, on_timeline=timelines.add)
    sheets = timelines.written
    saved = save_predictions(found, out) if out is not None and not window else None
    if out is not None and not window and saved is None:
        _note(f"no video could be read: {out} is not written.")
    (
        console.print_json(described(found, top, saved, sheets))
        if as_json
        else print_prediction(found, top, saved, sheets)
    )
    if not found.is_complete:
        raise typer.Exit(1)


def _check_out(run: Path, out: Path | None, window: float | None) -> None:
    """Before anything is computed."""
    _check_name(out, window)
    if (written := run / "timelines" if window and out is None and run.is_dir() else out) is None:
        return
    above = next(path for path in (written.absolute(), *written.absolute().parents) if path.exists())
    if window is None and written.is_dir():
        raise typer.BadParameter(f"{written} is a folder: name a file that can be written", param_hint="--out")
    if (above != written.absolute() or window) and not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise typer.BadParameter(
            f"{written} cannot be written: {above} is {'not writable' if above.is_dir() else 'a file'}. Name another place.",
            param_hint="--out",
        )


def _check_name(out: Path | None, window: float | None) -> None:
    if out is None:
        return
    if window is None and out.suffix not in (".npz", ".csv"):
        raise typer.BadParameter(f"{out}: name a FILE.npz or a FILE.csv", param_hint="--out")
    if window is not None and (out.suffix in (".npz", ".csv", ".png") or out.is_file()):
        raise typer.BadParameter(
            f"{out}: with --window name a folder, for a CSV and a PNG of each video", param_hint="--out"
        )


def _note(note: str) -> None:
    console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)


def export(
    run: Annotated[
        Path, typer.Argument(help="A folder written by `vcache train-head` or `vcache import-head`.", metavar="RUN")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What is written. \\[default: exports/RUN]", show_default=False),
    ] = None,
    formats: Annotated[
        list[str],
        typer.Option(
            "--format",
            metavar="folder|onnx|torch",
            help="onnx and torch add a compiled program of backbone and head to the folder, which is always written. "
            "May be said twice.",
        ),
    ] = ["folder"],  # noqa: B006  (typer makes a list of its own)
    store: Annotated[
        str | None,
        typer.Option(
            help="Where the store lies now, if it was moved; an imported head has none, and needs it.", metavar=LOCATION
        ),
    ] = None,
    which: Annotated[
        str, typer.Option(metavar="last|best", help="The last weights, or those that were best in validation.")
    ] = "last",
    as_json: Json = False,
) -> None:
    """A trained head with its backbone as one folder that predicts anywhere: without the run, its store, its videos and its
    checkpoint.

    The folder has the settings, the weights as safetensors, the class names, a model card, and the sha256 of every file. `vcache
    predict FOLDER VIDEO...` gives the scores of the run, to the bit on the same machine. With --format onnx there is also a
    program for onnxruntime, from uint8 frames to logits, which is compared with the model before it is kept; it needs `pip
    install 'vcache\\[onnx]'`.

    \b
    [bold]Examples:[/bold]
    vcache export runs/evl-1
    vcache export runs/evl-1 --out my-model --format onnx
    vcache predict my-model holiday.mp4
    """
    from vcache.pipelines.prediction.export import export_run
    from vcache.pipelines.prediction.export_screen import described, print_exported

    with console.stages() as on_stage:
        exported = export_run(
            run,
            out=out,
            formats=formats,
            store=store_path(store) if store else None,
            which=which,
            on_stage=on_stage,
        )
    if as_json:
        console.print_json(described(exported))
        return
    print_exported(exported)
