"""What a head says of a split of a store, its scores averaged over the views of each video, and how good that is.

The head may be of a run, or made in memory: nothing here knows of folders.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vcache.extract.views import EVALUATION_SPLITS
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.evaluation.averaging import Average, choose_average
from vcache.pipelines.evaluation.bootstrap import Interval, accuracy_intervals, precision_interval
from vcache.pipelines.evaluation.class_choice import ClassChoice
from vcache.pipelines.evaluation.half_classes import HalfClasses, draw_halves, half_metrics
from vcache.pipelines.evaluation.label_kinds import KindMetrics, LabelKind, kind_metrics, label_kinds
from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics, target_ranks
from vcache.pipelines.evaluation.per_class import ClassMetrics, class_metrics
from vcache.pipelines.evaluation.predicting import ClassesPart, predict_parts, predict_scores
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.loading.loader import ClipLoader, failed_rows, readable_rows
from vcache.pipelines.matching import HeadStoreMismatch, completing_command, match
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.runs import RunError
from vcache.pipelines.stored_views import ONE_VIEW, ViewGrid, evaluation_grids, grid_word, largest_first
from vcache.store.reader import FeatureStore


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
    half_classes: HalfClasses | None = None
    """Where they were asked for."""

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


def evaluate_head(
    head: nn.Module,
    store: FeatureStore,
    *,
    name: str,
    requirements: HeadRequirements,
    asked: ClassChoice,
    split: str,
    views: ViewGrid | None = None,
    average: str | None = None,
    frame_step: int = 1,
    half_classes: bool = False,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    allow_incomplete: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
    which: str = "last",
    run: str = "",
) -> Evaluation:
    """Evaluate a head on a split of a store. It is moved to the device, and given the text of the classes that it is `asked` for.

    Args:
        name: of the head, for messages.
        views, average: as `evaluate` has them (evaluate.py).
        half_classes: of heads that are given text, also tell the classes apart that half_classes.py draws.
        which, run: for the records that are kept of it.

    Raises:
        AverageError, HeadStoreMismatch, HalfClassesError, IncompleteSplit, RunError, ScoresError: as for `evaluate`.
    """
    head, way = head.to(device), choose_average(average, head, name)
    halves = draw_halves(len(asked.names)) if half_classes else ()
    plan, grid = _plan_views(name, requirements, store, split, views, frame_step)
    loader = ClipLoader(
        store,
        split,
        plan,
        batch_size=batch_size,
        device=torch.device(device),
        views=evaluation_grids(store.manifest)[grid],
        all_views=True,
        allow_incomplete=allow_incomplete,
        classes=asked.places,
        any_class=asked.any_class,
    )
    if not len(loader):
        of_classes = f" of the {asked.which} classes" if asked.places else ""
        raise RunError(f"split {split!r} of {store.path.name} has no readable video{of_classes}.")
    asked.give(head, store)
    scores, targets, of_halves = _predicted(head, loader, way, asked, halves)
    kinds = label_kinds(store, split, loader.rows, on_note, classes=asked.places)
    return Evaluation(
        metrics=compute_metrics(scores, targets, views=grid_word(grid)),
        kinds=tuple(kind_metrics(scores, _of_as_many(kind, scores)) for kind in kinds),
        predictions=_predictions(loader, asked, scores, targets, grid, way, run),
        which=which,
        num_failed=loader.num_failed,
        dataset=asked.dataset,
        half_classes=half_metrics(of_halves, halves, targets) if halves else None,
    )


def _predicted(
    head: nn.Module, loader: ClipLoader, way: Average, asked: ClassChoice, halves: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scores in the order of the classes asked for, in float32, and targets; and the scores of each half of them."""
    if halves:
        choices = [asked, *(asked.part(half) for half in halves)]
        gives = [partial(choice.give, head, loader.store) for choice in choices]
        parts = [ClassesPart(columns, give) for columns, give in zip((None, *halves), gives, strict=True)]
        (scores, *of_halves), targets = predict_parts(head, loader, way, parts)
        asked.give(head, loader.store)
    else:
        (scores, targets), of_halves = predict_scores(head, loader, way), []
    if asked.outputs is not None:
        scores = scores[:, list(asked.outputs)]
    if targets.ndim == 2:  # classes that no video of the store has
        targets = nn.functional.pad(targets, (0, scores.shape[1] - targets.shape[1]))
    return scores.float(), targets, [half.float() for half in of_halves]


def _of_as_many(kind: LabelKind, scores: Tensor) -> LabelKind:
    """The same beside classes that the store has not, of which no value is known."""
    num_others = scores.shape[1] - len(kind.of_class)
    return replace(kind, of_class=np.pad(kind.of_class, (0, num_others), constant_values=-1))


def _predictions(
    loader: ClipLoader,
    asked: ClassChoice,
    scores: Tensor,
    targets: Tensor,
    grid: ViewGrid,
    average: Average,
    run: str,
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
        run=run,
        of_classes=asked.which,
        trained_on=asked.trained_on,
    )


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
