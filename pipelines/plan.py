"""`vcache plan`: what an extraction would write and how long it would take, without doing it, and which way pays."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from vcache.extract.datasets.base import Video
from vcache.extract.spec import DTYPES
from vcache.pipelines.batches import COMPUTED
from vcache.pipelines.extending import bytes_left, tasks_left, videos_to_add
from vcache.pipelines.growth import DatasetChanged
from vcache.pipelines.measuring import measure_rates
from vcache.pipelines.partition import share_of
from vcache.pipelines.planning import Choice, ExtractionPlan, PlannedStore
from vcache.pipelines.request import CROSS_FRAME, ExtractionConfig, ExtractionError, per_model
from vcache.pipelines.room import free_bytes, nearest_folder, tasks_bytes, with_reserve
from vcache.pipelines.setup import ExtractionSetup, prepare_extractions, with_common_shards
from vcache.pipelines.shards import ShardTask
from vcache.store.errors import StoreError
from vcache.store.object_path import ObjectPath, local
from vcache.store.parts import PartName, part_name, split_of
from vcache.store.reader import FeatureStore


def plan_extraction(
    config: ExtractionConfig, *, seconds: float | None, on_stage: Callable[[str], None] = lambda name: None
) -> ExtractionPlan:
    """The plan of `run_extractions(per_model(config))`, with about `seconds` spent on measuring, or none. Writes nothing.

    Raises:
        What `run_extractions` raises before it starts, NotEnoughSpace aside; MeasuringError.
    """
    if isinstance(config.store, ObjectPath):
        raise ExtractionError(
            f"{config.store}: `vcache plan` looks at a disk, and knows neither the room in a bucket nor the speed of the way to "
            "it. Leave --store out for the sizes and for what decoding and the backbone take."
        )
    setups = prepare_extractions(per_model(config), on_stage)
    on_stage("looking at the store")
    choices, stores = choices_at_hand(setups), tuple(_planned_store(setup) for setup in setups)
    first = setups[0]
    return ExtractionPlan(
        dataset=first.dataset.name,
        stores=stores,
        num_frames=config.frames,
        splits={split: len(first.dataset.split(split)) for split in first.dataset.splits},
        views={split: len(first.view_arrays(split)) for split in first.dataset.splits},
        part=config.part,
        choices=choices,
        free_bytes=free_bytes(local(first.path)),
        free_folder=nearest_folder(local(first.path)),
        decoder=first.decoder,
        decode_workers=config.decode_workers,
        device=str(first.backbone.device),
        rates=measure_rates(setups, seconds, on_stage) if seconds is not None else None,
    )


def _planned_store(setup: ExtractionSetup) -> PlannedStore:
    batch_size, to_retry = setup.batch_size, 0
    if setup.path.exists():
        with FeatureStore.open(setup.path) as store:
            batch_size = setup.batch_size_in(store)
            if setup.config.retry_failed:
                splits = [split for split in setup.dataset.splits if split in store.splits]
                to_retry = sum(len({row.video_id for row in store.failures(split)}) for split in splits)
    return PlannedStore(
        path=local(setup.path),
        is_there=setup.path.exists(),
        model=setup.backbone.facts.model,
        layers=setup.layers,
        stem=setup.stem,
        batch_size=batch_size,
        to_retry=to_retry,
    )


def choices_at_hand(setups: Sequence[ExtractionSetup]) -> tuple[Choice, ...]:
    """Every dtype with every kind of cross-frame attention, for the layers of the models that were asked for.

    Raises:
        StoreError, ExtractionError, DatasetChanged: a store that was asked for cannot be extended like this.
    """
    choices = []
    with ExitStack() as stack:
        bases: dict[str, _Base] = {}
        for variant in _variants(setups):
            asked = all(other.config == setup.config for other, setup in zip(variant, setups, strict=True))
            for other, setup in zip(variant, setups, strict=True):
                if other.key not in bases:
                    bases[other.key] = _find_base(other, stack, must_do=other.key == setup.key)
            choices.append(_choice(variant, [bases[other.key] for other in variant], asked=asked))
    return tuple(choices)


@dataclass(frozen=True)
class _Base:
    """What a choice would extend: a store, or none; and the videos that it does not know."""

    store: FeatureStore | None
    to_add: dict[str, tuple[Video, ...]]

    def video_ids(self, task: ShardTask) -> tuple[str, ...]:
        """Of the rows of a task, be they stored or to be added."""
        if self.store is not None and task.part in self.store.manifest.splits:
            return self.store.part_videos(task.part).ids[task.rows.start : task.rows.stop]
        return tuple(video.video_id for video in self.to_add[split_of(task.part)][task.rows.start : task.rows.stop])


def _variants(setups: Sequence[ExtractionSetup]) -> Iterator[tuple[ExtractionSetup, ...]]:
    for dtype in DTYPES:
        for cross_frame in CROSS_FRAME:
            if cross_frame != setups[0].config.cross_frame and not any(setup.layers for setup in setups):
                continue  # it is of layers: without them all ways store the same
            with suppress(ExtractionError):  # as maps of a single frame
                configs = [replace(setup.config, dtype=dtype, cross_frame=cross_frame) for setup in setups]
                yield tuple(replace(setup, config=config) for setup, config in zip(setups, configs, strict=True))


def _find_base(setup: ExtractionSetup, stack: ExitStack, *, must_do: bool) -> _Base:
    """The store of this choice; none if it is not there, or will not do where it need not: then the choice has its own."""
    if setup.path.exists():
        try:
            store = stack.enter_context(FeatureStore.open(setup.path))
            setup.batch_size_in(store)  # refuses another one
            return _Base(store, videos_to_add(setup, store))
        except (StoreError, ExtractionError, DatasetChanged):
            if must_do:
                raise
    return _Base(None, videos_to_add(setup, None))


def _choice(variant: Sequence[ExtractionSetup], bases: Sequence[_Base], *, asked: bool) -> Choice:
    stored = [base.store.manifest.rows_per_shard for base in bases if base.store is not None]
    missing = [_missing(*pair) for pair in zip(with_common_shards(variant, stored), bases, strict=True)]
    whole = sum(one.all_bytes for one in missing)
    return Choice(
        dtype=variant[0].config.dtype,
        cross_frame=variant[0].config.cross_frame,
        asked=asked,
        video_bytes=sum(_video_bytes(setup) for setup in variant),
        view_bytes=sum(_view_bytes(setup) for setup in variant),
        total_bytes=sum(_total_bytes(setup) for setup in with_common_shards(variant, [])),
        missing_bytes=sum(one.num_bytes for one in missing),
        missing_files=sum(len(task.arrays) for one in missing for task in one.tasks),
        missing_videos=_num_videos(missing),
        missing_clips=tuple(one.num_clips for one in missing),
        needed_bytes=with_reserve(whole),
    )


@dataclass(frozen=True)
class _Missing:
    """What one store lacks."""

    base: _Base
    tasks: list[ShardTask]
    num_bytes: int
    all_bytes: int
    """Of all processes, where they share the shards."""
    num_clips: int


def _missing(setup: ExtractionSetup, base: _Base) -> _Missing:
    tasks, all_bytes = tasks_left(setup, base.store, base.to_add), bytes_left(setup, base.store, base.to_add)
    batch, num_bytes = setup.batch_size, all_bytes
    rows_per_shard = setup.rows_per_shard
    if base.store is not None:
        batch, rows_per_shard = setup.batch_size_in(base.store), base.store.manifest.rows_per_shard
    if setup.config.part is not None:
        tasks = share_of(_num_shards(base, rows_per_shard), tasks, *setup.config.part)
        num_bytes = tasks_bytes(tasks, rows_per_shard)
    computed = [task for task in tasks if any(spec.name.split("/")[0] in COMPUTED for spec in task.arrays)]
    return _Missing(base, tasks, num_bytes, all_bytes, sum(-(-len(task.rows) // batch) * batch for task in computed))


def _num_shards(base: _Base, rows_per_shard: int) -> dict[PartName, int]:
    """Of each part of the store as it will be, in order."""
    store, shards = base.store, dict[PartName, int]()
    if store is not None:
        shards = {part: store.num_shards(part) for part in store.manifest.splits}
    for split, videos in base.to_add.items():
        number = len(store.parts(split)) if store is not None and split in store.splits else 0
        if videos or not number:
            shards[part_name(split, number)] = -(-len(videos) // rows_per_shard)
    return shards


def _num_videos(missing: Sequence[_Missing]) -> int:
    """Decoded in all: tasks over exactly the same videos are one job, as in `joined_jobs`."""
    jobs = {(split_of(task.part), one.base.video_ids(task)) for one in missing for task in one.tasks}
    return sum(len(ids) for _, ids in jobs)


def _total_bytes(setup: ExtractionSetup) -> int:
    """Of a store of its own."""
    return bytes_left(setup, None, videos_to_add(setup, None))


def _video_bytes(setup: ExtractionSetup) -> int:
    """All arrays of all views, of a video of the split that has most."""
    return max(
        sum(spec.row_bytes for arrays in setup.view_arrays(split).values() for spec in arrays)
        for split in setup.dataset.splits
    )


def _view_bytes(setup: ExtractionSetup) -> int:
    """All arrays of view 0, which every split has."""
    return sum(spec.row_bytes for spec in setup.view_arrays(setup.dataset.splits[0])[0])
