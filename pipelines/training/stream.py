"""Where the batches of heads that are trained side by side come from, and what a run says of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from vcache.pipelines.device import device_name
from vcache.pipelines.frozen_tail import tail_key
from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.loading.residency import Residency, choose_residency
from vcache.pipelines.loading.resident import OnBytes
from vcache.pipelines.loading.shuffle_choice import ShuffleChoice, choose_shuffle
from vcache.pipelines.loading.subsets import Subset
from vcache.pipelines.settings import SettingError
from vcache.pipelines.stored_views import view_definitions
from vcache.pipelines.training.config import Resident, TrainingConfig
from vcache.pipelines.training.preparation import PreparedHead
from vcache.pipelines.training.world import World
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


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
        "classes": first.classes,
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
        of_classes = " of the classes that are not left out" if config.leave_out else ""
        raise SettingError(
            f"split {config.train_split!r} of {store.path.name} has no readable video{of_classes} to train on."
        )
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


def run_config(head: PreparedHead, store: FeatureStore, stream: Stream, world: World) -> dict[str, Any]:
    """What config.json says of the run: enough to build the head again, and to know on what it was trained."""
    definitions, config, train = view_definitions(store.manifest), head.config, stream.train
    key = tail_key(head.requirements, head.head_config, store.manifest)
    tail = {} if key is None else {"tail": asdict(key)}
    return {
        "head": config.head,
        "preset": config.preset,
        "head_config": dataclasses.asdict(head.head_config),
        **tail,
        "recipe": asdict(head.recipe),
        "train_split": config.train_split,
        "views": {str(view): definitions[view] for view in train.views_with_videos},
        "seed": config.seed,
        "data_seed": config.data_seed,
        "shots": config.shots,
        "fraction": config.fraction,
        "left_out": list(config.leave_out),
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
        "versions": {"vcache": version("vcache"), "torch": torch.__version__},
        "device": device_name(world.device),
        "training": replace(config, store=store.path.resolve()).to_json(),
    }
