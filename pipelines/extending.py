"""What a command adds to a store: videos, shards and bytes, checked before the first change; and the store, extended."""

import datetime
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from vcache.extract.datasets.base import Video, VideoDataset
from vcache.pipelines.growth import check_classes, label_facts, new_videos, video_table
from vcache.pipelines.request import ExtractionError, recorded_request
from vcache.pipelines.room import check_room, tasks_bytes
from vcache.pipelines.setup import ExtractionSetup, versions_of
from vcache.pipelines.shards import ShardTask, missing_shards
from vcache.pipelines.stores import anything_at
from vcache.pipelines.text_sets import text_bytes
from vcache.store.constants import write_constants
from vcache.store.manifest import Manifest
from vcache.store.parts import PartName, part_name
from vcache.store.reader import FeatureStore
from vcache.store.writer import add_split, add_videos, declare_arrays, record_facts


def videos_to_add(setup: ExtractionSetup, store: FeatureStore | None) -> dict[str, tuple[Video, ...]]:
    """The videos that the store does not know, by split: all of them where there is no store yet.

    All checks of the store come with it, before the first change: a split added to other classes could not be taken back.

    Raises:
        StoreKeyMismatch, ExtractionError, DatasetChanged: the store cannot be extended by this command.
    """
    dataset = setup.dataset
    if store is None:
        return {split: dataset.split(split) for split in dataset.splits}
    store.check_key(setup.key, setup.spec.to_dict())
    if setup.config.store is None:
        _check_same_folder(store, dataset)
    check_classes(store, dataset)
    return {split: new_videos(store, dataset, split) for split in dataset.splits}


def tasks_left(
    setup: ExtractionSetup, store: FeatureStore | None, to_add: Mapping[str, tuple[Video, ...]]
) -> list[ShardTask]:
    """The shards that the command has to write: what `store` lacks, and those of the videos that it does not know yet."""
    setup, tasks = setup.in_store(store), list[ShardTask]()
    step = store.manifest.rows_per_shard if store is not None else setup.rows_per_shard
    for split, videos in to_add.items():
        parts: tuple[PartName, ...] = ()
        if store is not None and split in store.splits:
            parts = store.parts(split)
            tasks += missing_shards(store, [split], setup.view_arrays(split))
        part, rows = part_name(split, len(parts)), range(len(videos))
        tasks += [
            ShardTask(part, first // step, rows[first : first + step], arrays, view)
            for first in rows[::step]
            for view, arrays in setup.view_arrays(split).items()
        ]
    return tasks


def bytes_left(setup: ExtractionSetup, store: FeatureStore | None, to_add: Mapping[str, tuple[Video, ...]]) -> int:
    """What the command has to write: shard files, to the byte if no video fails, and constants."""
    rows_per_shard = store.manifest.rows_per_shard if store is not None else setup.rows_per_shard
    stored = store.manifest.constants if store is not None else {}
    constants = sum(constant.values.nbytes for name, constant in setup.constants.items() if name not in stored)
    constants += text_bytes(
        setup.config,
        store.manifest if store is not None else None,
        len(setup.dataset.class_names),
        setup.backbone.facts.embed_dim,
    )
    return tasks_bytes(tasks_left(setup, store, to_add), rows_per_shard) + constants


def check_disk(setups: Sequence[ExtractionSetup]) -> None:
    """Raise NotEnoughSpace, or what `videos_to_add` raises, before anything is written.

    A bucket has no end that could be known; several stores share the disk of the first.
    """
    num_bytes, where = 0, None
    for setup in setups:
        with ExitStack() as stack:
            store = stack.enter_context(FeatureStore.open(setup.path)) if anything_at(setup.path) else None
            to_add = videos_to_add(setup, store)
            if isinstance(setup.path, Path) and not setup.config.ignore_free_space:
                num_bytes, where = num_bytes + bytes_left(setup, store, to_add), where or setup.path
    if where is not None:
        check_room(where, num_bytes)


def extend(store: FeatureStore, setup: ExtractionSetup, to_add: Mapping[str, tuple[Video, ...]]) -> dict[str, int]:
    """Add what the store lacks of splits, videos, arrays and constants.

    Returns how many videos were added to splits that were there already.
    """
    if (views := setup.view_facts()) and views["views"] != store.manifest.facts.get("views"):
        record_facts(store, views)  # first: a view without a definition could not be made again
    added = {split: len(videos) for split, videos in to_add.items() if split in store.splits and videos}
    for split, videos in to_add.items():
        if split not in store.splits:
            add_split(store, split, video_table(videos, setup.dataset))
        elif split in added:
            add_videos(store, split, video_table(videos, setup.dataset))
        for part in store.parts(split):
            for view, arrays in setup.view_arrays(split).items():
                declare_arrays(store, part, arrays, view)
    write_constants(store, setup.constants)
    store.refresh()
    return added


def new_manifest(setup: ExtractionSetup) -> Manifest:
    """What is written of a store that this command makes."""
    config, dataset = setup.config, setup.dataset
    return Manifest(
        key=setup.key,
        spec=setup.spec.to_dict(),
        dataset=dataset.name,
        class_names=dataset.class_names,
        rows_per_shard=setup.rows_per_shard,
        splits={part_name(split, 0): len(dataset.split(split)) for split in dataset.splits},
        facts={
            "backbone": asdict(setup.backbone.facts),
            "request": recorded_request(config),
            "root": str(dataset.root.resolve()),
            # The last bit of a float32 may depend on it: whatever extends or mends the store computes in batches of this size.
            "batch_size": setup.batch_size,
            **setup.view_facts(),
            **label_facts(dataset),
        },
        versions=versions_of("vcache", "zarr", "numpy"),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _check_same_folder(store: FeatureStore, dataset: VideoDataset) -> None:
    """Two folders of one name share a default store's path: the videos of one must not be taken for the other's."""
    root, made_from = str(dataset.root.resolve()), store.manifest.facts["root"]
    if root != made_from:
        raise ExtractionError(
            f"{store.path} was made from the videos in {made_from}, these are in {root}. If they are the same videos, "
            f"say so with  --store {shlex.quote(str(store.path))}  ; if not, give these a store of their own with --store PATH."
        )
