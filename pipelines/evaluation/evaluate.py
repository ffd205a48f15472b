"""What the head of a run says of a split of a store, its scores averaged over the views of each video, and how good that is."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vcache.extract.views import EVALUATION_SPLITS
from vcache.heads.registry import get_head
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.averaging import Average, choose_average
from vcache.pipelines.evaluation.bootstrap import Interval, accuracy_intervals, precision_interval
from vcache.pipelines.evaluation.class_choice import (
    LEFT_OUT,
    TRAINED,
    ClassChoice,
    check_asked,
    check_classes,
    choose_classes,
    is_of_run,
)
from vcache.pipelines.evaluation.label_kinds import KindMetrics, kind_metrics, label_kinds
from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics, target_ranks
from vcache.pipelines.evaluation.per_class import ClassMetrics, class_metrics
from vcache.pipelines.evaluation.predicting import predict_scores
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.imported_runs import class_order, notes_on_store, open_named_store
from vcache.pipelines.loading.loader import ClipLoader, failed_rows, readable_rows
from vcache.pipelines.matching import HeadStoreMismatch, completing_command, match
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.stored_views import (
    ONE_VIEW,
    ViewGrid,
    changed_views,
    evaluation_grids,
    grid_word,
    largest_first,
    view_definitions,
)
from vcache.pipelines.stores import vcache_home
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What a head says of a split, and how good that is."""

    metrics: Metrics
    kinds: tuple[KindMetrics, ...]
    """Of stores with labels of other kinds than the class, as verb and noun; else empty."""
    predictions: Predictions
    which: str
    """The weights, one of WEIGHTS."""
    num_failed: int
    """Videos of the split that were left out because their extraction failed."""
    dataset: str = ""
    """Of the store, where it is another than the run was trained on."""

    def per_class(self) -> tuple[ClassMetrics, ...]:
        """Of every class, in the order of the labels."""
        scores, targets = torch.from_numpy(self.predictions.scores), self.predictions.target_tensor()
        return class_metrics(scores, targets, self.predictions.class_names or ())

    def intervals(self) -> dict[str, Interval]:
        """95% confidence intervals, by the name of the metric."""
        scores, targets = self.predictions.scores, self.predictions.target_tensor()
        if targets.ndim == 2:
            return precision_interval(scores, targets.numpy())
        return accuracy_intervals(target_ranks(torch.from_numpy(scores), targets).numpy(), targets.numpy())


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
    text can be asked for them, also on the store of another dataset with features made in the same way.

    Raises:
        RunError: the run is not complete, its store is not there, has other classes or means other views by the numbers of
            those trained on, the head cannot be asked for these classes, or there is no such split or grid of views.
        AverageError: the head cannot be averaged in that way.
        IncompleteSplit: the split is not extracted to its end, unless `allow_incomplete`.
        StoreKeyMismatch: the store holds features made in another way than those the head was trained on.
        ScoresError: the head gives no finite scores, or the videos have no labels.
    """
    run, on = Run.open(path), select_device(device)
    head = run.load_head(which).to(on)
    way = choose_average(average, head, run.head)
    with open_run_store(run, store, classes) as opened:
        asked = choose_classes(run, opened, classes)
        for note in notes_on_store(run, opened, any_classes=classes != TRAINED):
            on_note(note)
        chosen = _choose_split(run, opened, split)
        requirements = get_head(run.head).requires(head.config)
        plan, grid = _plan_views(run.head, requirements, opened, chosen, views, run.config.get("frame_step", 1))
        loader = ClipLoader(
            opened,
            chosen,
            plan,
            batch_size=batch_size,
            device=on,
            views=evaluation_grids(opened.manifest)[grid],
            all_views=True,
            allow_incomplete=allow_incomplete,
            classes=asked.places,
            any_class=classes == LEFT_OUT,
        )
        if not len(loader):
            of_classes = f" of the {classes} classes" if asked.places else ""
            raise RunError(f"split {chosen!r} of {opened.path.name} has no readable video{of_classes}.")
        asked.give(head, opened)
        scores, targets = _scores(run, head, loader, way, asked)
        metrics = compute_metrics(scores, targets, views=grid_word(grid))
        found = label_kinds(opened, chosen, loader.rows, on_note, classes=asked.places)
        return Evaluation(
            metrics=metrics,
            kinds=tuple(kind_metrics(scores, kind) for kind in found),
            predictions=_predictions(run, loader, asked, scores, targets, grid, way),
            which=which,
            num_failed=loader.num_failed,
            dataset=asked.dataset,
        )


def _scores(
    run: Run, head: torch.nn.Module, loader: ClipLoader, way: Average, asked: ClassChoice
) -> tuple[Tensor, Tensor]:
    """Scores in the order of the store's classes, in float32, and targets."""
    scores, targets = predict_scores(head, loader, way)
    if asked.templates is None and run.imported:
        scores = scores[:, class_order(run, loader.store)]
    return scores.float(), targets


def _predictions(
    run: Run,
    loader: ClipLoader,
    asked: ClassChoice,
    scores: Tensor,
    targets: Tensor,
    grid: ViewGrid,
    average: Average,
) -> Predictions:
    videos, rows = loader.store.videos(loader.split), loader.rows
    multi_label = targets.ndim == 2
    return Predictions(
        scores=scores.numpy(),
        kind="sigmoid" if multi_label else "softmax",
        targets=targets.to(torch.uint8).numpy() if multi_label else targets.numpy(),
        video_ids=tuple(videos.ids[row] for row in rows),
        paths=tuple(videos.paths[row] for row in rows),
        class_names=asked.names,
        split=loader.split,
        views=grid_word(grid),
        average=average,
        store_key=loader.store.manifest.key,
        run=str(run.path.resolve()),
        of_classes=asked.which,
        trained_on=asked.trained_on,
    )


def _choose_split(run: Run, store: FeatureStore, split: str | None) -> str:
    """The split that is asked for, or the one to validate on; RunError if it is not there."""
    trained_on = run.config["train_split"]
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


def _plan_views(
    head: str,
    requirements: HeadRequirements,
    store: FeatureStore,
    split: str,
    asked: ViewGrid | None,
    frame_step: int,
) -> tuple[ReadPlan, ViewGrid]:
    """The grid of views to average, and the plan to read them: the asked one, or the largest that is complete."""
    held = _held_grids(store, split)
    if asked is None:
        return next(_complete_grids(head, requirements, store, split, held, frame_step))
    if asked not in held:
        there = ", ".join(grid_word(grid) for grid in held)
        message = f"--views {grid_word(asked)}: split {split!r} of {store.path.name} holds {there}."
        if split not in EVALUATION_SPLITS:
            made = ", ".join(EVALUATION_SPLITS)
            raise RunError(
                f"{message} `vcache extract` makes evaluation views of the splits {made} alone; leave --views out."
            )
        plan = match(head, requirements, store, [split], frame_step=frame_step)
        command = completing_command(store, plan, eval_views=grid_word(asked))
        raise RunError(f"{message}\nAdd them with:  {command}")
    return match(head, requirements, store, [split], views={split: held[asked]}, frame_step=frame_step), asked


def _held_grids(store: FeatureStore, split: str) -> dict[ViewGrid, tuple[int, ...]]:
    """The grids of which the split has every view; of which rows and arrays, is not said."""
    there = {0, *store.views(split)}
    return {grid: views for grid, views in evaluation_grids(store.manifest).items() if there.issuperset(views)}


def _complete_grids(
    head: str,
    requirements: HeadRequirements,
    store: FeatureStore,
    split: str,
    held: dict[ViewGrid, tuple[int, ...]],
    frame_step: int,
) -> Iterator[tuple[ReadPlan, ViewGrid]]:
    """Grids that are there for every video and all that the head reads, the largest first; at last view 0, whatever it is."""
    for grid in largest_first(held.keys() - {ONE_VIEW}):
        try:
            plan = match(head, requirements, store, [split], views={split: held[grid]}, frame_step=frame_step)
        except HeadStoreMismatch:
            continue
        done = [readable_rows(store, split, plan, view) | failed_rows(store, split, view) for view in held[grid]]
        if np.all(done):
            yield plan, grid
    yield match(head, requirements, store, [split], frame_step=frame_step), ONE_VIEW
