"""The extraction pipeline on one machine: dataset -> sampling -> decode -> preprocess -> frozen backbone -> store.

One shard is the unit of work and of loss: decode threads run ahead of the backbone, rows go to the shard in order, and a
shard counts once its commit record is there. The same command again finds the committed shards and does the rest; a command
that asks for more layers writes only the arrays that a shard lacks. Videos that the dataset lists and the store does not know
are added as a new part of their split.
"""

import datetime
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vcache.extract.datasets.base import Video, VideoDataset
from vcache.pipelines.calibration import Calibration, calibrate, record_calibration, stored_calibration
from vcache.pipelines.growth import check_classes, label_facts, new_videos, video_table
from vcache.pipelines.request import ExtractionConfig, ExtractionError, recorded_request
from vcache.pipelines.room import check_room, tasks_bytes
from vcache.pipelines.setup import ExtractionSetup, prepare_extraction, versions_of
from vcache.pipelines.shards import ExtractionProgress, ShardExtractor, ShardTask, missing_shards
from vcache.pipelines.stores import anything_at
from vcache.store.constants import write_constants
from vcache.store.manifest import Manifest
from vcache.store.parts import PartName, part_name
from vcache.store.reader import FeatureStore
from vcache.store.writer import (
    RowFailure,
    add_split,
    add_videos,
    clean_temporary,
    create_store,
    declare_arrays,
    sole_writer,
)


@dataclass(frozen=True, kw_only=True)
class ExtractionSummary:
    """What a run did and what the store now holds of the splits that were asked for."""

    store: str
    key: str
    layers: tuple[int, ...]
    splits: dict[str, int]
    progress: ExtractionProgress
    added: dict[str, int] = field(default_factory=dict)
    """Videos that this run added to splits that were there already."""
    failures: tuple[RowFailure, ...] = field(default=())
    """All recorded failures of these splits, those of earlier runs too."""

    @property
    def num_videos(self) -> int:
        return sum(self.splits.values())

    def too_many_failures(self, max_failures: float) -> bool:
        """More than the allowed share (at least one is allowed), or nothing but failures."""
        allowed = max(1, int(max_failures * self.num_videos))
        return len(self.failures) > allowed or len(self.failures) == self.num_videos


def run_extraction(
    config: ExtractionConfig, on_progress: Callable[[ExtractionProgress], None] = lambda progress: None
) -> ExtractionSummary:
    """Extract what the store does not hold yet.

    Raises:
        DatasetError, LayerError, RandomWeightsRefused: the request itself cannot be met.
        StoreKeyMismatch: `config.store` holds features made in another way; the message spells the difference out.
        ExtractionError: none of the videos is there, or the store was made from another folder.
        DatasetChanged: the dataset has other classes than the store, or lists its videos no longer or with other labels.
        NotEnoughSpace: what is missing does not fit on the disk; nothing was written.
        PrecisionRefused, CalibrationError: the dtype would lose too much, or int8 has no video to be calibrated with; likewise.
    """
    setup = prepare_extraction(config)
    dataset, path, extractor = setup.dataset, setup.path, setup.extractor()
    calibration = None
    if not anything_at(path):
        to_add = videos_to_add(setup, None)
        _check_room(setup, None, to_add)
        # Before there is a store: what is refused here may be asked for in another way, with the same --store.
        calibration = _calibrate(setup, extractor, Calibration())
        create_store(path, _manifest(setup), {split: video_table(videos, dataset) for split, videos in to_add.items()})
    with FeatureStore.open(path) as store, sole_writer(path):
        to_add = videos_to_add(setup, store)
        clean_temporary(store)
        _check_room(setup, store, to_add)
        calibration = calibration or _calibrate(setup, extractor, stored_calibration(store))
        added = _extend(store, setup, to_add)
        record_calibration(store, calibration)
        tasks = missing_shards(store, dataset.splits, setup.arrays)
        progress = _initial_progress(store, dataset, tasks)
        on_progress(progress)
        extractor.run(store, tasks, progress, lambda: on_progress(progress))
        store.refresh()
        return ExtractionSummary(
            store=str(path),
            key=setup.key,
            layers=setup.layers,
            splits={split: store.splits[split] for split in dataset.splits},
            progress=progress,
            added=added,
            failures=tuple(failure for split in dataset.splits for failure in store.failures(split)),
        )


def _calibrate(setup: ExtractionSetup, extractor: ShardExtractor, known: Calibration) -> Calibration:
    """What is not known yet; PrecisionRefused where the dtype would lose too much."""
    derived = setup.layers if setup.config.cross_frame == "derive" else ()
    return calibrate(extractor, setup.arrays, known, derived=derived, max_error=setup.config.max_error)


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
    tasks: list[ShardTask] = []
    step = store.manifest.rows_per_shard if store is not None else setup.rows_per_shard
    for split, videos in to_add.items():
        parts: tuple[PartName, ...] = ()
        if store is not None and split in store.splits:
            parts = store.parts(split)
            tasks += missing_shards(store, [split], setup.arrays)
        part, rows = part_name(split, len(parts)), range(len(videos))
        tasks += [ShardTask(part, first // step, rows[first : first + step], setup.arrays) for first in rows[::step]]
    return tasks


def bytes_left(setup: ExtractionSetup, store: FeatureStore | None, to_add: Mapping[str, tuple[Video, ...]]) -> int:
    """What the command has to write: shard files, to the byte if no video fails, and constants."""
    rows_per_shard = store.manifest.rows_per_shard if store is not None else setup.rows_per_shard
    stored = store.manifest.constants if store is not None else {}
    constants = sum(constant.values.nbytes for name, constant in setup.constants.items() if name not in stored)
    return tasks_bytes(tasks_left(setup, store, to_add), rows_per_shard) + constants


def _check_room(setup: ExtractionSetup, store: FeatureStore | None, to_add: Mapping[str, tuple[Video, ...]]) -> None:
    """A bucket has no end that could be known."""
    if isinstance(setup.path, Path) and not setup.config.ignore_free_space:
        check_room(setup.path, bytes_left(setup, store, to_add))


def _extend(store: FeatureStore, setup: ExtractionSetup, to_add: Mapping[str, tuple[Video, ...]]) -> dict[str, int]:
    """Add what the store lacks of splits, videos, arrays and constants.

    Returns how many videos were added to splits that were there already.
    """
    added = {split: len(videos) for split, videos in to_add.items() if split in store.splits and videos}
    for split, videos in to_add.items():
        if split not in store.splits:
            add_split(store, split, video_table(videos, setup.dataset))
        elif split in added:
            add_videos(store, split, video_table(videos, setup.dataset))
        for part in store.parts(split):
            declare_arrays(store, part, setup.arrays)
    write_constants(store, setup.constants)
    store.refresh()
    return added


def _manifest(setup: ExtractionSetup) -> Manifest:
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
            # The last bit of a float32 may depend on it, on some devices: `vcache repair` makes the same bits again.
            "batch_size": config.batch_size,
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


def _initial_progress(store: FeatureStore, dataset: VideoDataset, tasks: list[ShardTask]) -> ExtractionProgress:
    total = sum(len(task.rows) for task in tasks)
    rows = sum(store.splits[split] for split in dataset.splits)
    return ExtractionProgress(videos_total=total, videos_skipped=rows - total)
