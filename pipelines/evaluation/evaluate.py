"""Top-1, top-5 and mean class accuracy of a head on a split of a store, its scores averaged over the views of each video."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vcache.extract.views import EVALUATION_SPLITS
from vcache.heads.registry import get_head
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.device import select_device
from vcache.pipelines.imported_runs import class_order, notes_on_store, open_named_store
from vcache.pipelines.loading.loader import Batch, ClipLoader, failed_rows, readable_rows
from vcache.pipelines.matching import HeadStoreMismatch, ReadPlan, completing_command, match
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


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Accuracies in 0..1. `mean_class_accuracy` is the mean over the classes that occur of their own top-1."""

    num_videos: int
    top1: float
    top5: float
    mean_class_accuracy: float
    loss: float
    views: str = grid_word(ONE_VIEW)
    """The views whose scores were averaged, TxS: so many along the video, times so many crops of each."""


def compute_metrics(logits: Float[Tensor, "M K"], labels: Int[Tensor, " M"]) -> Metrics:
    """Metrics of M clips; with fewer than five classes, top-5 is top-K."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    top1 = hits[:, 0].double()
    per_class = [top1[labels == label].mean() for label in labels.unique()]
    return Metrics(
        num_videos=len(labels),
        top1=top1.mean().item(),
        top5=hits.any(dim=1).double().mean().item(),
        mean_class_accuracy=torch.stack(per_class).mean().item(),
        loss=nn.functional.cross_entropy(logits, labels).item(),
    )


def predict_logits(head: nn.Module, batches: Iterable[Batch]) -> tuple[Float[Tensor, "M K"], Int[Tensor, " M"]]:
    """Logits and labels of all batches, on the CPU; the head's training mode is given back as it was."""
    was_training = head.training
    head.eval()
    with torch.inference_mode():
        pairs = [(head(batch.features()).float().cpu(), batch.targets.cpu()) for batch in batches]
    head.train(was_training)
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def predict_scores(head: nn.Module, loader: ClipLoader) -> tuple[Float[Tensor, "M K"], Int[Tensor, " M"]]:
    """Scores and labels of the loader's videos: of one view the logits, of several the log of the mean of their softmax.

    EVL and AIM average the softmax; DiST sums it, which ranks the same. The loss of these scores is -log of the mean
    probability.
    """
    first, *others = loader.views
    logits, labels = predict_logits(head, loader.in_order(first))
    if not others:
        return logits, labels
    # As logarithms, in which a probability that float32 would round to 0 still has its rank.
    total = logits.double().log_softmax(dim=1)
    for view in others:
        logits, _ = predict_logits(head, loader.in_order(view))
        total = torch.logaddexp(total, logits.double().log_softmax(dim=1))
    return total - math.log(len(loader.views)), labels


def validation_split(splits: Iterable[str]) -> str | None:
    """The split to validate on: `val`, else `validation`, else `test`, else None."""
    names = set(splits)
    return next((name for name in VALIDATION_SPLITS if name in names), None)


def open_run_store(run: Run, store: StorePath | None = None) -> FeatureStore:
    """The store that the run was trained on, checked by its key; `store` says where it lies now, if it was moved.

    Of an imported run, which was trained on none, `store` has to be named, and is checked by what the head's config says.

    Raises:
        RunError, StoreKeyMismatch: it is not there, not named, or another one.
    """
    if run.imported:
        return open_named_store(run, store)
    path = store or store_path(run.config["store"])
    if not path.exists():
        raise RunError(
            f"the store of {run.path}, {path}, is not there. Name it with --store PATH if it was moved, or list what is "
            f"under {vcache_home()} with:  vcache ls"
        )
    opened = FeatureStore.open(path)
    opened.check_key(run.config["store_key"], run.config["store_spec"])
    # The key says how features were made, not of which dataset.
    if opened.manifest.class_names != run.class_names():
        raise RunError(
            f"{run.path} was trained on the {len(run.class_names())} classes of {run.config['dataset']}; {path} holds "
            f"{opened.manifest.dataset} with {len(opened.manifest.class_names)} classes that are not the same. Name a store "
            "with the classes of the run."
        )
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


def evaluate_run(
    path: Path,
    *,
    store: StorePath | None = None,
    split: str | None = None,
    views: ViewGrid | None = None,
    device: str = "auto",
    batch_size: int = 32,
    allow_incomplete: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
) -> Metrics:
    """Metrics of a finished run on a split of the store it was trained on (default: the split it was validated on).

    The scores of the evaluation views are averaged: of `views`, else of the largest grid that is complete in the split. A
    video that failed in one of them is left out. An imported run takes the store that is named, and `on_note` hears, in a
    sentence each, what could not be checked.

    Raises:
        RunError: the run is not complete, its store is not there, has other classes or means other views by the numbers of
            those trained on, or there is no such split or grid of views.
        IncompleteSplit: the split is not extracted to its end, unless `allow_incomplete`.
        StoreKeyMismatch: the store holds features made in another way than those the head was trained on.
    """
    run, on = Run.open(path), select_device(device)
    head = run.load_head().to(on)
    with open_run_store(run, store) as opened:
        for note in notes_on_store(run, opened):
            on_note(note)
        trained_on = run.config["train_split"]
        chosen = split or validation_split(name for name in opened.splits if name != trained_on)
        if chosen not in opened.splits:
            there = ", ".join(opened.splits)
            asked = (
                f"split {split!r}"
                if split
                else f"split to validate on ({', '.join(VALIDATION_SPLITS)})"
                + (f" besides {trained_on!r}" if trained_on else "")
            )
            raise RunError(f"{opened.path.name} has no {asked}; it has: {there}. Choose one with --split.")
        plan, grid = _plan_views(run.head, get_head(run.head).requires(head.config), opened, chosen, views)
        loader = ClipLoader(
            opened,
            chosen,
            plan,
            batch_size=batch_size,
            device=on,
            views=evaluation_grids(opened.manifest)[grid],
            all_views=True,
            allow_incomplete=allow_incomplete,
        )
        if not len(loader):
            raise RunError(f"split {chosen!r} of {opened.path.name} has no readable video.")
        scores, labels = predict_scores(head, loader)
        return replace(compute_metrics(scores[:, class_order(run, opened)], labels), views=grid_word(grid))


def _plan_views(
    head: str, requirements: HeadRequirements, store: FeatureStore, split: str, asked: ViewGrid | None
) -> tuple[ReadPlan, ViewGrid]:
    """The grid of views to average, and the plan to read them: the asked one, or the largest that is complete."""
    held = _held_grids(store, split)
    if asked is None:
        return next(_complete_grids(head, requirements, store, split, held))
    if asked not in held:
        there = ", ".join(grid_word(grid) for grid in held)
        message = f"--views {grid_word(asked)}: split {split!r} of {store.path.name} holds {there}."
        if split not in EVALUATION_SPLITS:
            made = ", ".join(EVALUATION_SPLITS)
            raise RunError(
                f"{message} `vcache extract` makes evaluation views of the splits {made} alone; leave --views out."
            )
        plan = match(head, requirements, store, [split])
        command = completing_command(store, plan, eval_views=grid_word(asked))
        raise RunError(f"{message}\nAdd them with:  {command}")
    return match(head, requirements, store, [split], views={split: held[asked]}), asked


def _held_grids(store: FeatureStore, split: str) -> dict[ViewGrid, tuple[int, ...]]:
    """The grids of which the split has every view; of which rows and arrays, is not said."""
    there = {0, *store.views(split)}
    return {grid: views for grid, views in evaluation_grids(store.manifest).items() if there.issuperset(views)}


def _complete_grids(
    head: str, requirements: HeadRequirements, store: FeatureStore, split: str, held: dict[ViewGrid, tuple[int, ...]]
) -> Iterator[tuple[ReadPlan, ViewGrid]]:
    """Grids that are there for every video and all that the head reads, the largest first; at last view 0, whatever it is."""
    for grid in largest_first(held.keys() - {ONE_VIEW}):
        try:
            plan = match(head, requirements, store, [split], views={split: held[grid]})
        except HeadStoreMismatch:
            continue
        done = [readable_rows(store, split, plan, view) | failed_rows(store, split, view) for view in held[grid]]
        if np.all(done):
            yield plan, grid
    yield match(head, requirements, store, [split]), ONE_VIEW
