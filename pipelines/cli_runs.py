"""`vcache eval`, `ensemble`, `explain` and `cka`: how good heads are, alone and together, and what they make of videos."""

from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import LOCATION, AverageWay, Device, EvenIncomplete, Json, PerClass, Which
from vcache.store.object_path import store_path


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="A folder written by `vcache train-head` or `vcache import-head`.", metavar="RUN")
    ],
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
    average: AverageWay = None,
    which: Which = "last",
    classes: Annotated[
        str,
        typer.Option(
            metavar="trained|left-out|all",
            help="Which are told apart, and whose videos are taken. Of a head that classifies by text, as dist, also those that "
            "it was not trained on (train-head --leave-out, or another dataset's --store): zero-shot.",
        ),
    ] = "trained",
    half_classes: Annotated[
        bool,
        typer.Option(
            "--half-classes",
            help="Also the mean over 10 draws of half of these classes, as zero-shot papers do; with --classes all or left-out.",
        ),
    ] = False,
    per_class: PerClass = False,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz|FOLDER", help="Where to write the predictions. Default: RUN/predictions/SPLIT-VIEWS.npz."
        ),
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Write no predictions.")] = False,
    allow_incomplete: EvenIncomplete = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Top-1, top-5 and mean class accuracy of a trained or imported head on the validation split; mAP where videos have several
    classes; verb, noun and action of EPIC-KITCHENS.

    Where the store has evaluation views (extract --eval-views), their scores are averaged. Brackets are 95% confidence
    intervals by bootstrap over the videos. The predictions of every video are written beside the run, as npz and as CSV, over
    earlier ones of the same split and views.

    \b
    [bold]Examples:[/bold]
    vcache eval runs/evl-1
    vcache eval runs/evl-1 --views 3x1 --per-class
    vcache eval runs/dist-1 --classes left-out
    vcache eval runs/text4vis-1 --store UCF101.zarr --classes all --half-classes
    """
    from vcache.pipelines.evaluation.evaluate import evaluate as run_evaluation
    from vcache.pipelines.evaluation.saving import save_predictions
    from vcache.pipelines.evaluation.screen import described, print_classes, print_evaluation
    from vcache.pipelines.stored_views import parse_grid

    if save is not None and no_save:
        raise typer.BadParameter("--save and --no-save exclude each other", param_hint="--save")
    evaluation = run_evaluation(
        run,
        store=store_path(store) if store else None,
        split=split,
        views=parse_grid(views) if views else None,
        average=average,
        which=which,
        classes=classes,
        half_classes=half_classes,
        device=device,
        allow_incomplete=allow_incomplete,
        on_note=_note,
    )
    intervals, rows = evaluation.intervals(), evaluation.per_class()
    saved = () if no_save else save_predictions(evaluation, run, save, _note)
    if as_json:
        console.print_json(described(evaluation, intervals, rows, saved))
        return
    if per_class:
        print_classes(rows)
    print_evaluation(evaluation, intervals, saved)


def _note(note: str) -> None:
    console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)


def ensemble(
    members: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders whose predictions `vcache eval` has written, or a .npz of any model: an array scores (videos, "
            "classes), and where known video_ids, targets, class_names.",
            metavar="RUN|FILE",
        ),
    ],
    split: Annotated[str | None, typer.Option(help="Take the runs' predictions of this split.")] = None,
    views: Annotated[
        str | None, typer.Option(metavar="TxS", help="Take the runs' predictions of these views, as 3x1.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="One for each member, as 0.3,0.7, rather than a search.")
    ] = None,
    step: Annotated[float, typer.Option(help="Of the weights that are tried.")] = 0.1,
    tune_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="half|FILE",
            help="Choose the weights on a half of the videos and report on the other; or on other predictions, a run's or a "
            "file for each member, in the same order. Default: on the videos reported on, as in EVL's paper.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the half.")] = 0,
    common: Annotated[
        bool, typer.Option("--common", help="Use the videos that all members have; else they must have the same ones.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Write the average's own predictions, a member for another ensemble."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Average the probabilities of several models, with the weights that are best in steps of 0.1.

    Videos are matched by their ids and classes by their names, so a model that was trained elsewhere can take part.

    [bold]Examples:[/bold]  vcache ensemble runs/evl-1 scores.npz  |  vcache ensemble runs/evl-1 runs/linear-1 --tune-on half
    """
    from vcache.pipelines.evaluation.ensemble import EnsembleConfig, parse_weights, run_ensemble
    from vcache.pipelines.evaluation.ensemble_screen import described, print_ensemble

    config = EnsembleConfig(
        members=tuple(members),
        split=split,
        views=views,
        weights=parse_weights(weights) if weights else None,
        step=step,
        tune_on=tuple(tune_on or ()),
        seed=seed,
        common=common,
    )
    with console.stages() as on_stage:
        on_stage("averaging")
        found = run_ensemble(config, on_note=_note)
    if save is not None:
        found.predictions.save(save)
    if as_json:
        console.print_json(described(found))
        return
    print_ensemble(found)
    if save is not None:
        console.out.print(f"  saved  {save}", soft_wrap=True, markup=False, highlight=False)


def explain(
    run: Annotated[
        Path, typer.Argument(help="A folder written by `vcache train-head` or `vcache import-head`.", metavar="RUN")
    ],
    video: Annotated[
        str | None,
        typer.Argument(help="A video id or path of the run's store, or any video file.", metavar="VIDEO"),
    ] = None,
    row: Annotated[int | None, typer.Option(min=0, help="A row of the split, in place of VIDEO.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of VIDEO or row. Default: the validation split, then the others.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="A backbone layer that the head reads, or all. Default: the one that it reads last.", metavar="N|all"
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
    """Draw what a trained head makes of a video, beside what CLIP does.

    The video is decoded and goes through the store's backbone once more. Of a head with a query (evl), attention.png has its
    weights over all frames beside CLIP's own CLS, and cross-frame.png those of one patch over the frames before and after it. Of
    a head with a temporal encoder (dist), magnitude.png has the size of its features beside CLIP's and the change of the pixels.
    explain.json has the numbers.

    [bold]Examples:[/bold]  vcache explain runs/evl-1 VIDEO.mp4  |  vcache explain runs/dist-1 --row 12 --layer all
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
    explanation = ask(run, question, store=where, root=root, device=device)
    described = write_explanation(explanation, out)
    console.print_json(described) if as_json else print_explanation(explanation, described)


def cka(
    run: Annotated[
        Path, typer.Argument(help="A folder written by `vcache train-head` or `vcache import-head`.", metavar="RUN")
    ],
    store: Annotated[
        str | None, typer.Argument(help="Where the run's store lies now. Default: where it was.", metavar="STORE")
    ] = None,
    store_option: Annotated[
        str | None, typer.Option("--store", help="The same, as other commands take it.", metavar=LOCATION)
    ] = None,
    videos: Annotated[int, typer.Option(min=1, help="So many videos, spread over the split.")] = 128,
    split: Annotated[str | None, typer.Option(help="Default: the validation split.")] = None,
    level: Annotated[
        str,
        typer.Option(
            metavar="patch|frame|clip", help="An example is a patch, the mean of a frame's patches or of a clip's."
        ),
    ] = "patch",
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="The chart; the numbers go beside it. Default: RUN/cka.png.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How similar a head's features are to CLIP's at each layer that it reads: linear CKA, 1 for the same but for a rotation.

    Of a DiST its integrated and its temporal features, of an EVL its modulated ones, from the stored features of so many videos.
    Few examples raise CKA whatever the features are, so they are patches unless asked otherwise.

    [bold]Examples:[/bold]  vcache cka runs/dist-1  |  vcache cka runs/evl-1 STORE.zarr --videos 500 --out evl.png
    """
    from vcache.pipelines.clip_similarity import clip_similarity
    from vcache.pipelines.similarity_chart import print_similarity, write_similarity

    if out is not None and out.suffix.lower() != ".png":
        raise typer.BadParameter(f"{out} is no name of a picture; say one that ends in .png", param_hint="--out")
    if store and store_option and store != store_option:
        raise typer.BadParameter(f"{store_option} is another store than {store}; name one", param_hint="--store")
    where = store or store_option
    with console.stages() as on_stage:
        on_stage("comparing")
        found = clip_similarity(
            run,
            store=store_path(where) if where else None,
            split=split,
            videos=videos,
            level=level,
            device=device,
            on_clips=lambda done, total: on_stage(f"comparing, {done} of {total} clips"),
        )
    described = write_similarity(found, out)
    console.print_json(described) if as_json else print_similarity(described)
