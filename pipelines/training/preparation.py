"""From what a training is told to what it means on a store: the head's Config, the recipe, what is read, in which order."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vcache.heads.registry import get_head
from vcache.heads.requirements import Recipe
from vcache.pipelines.evaluation.evaluate import validation_split
from vcache.pipelines.head_presets import HeadPreset, check_store, find_preset
from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.loading.readable import readable_by_all
from vcache.pipelines.loading.residency import Residency, choose_residency
from vcache.pipelines.loading.resident import OnBytes
from vcache.pipelines.loading.shuffle_choice import ShuffleChoice, choose_shuffle
from vcache.pipelines.loading.subsets import Subset
from vcache.pipelines.matching import ReadPlan, build_head_config, find_store, match
from vcache.pipelines.settings import SettingError, build, split_settings
from vcache.pipelines.stored_views import training_views, view_definitions
from vcache.pipelines.training.config import Resident, TrainingConfig
from vcache.pipelines.training.mixed_precision import MixedPrecision, training_precision
from vcache.pipelines.training.world import World
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore

STREAM_FIELDS = (
    "store",
    "train_split",
    "views",
    "shots",
    "fraction",
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
    head_config: Any
    recipe: Recipe
    precision: MixedPrecision
    plan: ReadPlan
    views: tuple[int, ...]
    """What the epochs draw from."""
    val_split: str | None

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
        HeadStoreMismatch, SettingError, PrecisionError: the store lacks what the head reads, or a setting is none of its.
    """
    settings = resolve(config)
    head_config = build_head_config(config.head, settings.head, store.manifest, frame_step=config.frame_step)
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
    return PreparedHead(
        config=config,
        head_config=head_config,
        recipe=settings.recipe,
        precision=training_precision(config.precision, device),
        plan=match(config.head, requirements, store, splits, views=required, frame_step=config.frame_step),
        views=views,
        val_split=val_split,
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


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where the batches of a group of heads come from."""

    train: ClipLoader
    val: ClipLoader | None
    """None: there is nothing to validate on, as a test split without its labels."""
    shuffle: ShuffleChoice

    @property
    def loaders(self) -> tuple[ClipLoader, ...]:
        return (self.train, self.val) if self.val is not None else (self.train,)

    @property
    def needed_bytes(self) -> int:
        """Of the features of both splits."""
        return sum(loader.needed_bytes for loader in self.loaders)

    def check(self, wanted: Resident) -> None:
        """
        Raises:
            DoesNotFit: it is asked for, and there is no room.
        """
        choose_residency(wanted, self.needed_bytes, self.train.device)

    def keep(self, wanted: Resident, *, epochs: int, reserve_bytes: int, on_bytes: OnBytes) -> Residency:
        """Read the features into memory if that is asked for, or if there is room and they are needed more than once.

        Raises:
            DoesNotFit: it is asked for, and there is no room.
        """
        needed = self.needed_bytes
        if wanted == "auto" and epochs <= 1:
            chosen = choose_residency("disk", needed, self.train.device)
            return replace(chosen, reason="Features are read from disk, as one epoch reads each of them once.")
        chosen = choose_residency(wanted, needed, self.train.device, reserve_bytes)
        if chosen.kind != "disk":
            on_bytes(0, needed)
        before = 0
        for loader in self.loaders:
            loader.keep(chosen.kind, lambda done, total, before=before: on_bytes(before + done, needed))  # type: ignore[misc]
            before += loader.needed_bytes
        return chosen


def open_stream(heads: Sequence[PreparedHead], store: FeatureStore, device: torch.device, world: World) -> Stream:
    """Loaders of the train and the validation split for heads of one stream.

    Raises:
        IncompleteSplit: videos are missing, unless that is allowed.
        UnlikePlans: alone, one of the heads would be trained on other videos.
        SettingError: there is no video to train on, or one of them has no label.
    """
    first = heads[0]
    config, batch_size = first.config, first.recipe.batch_size
    plans = tuple(head.plan for head in heads)
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "allow_incomplete": config.allow_incomplete,
        "buffers": BatchBuffers(-(-batch_size // world.size), pinned=device.type == "cuda"),
        "rank": world.rank,
        "num_ranks": world.size,
    }
    shuffle = shuffle_of(config, store.path)
    order = EpochOrder(config.data_seed, balanced=config.balanced, shuffle=shuffle.kind)
    train = ClipLoader(
        store, config.train_split, plans, views=first.views, order=order, subset=_subset(config), **shared
    )
    if not len(train):
        raise SettingError(f"split {config.train_split!r} of {store.path.name} has no readable video to train on.")
    if unlabelled := _num_unlabelled(train):
        raise SettingError(
            f"{unlabelled} of {len(train.rows)} videos of split {config.train_split!r} in {store.path.name} have no label. "
            "Choose another split with --train-split, or extract from a list with the labels of all videos."
        )
    val = ClipLoader(store, first.val_split, plans, **shared) if first.val_split else None
    can_validate = val is not None and len(val) and not _num_unlabelled(val)
    return Stream(train=train, val=val if can_validate else None, shuffle=shuffle)


def _num_unlabelled(loader: ClipLoader) -> int:
    """Videos without a class; where videos may have several, none is an answer too."""
    targets = loader.targets[loader.rows]
    return 0 if targets.is_floating_point() else int((targets < 0).sum())


def shuffle_of(config: TrainingConfig, store: StorePath) -> ShuffleChoice:
    """How epochs are shuffled of a store that lies there."""
    return choose_shuffle("full" if config.shuffle == "auto" and config.balanced else config.shuffle, store)


def _subset(config: TrainingConfig) -> Subset | None:
    if config.shots is None and config.fraction is None:
        return None
    return Subset(shots=config.shots, fraction=config.fraction, seed=config.data_seed)


def training_length(recipe: Recipe, steps_per_epoch: int) -> tuple[int, int]:
    """(epochs, optimiser steps) of the run; the last epoch may be cut by the number of steps."""
    steps = recipe.steps if recipe.steps is not None else (recipe.epochs or 0) * steps_per_epoch
    return -(-steps // steps_per_epoch), steps


def run_config(head: PreparedHead, store: FeatureStore, stream: Stream, world: World) -> dict[str, Any]:
    """What config.json says of the run: enough to build the head again, and to know on what it was trained."""
    definitions, config, train = view_definitions(store.manifest), head.config, stream.train
    return {
        "head": config.head,
        "preset": config.preset,
        "head_config": dataclasses.asdict(head.head_config),
        "recipe": asdict(head.recipe),
        "train_split": config.train_split,
        "views": {str(view): definitions[view] for view in train.views_with_videos},
        "seed": config.seed,
        "data_seed": config.data_seed,
        "shots": config.shots,
        "fraction": config.fraction,
        "balanced": config.balanced,
        "shuffle": train.order.shuffle,
        "frame_step": config.frame_step,
        "precision": head.precision.name,
        "num_processes": world.size,
        "dataset": store.manifest.dataset,
        "store": str(store.path.resolve()),
        "store_key": store.manifest.key,
        "num_videos": store.splits,
        "num_train": len(train.rows),
        "train_digest": train.digest,
        "val_digest": stream.val.digest if stream.val else None,
        "store_spec": store.manifest.spec,
        "versions": {"torch": torch.__version__},
        "training": replace(config, store=store.path.resolve()).to_json(),
    }


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
