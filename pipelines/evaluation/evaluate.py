"""`vcache eval`: the head of a run on a split of the store that it was trained on, or of another dataset's."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vcache.extract.views import EVALUATION_SPLITS
from vcache.heads.registry import get_head
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.class_choice import (
    ALL,
    TRAINED,
    check_asked,
    check_classes,
    choose_classes,
    is_of_run,
)
from vcache.pipelines.evaluation.head_evaluation import Evaluation, evaluate_head
from vcache.pipelines.evaluation.metrics import Metrics
from vcache.pipelines.imported_runs import notes_on_store, open_named_store
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.stored_views import ViewGrid, changed_views, view_definitions
from vcache.pipelines.stores import vcache_home
from vcache.pipelines.upkeep.register import note_run
from vcache.store.object_path import StorePath, store_path
from vcache.store.reader import FeatureStore

# What datasets call their validation split, in the order of preference; evaluation views are made of no other.
VALIDATION_SPLITS = EVALUATION_SPLITS


def validation_split(splits: Iterable[str]) -> str | None:
    """The split to validate on: `val`, else `validation`, else `test`, else None."""
    names = set(splits)
    return next((name for name in VALIDATION_SPLITS if name in names), None)


def open_run_store(run: Run, store: StorePath | None = None, classes: str = TRAINED) -> FeatureStore:
    """The store that the run was trained on, checked by its key; `store` says where it lies now, if it was moved.

    Of an imported run, which was trained on none, `store` has to be named, and is checked by what the head's config says. Of
    other `classes` than those trained on, the store may be that of another dataset with features made in the same way.

    Raises:
        RunError, StoreKeyMismatch: it is not there, not named, or another one; or the run knows no such classes.
    """
    check_asked(run, classes)
    if run.imported:
        opened = open_named_store(run, store, any_classes=classes != TRAINED)
        check_classes(run, opened, classes)
        return opened
    path = store or store_path(run.config["store"])
    if not path.exists():
        raise RunError(
            f"the store of {run.path}, {path}, is not there. Name it with --store PATH if it was moved, or list what is "
            f"under {vcache_home()} with:  vcache ls"
        )
    opened = FeatureStore.open(path)
    opened.check_key(run.config["store_key"], run.config["store_spec"])
    check_classes(run, opened, classes)  # the key says how features were made, not of which dataset
    if is_of_run(run, opened):
        _check_views(run, opened)
    return opened


def _check_views(run: Run, store: FeatureStore) -> None:
    """Refuse a store in which the numbers of the views that the run was trained on mean other views."""
    trained_on = run.config.get("views", {})
    if changed := changed_views(store.manifest, trained_on):
        view, there = changed[0], view_definitions(store.manifest)
        raise RunError(
            f"{run.path} was trained on view {view} as {json.dumps(trained_on[str(view)])}; in {store.path} view {view} is "
            f"{json.dumps(there[view])}. Name the store that it was trained on with --store, or train again on this one."
        )


def evaluate_run(path: Path, **options: Any) -> Metrics:
    """The metrics alone of `evaluate`, which has the options."""
    return evaluate(path, **options).metrics


def evaluate(
    path: Path,
    *,
    store: StorePath | None = None,
    split: str | None = None,
    views: ViewGrid | None = None,
    average: str | None = None,
    which: str = "last",
    classes: str = TRAINED,
    half_classes: bool = False,
    device: str = "auto",
    batch_size: int = 32,
    allow_incomplete: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
) -> Evaluation:
    """Evaluate a finished run on a split of the store it was trained on (default: the split it was validated on).

    The scores of the evaluation views are averaged: of `views`, else of the largest grid that is complete in the split. A
    video that failed in one of them is left out. `average` is one of averaging.py, by default the choice of the head's paper.
    An imported run takes the store that is named, and `on_note` hears, in a sentence each, what could not be checked.

    `classes` are those that are told apart, and whose videos are taken. "left-out" ones of the store were never trained on
    (zero-shot); of "all" the videos of both are among the names of both (generalised zero-shot). A head that classifies by
    text can be asked for them, also on the store of another dataset with features made in the same way. With `half_classes`
    halves of them are told apart, too (half_classes.py).

    Raises:
        RunError: the run is not complete, its store is not there, has other classes or means other views by the numbers of
            those trained on, the head cannot be asked for these classes, or there is no such split or grid of views.
        AverageError: the head cannot be averaged in that way.
        HalfClassesError: there are too few classes for halves, or a half has no video.
        IncompleteSplit: the split is not extracted to its end, unless `allow_incomplete`.
        StoreKeyMismatch: the store holds features made in another way than those the head was trained on.
        ScoresError: the head gives no finite scores, or the videos have no labels.
    """
    run, on = Run.open(path), select_device(device)
    note_run(run.path, run.config)  # it may have been moved, or come from another machine
    _check_half_classes(run, classes, half_classes)
    head = run.load_head(which)
    with open_run_store(run, store, classes) as opened:
        for note in notes_on_store(run, opened, any_classes=classes != TRAINED):
            on_note(note)
        return evaluate_head(
            head,
            opened,
            name=run.head,
            requirements=get_head(run.head).requires(head.config),
            asked=choose_classes(run, opened, classes),
            split=choose_split(opened, split, run.config["train_split"]),
            views=views,
            average=average,
            frame_step=run.config.get("frame_step", 1),
            half_classes=half_classes,
            device=on,
            batch_size=batch_size,
            allow_incomplete=allow_incomplete,
            on_note=on_note,
            which=which,
            run=str(run.path.resolve()),
        )


def _check_half_classes(run: Run, classes: str, half_classes: bool) -> None:
    if half_classes and classes == TRAINED:
        check_asked(run, ALL)
        raise RunError(
            "--half-classes tells halves of the classes apart by their text, those of another dataset or those left out. "
            "Say which:  --classes all  or  --classes left-out"
        )


def choose_split(store: FeatureStore, split: str | None, trained_on: str | None = None) -> str:
    """The split that is asked for, or the one to validate on beside that which was `trained_on`; RunError if it is not there."""
    chosen = split or validation_split(name for name in store.splits if name != trained_on)
    if chosen in store.splits:
        return chosen
    there = ", ".join(store.splits)
    asked = (
        f"split {split!r}"
        if split
        else f"split to validate on ({', '.join(VALIDATION_SPLITS)})"
        + (f" besides {trained_on!r}" if trained_on else "")
    )
    raise RunError(f"{store.path.name} has no {asked}; it has: {there}. Choose one with --split.")
