"""From what a training is told to what it means on a store: the head's Config, the recipe, what is read."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vcache.heads.registry import get_head
from vcache.heads.requirements import HeadRequirements, Recipe
from vcache.pipelines.evaluation.evaluate import validation_split
from vcache.pipelines.fitting_store import find_store
from vcache.pipelines.head_presets import HeadPreset, check_store, find_preset
from vcache.pipelines.loading.readable import readable_by_all
from vcache.pipelines.matching import build_head_config, match
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.settings import SettingError, build, split_settings
from vcache.pipelines.stored_views import training_views, view_definitions
from vcache.pipelines.trainable import check_trainable
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.left_out import kept_classes, left_out_names
from vcache.pipelines.training.mixed_precision import MixedPrecision, training_precision
from vcache.store.reader import FeatureStore

STREAM_FIELDS = (
    "store",
    "train_split",
    "views",
    "shots",
    "fraction",
    "leave_out",
    "balanced",
    "data_seed",
    "resident",
    "shuffle",
    "frame_step",
    "allow_incomplete",
)
"""Of a TrainingConfig, what decides which batches there are; the size of a batch does too."""


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """A config without a store: what the preset, the settings and the paper's recipe say together."""

    preset: HeadPreset | None
    head: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class PreparedHead:
    """A config on a store."""

    config: TrainingConfig
    """What is left out by the names of the store, in its order."""
    head_config: Any
    requirements: HeadRequirements
    recipe: Recipe
    precision: MixedPrecision
    plan: ReadPlan
    views: tuple[int, ...]
    """What the epochs draw from."""
    val_split: str | None
    classes: tuple[int, ...] | None
    """Those of the store's that are trained on, in the order of the logits; None: all."""

    def stream(self) -> tuple[Any, ...]:
        """Heads with the same one are trained on the same batches."""
        return (*(getattr(self.config, name) for name in STREAM_FIELDS), self.recipe.batch_size)


def resolve(config: TrainingConfig) -> ResolvedSettings:
    """
    Raises:
        UnknownHead, UnknownPreset, SettingError: no such head or preset, or a setting that neither head nor recipe has.
    """
    head_class = get_head(config.head)
    preset = find_preset(config.head, config.preset) if config.preset else None
    own, of_recipe = split_settings(config.settings, head_class.Config, Recipe)
    of_preset = _one_length({**preset.recipe}) if preset else {}
    return ResolvedSettings(
        preset=preset,
        head={**(preset.head_settings if preset else {}), **own},
        recipe=build(Recipe, {**asdict(head_class.recipe), **of_preset, **_one_length(of_recipe)}),
    )


def open_training_store(config: TrainingConfig) -> FeatureStore:
    """The store that is named, or the one that fits; of a preset only one that it can be trained from.

    Raises:
        NoFittingStore, HeadStoreMismatch: none fits, or several do; with the command that mends it.
    """
    settings = resolve(config)
    preset = settings.preset

    def check(store: FeatureStore) -> None:
        if preset:
            check_store(preset, store.manifest, settings.head, store.path.name)

    if config.store:
        store = FeatureStore.open(config.store)
        check(store)
        return store
    num_views = 1 if config.allow_incomplete else config.views
    options: dict[str, Any] = {"num_views": num_views, "check": check, "frame_step": config.frame_step}
    options |= {"extract_line": preset.extract_line} if preset else {}
    return find_store(config.head, settings.head, config.train_split, **options)


def prepare_head(config: TrainingConfig, store: FeatureStore, device: torch.device) -> PreparedHead:
    """
    Raises:
        HeadStoreMismatch, SettingError, PrecisionError: the store lacks what the head reads or a class that is to be left out,
            or a setting is none of its.
    """
    settings = resolve(config)
    config = replace(config, leave_out=left_out_names(config.leave_out, store.manifest))
    classes = kept_classes(config.leave_out, store.manifest)
    head_config = build_head_config(
        config.head,
        settings.head,
        store.manifest,
        frame_step=config.frame_step,
        num_classes=None if classes is None else len(classes),
    )
    if config.train_split not in store.splits:
        raise SettingError(
            f"{store.path.name} has no split {config.train_split!r}; it has {', '.join(store.splits)}. "
            "Choose one with --train-split."
        )
    val_split = validation_split(split for split in store.splits if split != config.train_split)
    splits = [config.train_split] + ([val_split] if val_split else [])
    views = _training_views(config, store)
    required = {} if config.allow_incomplete else {config.train_split: views}
    requirements = get_head(config.head).requires(head_config)
    check_trainable(config.head, requirements, store)
    if requirements.fitted_on and config.shots == 1:  # said before anything of a group is trained
        raise SettingError(
            f"head {config.head!r} is fitted on how the videos of a class differ, and --shots 1 leaves one of each. Take 2 or "
            "more."
        )
    return PreparedHead(
        config=config,
        head_config=head_config,
        requirements=requirements,
        recipe=settings.recipe,
        precision=training_precision(config.precision, device),
        plan=match(config.head, requirements, store, splits, views=required, frame_step=config.frame_step),
        views=views,
        val_split=val_split,
        classes=classes,
    )


def readable_digest(head: PreparedHead, store: FeatureStore) -> str:
    """Of which videos the head can read in which views, to train and to validate on.

    Raises:
        IncompleteSplit: some of them are not extracted yet, unless that is allowed.
    """
    splits = {head.config.train_split: head.views} | ({head.val_split: (0,)} if head.val_split else {})
    digest = hashlib.blake2b(digest_size=16)
    for split, views in splits.items():
        allowed = head.config.allow_incomplete
        digest.update(readable_by_all(store, split, (head.plan,), views, allow_incomplete=allowed).tobytes())
    return digest.hexdigest()


def training_length(recipe: Recipe, steps_per_epoch: int) -> tuple[int, int]:
    """(epochs, optimiser steps) of the run; the last epoch may be cut by the number of steps."""
    steps = recipe.steps if recipe.steps is not None else (recipe.epochs or 0) * steps_per_epoch
    return -(-steps // steps_per_epoch), steps


def _training_views(config: TrainingConfig, store: FeatureStore) -> tuple[int, ...]:
    """What the epochs draw from; views that are asked for and not defined are left for `match` to refuse, unless allowed."""
    num_defined = len(view_definitions(store.manifest))
    views = training_views(store.manifest, config.train_split, config.views)
    return tuple(view for view in views if view < num_defined) if config.allow_incomplete else views


def _one_length(settings: dict[str, Any]) -> dict[str, Any]:
    """`epochs` and `steps` say the same thing: the one that is set replaces the recipe's other."""
    if {"epochs", "steps"} <= settings.keys():
        raise SettingError("epochs and steps are both set; a run has one length. Set one of them.")
    if "epochs" in settings:
        return {**settings, "steps": None}
    return {**settings, "epochs": None} if "steps" in settings else settings
