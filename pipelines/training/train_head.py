"""Training a head from a store: no video is opened, no backbone is run."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vcache.heads.registry import get_head
from vcache.heads.requirements import Recipe
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.evaluate import validation_split
from vcache.pipelines.evaluation.metrics import Metrics
from vcache.pipelines.evaluation.predicting import validate
from vcache.pipelines.head_presets import HeadPreset, check_store, find_preset
from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import build_head_config, find_store, match
from vcache.pipelines.runs import Run, next_run_folder
from vcache.pipelines.settings import SettingError, build, split_settings
from vcache.pipelines.stored_views import training_views, view_definitions
from vcache.pipelines.training.logs import RunLog
from vcache.pipelines.training.mixed_precision import MixedPrecision, training_precision
from vcache.pipelines.training.reports import EpochReport, HeadProgress, StepReport, TrainingPlan, TrainingSummary
from vcache.pipelines.training.step import TrainingStep
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


class TrainingError(RuntimeError):
    """The training went wrong; the run folder has no weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One `vcache train-head` command. `settings` may name any field of the head's Config or of its Recipe."""

    head: str
    preset: str | None = None
    """A row of the paper (`vcache heads HEAD` lists them); `settings` go before what it says."""
    store: StorePath | None = None
    """None: the one store under `$VCACHE_HOME` that fits."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    """None: the next free `runs/HEAD-n`."""
    train_split: str = "train"
    views: int | None = None
    """Draw from the first views only, view 0 among them; None: from all that the store defines for training."""
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    """Of the head's products, one of TRAINING_PRECISIONS; see mixed_precision.py."""
    allow_incomplete: bool = False


def train_head(
    config: TrainingConfig,
    *,
    on_plan: Callable[[TrainingPlan], None] = lambda plan: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> TrainingSummary:
    """Train one head on a store's train split, validating after every epoch, and write a run folder.

    Raises:
        UnknownHead, UnknownPreset, SettingError: no such head or preset, or a setting that neither head nor recipe has.
        NoFittingStore, HeadStoreMismatch, IncompleteSplit: the stores lack what the head reads; with the mending command.
        RunError: `out` is not empty.
        PrecisionError: the precision is none of the device.
        TrainingError: the loss is not finite any more.
    """
    head_class = get_head(config.head)
    preset = find_preset(config.head, config.preset) if config.preset else None
    own_settings, recipe_settings = split_settings(config.settings, head_class.Config, Recipe)
    head_settings = {**(preset.head_settings if preset else {}), **own_settings}
    of_preset = _one_length({**preset.recipe}) if preset else {}
    recipe = build(Recipe, {**asdict(head_class.recipe), **of_preset, **_one_length(recipe_settings)})
    with _open_store(config, head_settings, preset) as store:
        device = select_device(config.device)
        precision = training_precision(config.precision, device)
        torch.manual_seed(config.seed)
        head_config = build_head_config(config.head, head_settings, store.manifest)
        head = head_class(head_config).to(device)
        check_recipe(head, recipe)
        train, val = _loaders(config, head, store, recipe, device)
        epochs, steps = _length(recipe, len(train))
        parameters = sum(p.numel() for p in head.parameters() if p.requires_grad)
        run = Run.create(
            config.out or next_run_folder(config.head),
            _run_config(config, head_config, recipe, precision, store, train.views_with_videos),
            store.manifest.class_names,
        )
        num_val = len(val.rows) if val else 0
        plan = TrainingPlan(
            run=run.path,
            store=store.path,
            num_train=len(train.rows),
            num_val=num_val,
            num_views=len(train.views_with_videos),
            num_parameters=parameters,
            epochs=epochs,
            steps=steps,
            precision=precision.name,
            recipe=recipe,
            residency="",
            shuffle="full",
        )
        on_plan(plan)
        last, best = _train(head, recipe, precision, train, val, run, steps, on_step, on_epoch)
        run.save_head(head.state_dict())
        return TrainingSummary(
            run=str(run.path),
            store=str(store.path),
            num_train=len(train.rows),
            num_val=num_val,
            num_failed=sum(loader.num_failed for loader in (train, val) if loader),
            num_parameters=parameters,
            epochs=epochs,
            steps=steps,
            last=last,
            best_epoch=best.epoch if best else None,
            best_value=best.monitored if best else None,
            stopped_early=False,
            stopped=False,
        )


def _train(
    head: nn.Module,
    recipe: Recipe,
    precision: MixedPrecision,
    train: ClipLoader,
    val: ClipLoader | None,
    run: Run,
    num_steps: int,
    on_step: Callable[[StepReport], None],
    on_epoch: Callable[[EpochReport], None],
) -> tuple[EpochReport, EpochReport | None]:
    """The last epoch, and the best."""
    train_step, log = TrainingStep(head, recipe, precision), RunLog(run.path)
    step, epoch, report, best = 0, 0, None, None
    training_began = time.perf_counter()
    while step < num_steps:
        began, loss_sum, hits, seen = time.perf_counter(), 0.0, 0, 0
        head.train()
        for batch in train.epoch(epoch):
            if step == num_steps:
                break
            rate = learning_rate(recipe, step, num_steps, len(train))
            result = train_step(batch.features(), batch.targets, step)
            summed, num_hits = torch.stack([result.loss, result.hits]).tolist()  # one wait for the device, not one each
            loss = summed / len(batch.rows)
            step += 1
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step}, with learning rate {rate:g}: the head is lost. "
                    f"Train with a smaller --lr, or with --set warmup_steps=N{_or_float32(precision)}."
                )
            loss_sum += summed
            hits += int(num_hits)
            seen += len(batch.rows)
            rate_now = step / (time.perf_counter() - training_began)
            progress = HeadProgress(
                name=run.path.name,
                step=step,
                num_steps=num_steps,
                epoch=epoch,
                lr=rate,
                loss=loss_sum / seen,
                train_top1=hits / seen,
                val=report.monitored if report else None,
                best=best.monitored if best else None,
                state="training",
            )
            step_report = StepReport(
                heads=(progress,),
                steps_per_second=rate_now,
                read_bytes_per_second=0.0,
                waiting=0.0,
                limited_by=None,
                source="disk",
                seconds_left=(num_steps - step) / rate_now,
            )
            log.append_step(progress, step_report)
            on_step(step_report)
        metrics = compute_metrics(*predict_logits(head, val.in_order())) if val else None
        value = metrics.top1 if metrics else None
        report = EpochReport(
            head=run.path.name,
            epoch=epoch,
            step=step,
            lr=rate,
            train_loss=loss_sum / seen,
            train_top1=hits / seen,
            seconds=time.perf_counter() - began,
            val_mean_average_precision=None,
            best=value is not None and (best is None or value > (best.monitored or 0.0)),
            read_bytes=0,
            waiting_seconds=0.0,
            **_validation_fields(metrics),
        )
        best = report if report.best else best
        log.append_epoch(report)
        on_epoch(report)
        epoch += 1
    assert report is not None
    return report, best


def _averaged(head: nn.Module, train_step: TrainingStep) -> nn.Module:
    """The head with the averaged weights, where the recipe averages them."""
    weights = train_step.averaged()
    if weights is None:
        return head
    head = copy.deepcopy(head)
    head.load_state_dict(weights)
    return head


def _or_float32(precision: MixedPrecision) -> str:
    return "" if precision.name == "float32" else ", or with --precision float32"


def _validation_fields(metrics: Metrics | None) -> dict[str, float | None]:
    names = ("loss", "top1", "top5", "mean_class_accuracy")
    return {f"val_{name}": getattr(metrics, name) if metrics else None for name in names}


def _one_length(settings: dict[str, Any]) -> dict[str, Any]:
    """`epochs` and `steps` say the same thing: the one that is set replaces the recipe's other."""
    if {"epochs", "steps"} <= settings.keys():
        raise SettingError("epochs and steps are both set; a run has one length. Set one of them.")
    if "epochs" in settings:
        return {**settings, "steps": None}
    return {**settings, "epochs": None} if "steps" in settings else settings


def _length(recipe: Recipe, batches_per_epoch: int) -> tuple[int, int]:
    """(epochs, optimiser steps) of the run; the last epoch may be cut by the number of steps."""
    steps = recipe.steps if recipe.steps is not None else (recipe.epochs or 0) * batches_per_epoch
    return -(-steps // batches_per_epoch), steps


def _open_store(config: TrainingConfig, head_settings: Mapping[str, Any], preset: HeadPreset | None) -> FeatureStore:
    """The store that is named, or the one that fits; of a preset only one that it can be trained from."""

    def check(store: FeatureStore) -> None:
        if preset:
            check_store(preset, store.manifest, head_settings, store.path.name)

    if config.store:
        store = FeatureStore.open(config.store)
        check(store)
        return store
    num_views = 1 if config.allow_incomplete else config.views
    line = {"extract_line": preset.extract_line} if preset else {}
    return find_store(config.head, head_settings, config.train_split, num_views=num_views, check=check, **line)


def _loaders(
    config: TrainingConfig, head: nn.Module, store: FeatureStore, recipe: Recipe, device: torch.device
) -> tuple[ClipLoader, ClipLoader | None]:
    """Loaders of the train and the validation split; a store without a validation split trains without validating."""
    if config.train_split not in store.splits:
        raise SettingError(
            f"{store.path.name} has no split {config.train_split!r}; it has {', '.join(store.splits)}. "
            "Choose one with --train-split."
        )
    val_split = validation_split(split for split in store.splits if split != config.train_split)
    splits = [config.train_split] + ([val_split] if val_split else [])
    views = _training_views(config, store)
    required = {} if config.allow_incomplete else {config.train_split: views}
    plan = match(config.head, get_head(config.head).requires(head.config), store, splits, views=required)
    buffers = BatchBuffers(recipe.batch_size, pinned=device.type == "cuda")
    loaders = [
        ClipLoader(
            store,
            split,
            plan,
            batch_size=recipe.batch_size,
            device=device,
            order=EpochOrder(config.seed),
            views=views if split == config.train_split else (0,),
            allow_incomplete=config.allow_incomplete,
            buffers=buffers,
        )
        for split in splits
    ]
    if not len(loaders[0]):
        raise SettingError(f"split {config.train_split!r} of {store.path.name} has no readable video to train on.")
    return loaders[0], loaders[1] if len(loaders) > 1 and len(loaders[1]) else None


def _training_views(config: TrainingConfig, store: FeatureStore) -> tuple[int, ...]:
    """What the epochs draw from; views that are asked for and not defined are left for `match` to refuse, unless allowed."""
    num_defined = len(view_definitions(store.manifest))
    views = training_views(store.manifest, config.train_split, config.views)
    return tuple(view for view in views if view < num_defined) if config.allow_incomplete else views


def _run_config(
    config: TrainingConfig,
    head_config: Any,
    recipe: Recipe,
    precision: MixedPrecision,
    store: FeatureStore,
    views: Iterable[int],
) -> dict[str, Any]:
    definitions = view_definitions(store.manifest)
    return {
        "head": config.head,
        "preset": config.preset,
        "head_config": dataclasses.asdict(head_config),
        "recipe": asdict(recipe),
        "train_split": config.train_split,
        "views": {str(view): definitions[view] for view in views},
        "seed": config.seed,
        "precision": precision.name,
        "dataset": store.manifest.dataset,
        "store": str(store.path.resolve()),
        "store_key": store.manifest.key,
        "num_videos": store.splits,
        "store_spec": store.manifest.spec,
        "versions": {"torch": torch.__version__},
    }
