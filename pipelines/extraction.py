"""The extraction pipeline on one machine: dataset -> sampling -> decode -> preprocess -> frozen backbone -> store.

One shard is the unit of work and of loss: decoding, the backbone and the writer work on different videos at the same time
(stages.py), and a shard counts once its commit record is there. The same command again finds the committed shards and does the
rest; a command that asks for more layers writes only the arrays that a shard lacks. Videos that the dataset lists and the store
does not know are added as a new part of their split. Several models have a store each, and their videos are decoded once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field

from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.calibration import Calibration, calibrate, record_calibration, stored_calibration
from vcache.pipelines.decoding import Decode, Decoder, new_decoder
from vcache.pipelines.extending import check_disk, extend, new_manifest, videos_to_add
from vcache.pipelines.failures import check_failures_file, write_failures
from vcache.pipelines.growth import video_table
from vcache.pipelines.partition import part_of
from vcache.pipelines.precision import channel_constants
from vcache.pipelines.progress import ExtractionProgress
from vcache.pipelines.reextraction import Reextraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.retrying import retry_failed
from vcache.pipelines.setup import ExtractionSetup, prepare_extractions
from vcache.pipelines.shards import ShardJob, ShardTask, Target, TargetTask, joined_jobs, missing_shards
from vcache.pipelines.stages import run_jobs
from vcache.pipelines.stored_views import failed_in_any, partial_in_any
from vcache.pipelines.stores import anything_at
from vcache.pipelines.text_sets import add_every_set
from vcache.store.locks import set_up_turn, shared_writer, sole_writer
from vcache.store.reader import FeatureStore
from vcache.store.retry import RetrySummary
from vcache.store.writer import (
    RowFailure,
    clean_temporary,
    create_store,
)

RunElsewhere = Callable[
    [Sequence[ShardJob], Mapping[Target, ExtractionSetup], ExtractionProgress, Callable[[], None]], None
]
"""Extracts and commits jobs; given what makes each target again, and what to call when the progress has changed."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSummary:
    """What a run did and what the store now holds of the splits that were asked for."""

    store: str
    key: str
    layers: tuple[int, ...]
    splits: dict[str, int]
    progress: ExtractionProgress
    stem: bool = False
    """Whether what enters block 0 was asked for, beside the layers."""
    added: dict[str, int] = field(default_factory=dict)
    """Videos that this run added to splits that were there already."""
    failures: tuple[RowFailure, ...] = field(default=())
    """All recorded failures of these splits, those of earlier runs too."""
    partial: tuple[RowFailure, ...] = field(default=())
    """All rows of these splits that are stored although their video is damaged."""
    retried: RetrySummary | None = None
    """What became of earlier failures; None unless they were to be tried again."""
    text_note: str | None = None
    """Why the store has no text embeddings of the class names, or what was cut from them; None where there is nothing to say."""
    failures_file: str | None = None
    """Where failures and partial rows are listed; None if there are none, and for a store in a bucket unless it was named."""

    @property
    def num_videos(self) -> int:
        return sum(self.splits.values())

    def too_many_failures(self, max_failures: float) -> bool:
        """More than the allowed share (at least one is allowed), or nothing but failures."""
        allowed = max(1, int(max_failures * self.num_videos))
        return len(self.failures) > allowed or len(self.failures) == self.num_videos


@dataclass(frozen=True, kw_only=True)
class _OpenStore:
    """A store of this run, extended to all that the command asks for, and locked."""

    setup: ExtractionSetup
    target: Target
    added: dict[str, int]
    missing: tuple[ShardTask, ...]
    retried: RetrySummary | None
    text_note: str | None

    @property
    def tasks(self) -> list[ShardTask]:
        """What of the missing shards this process writes."""
        part = self.setup.config.part
        return list(self.missing) if part is None else part_of(self.target.store, self.missing, *part)

    @property
    def num_skipped(self) -> int:
        """Videos of which the store holds all that is asked for."""
        rows = sum(self.target.store.splits[split] for split in self.setup.dataset.splits)
        return rows - sum(len(rows) for _, rows in {(task.part, task.rows) for task in self.missing})


def run_extraction(
    config: ExtractionConfig,
    on_progress: Callable[[ExtractionProgress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda name: None,
) -> ExtractionSummary:
    """Extract what the store does not hold yet; `run_extractions` of one model."""
    (summary,) = run_extractions((config,), on_progress, on_stage)
    return summary


def run_extractions(
    configs: Sequence[ExtractionConfig],
    on_progress: Callable[[ExtractionProgress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda name: None,
) -> tuple[ExtractionSummary, ...]:
    """Extract what the stores do not hold yet, each video decoded once for all of them.

    Args:
        configs: requests that differ in the model or in where and how its features are stored, not in the videos.
        on_progress: called after every batch, in the calling thread.
        on_stage: called with the name of what is being done before the first batch.

    Raises:
        DatasetError, LayerError, RandomWeightsRefused: the request itself cannot be met.
        StoreKeyMismatch: `config.store` holds features made in another way; the message spells the difference out.
        ExtractionError: the file for failures cannot be made, none of the videos is there, or the store was made from another
            folder, or in batches of another size.
        DatasetChanged: the dataset has other classes than the store, or lists its videos no longer or with other labels.
        NotEnoughSpace: what is missing does not fit on the disk; nothing was written.
        PrecisionRefused, CalibrationError: the dtype would lose too much, or int8 has no video to be calibrated with; likewise.
        StoreBusy: another process writes the store, and not as a part beside this one.
        CannotRecompute, UnsupportedLocation: failed videos cannot be tried again; they are as they were.
    """
    if configs[0].failures is not None:
        check_failures_file(configs[0].failures)
    with ExitStack() as stack:
        elsewhere = stack.enter_context(_cluster(configs[0], on_stage))
        setups = prepare_extractions(configs, on_stage)
        decoder = stack.enter_context(closing(new_decoder(configs[0].decode_workers, setups[0].decoder)))
        opened = _open_all(setups, decoder.decode, on_stage, stack)
        progress = _extract(opened, decoder, elsewhere, on_progress)
        return tuple(_summary(one, progress) for one in opened)


def _open_all(
    setups: Sequence[ExtractionSetup], decode: Decode, on_stage: Callable[[str], None], stack: ExitStack
) -> list[_OpenStore]:
    """Make or extend the stores; parts that share them take turns at it. They are open and locked as long as `stack` is."""
    with ExitStack() as turns:
        # In one order in every process, or two that name the models in another order would wait for each other.
        for setup in sorted(setups, key=lambda one: str(one.path)):
            turns.enter_context(_turn(setup, on_stage))
        check_disk(setups)
        # Before there is a store: what is refused here may be asked for in another way, with the same --store.
        calibrations = [_create(setup, decode, on_stage) for setup in setups]
        opened = []
        for setup, calibration in zip(setups, calibrations, strict=True):
            store = stack.enter_context(FeatureStore.open(setup.path))
            hold = sole_writer if setup.config.part is None else shared_writer
            stack.enter_context(hold(setup.path))
            opened.append(_open(setup, store, calibration, decode, on_stage))
        return opened


def _turn(setup: ExtractionSetup, on_stage: Callable[[str], None]) -> AbstractContextManager[None]:
    if setup.config.part is None:
        return nullcontext()
    return set_up_turn(setup.path, on_wait=lambda: on_stage("waiting for another part, which is setting up the store"))


def _cluster(config: ExtractionConfig, on_stage: Callable[[str], None]) -> AbstractContextManager[RunElsewhere | None]:
    if config.scheduler is None and config.workers is None:
        return nullcontext()
    from vcache.pipelines.cluster import open_cluster  # dask takes as long to load as all the rest

    return open_cluster(config, on_stage)


def new_target(setup: ExtractionSetup, store: FeatureStore, decode: Decode) -> Target:
    """What computes the rows of the store, but for the constants of int8."""
    extractor = setup.extractor(batch_size=setup.batch_size_in(store), decode=decode)
    return Target(store=store, extractor=extractor, views=setup.views)


def _create(setup: ExtractionSetup, decode: Decode, on_stage: Callable[[str], None]) -> Calibration | None:
    """Make the store, if there is none yet, and return its calibration."""
    if anything_at(setup.path):
        return None
    setup, to_add = setup.in_store(None), videos_to_add(setup, None)
    calibration = _calibrate(setup, setup.extractor(decode=decode), Calibration(), on_stage)
    create_store(
        setup.path, new_manifest(setup), {split: video_table(videos, setup.dataset) for split, videos in to_add.items()}
    )
    return calibration


def _open(
    setup: ExtractionSetup,
    store: FeatureStore,
    calibration: Calibration | None,
    decode: Decode,
    on_stage: Callable[[str], None],
) -> _OpenStore:
    """Bring the store to what the command asks for, but for the features."""
    on_stage("looking at the store")
    store.refresh()  # as it is now that no other process changes it
    retried = _retry(setup, store, on_stage) if setup.config.retry_failed else None
    setup, to_add = setup.in_store(store), videos_to_add(setup, store)
    target = new_target(setup, store, decode)
    clean_temporary(store)
    calibration = calibration or _calibrate(setup, target.extractor, stored_calibration(store), on_stage)
    added = extend(store, setup, to_add)
    record_calibration(store, calibration)
    text_note = add_every_set(store, setup.config, on_stage)
    missing = tuple(
        task for split in setup.dataset.splits for task in missing_shards(store, [split], setup.view_arrays(split))
    )
    quantised = {spec.name for task in missing for spec in task.arrays if spec.dtype == "int8"}
    target.extractor.constants = channel_constants(store, quantised, setup.backbone.device)
    # Not before: what int8 is made with comes from whole videos.
    target.extractor.allow_partial = setup.config.allow_partial
    return _OpenStore(setup=setup, target=target, added=added, missing=missing, retried=retried, text_note=text_note)


def _retry(setup: ExtractionSetup, store: FeatureStore, on_stage: Callable[[str], None]) -> RetrySummary:
    config = setup.config
    origin = Reextraction(
        store,
        root=setup.dataset.root,
        workers=config.decode_workers,
        backbone=setup.backbone,
        allow_partial=config.allow_partial,
        listed=setup.dataset.videos,
    )

    def report(done: int, total: int) -> None:
        on_stage(f"extracting failed videos again: {done} of {total}")

    return retry_failed(store, origin, setup.dataset.splits, report, allow_partial=config.allow_partial)


def _extract(
    opened: Sequence[_OpenStore],
    decoder: Decoder,
    elsewhere: RunElsewhere | None,
    on_progress: Callable[[ExtractionProgress], None],
) -> ExtractionProgress:
    """All tasks of all stores, those over the same videos at once."""
    jobs = joined_jobs(TargetTask(one.target, task) for one in opened for task in one.tasks)
    progress = ExtractionProgress(
        videos_total=sum(len(job.videos) for job in jobs), videos_skipped=min(one.num_skipped for one in opened)
    )
    on_progress(progress)
    if jobs and elsewhere is not None:
        decoder.close()
        elsewhere(jobs, {one.target: one.setup for one in opened}, progress, lambda: on_progress(progress))
    elif jobs:
        run_jobs(
            jobs,
            decoder=decoder,
            num_threads=opened[0].setup.config.decode_workers,
            progress=progress,
            report=lambda: on_progress(progress),
        )
    return progress


def _summary(one: _OpenStore, progress: ExtractionProgress) -> ExtractionSummary:
    store, splits = one.target.store, one.setup.dataset.splits
    # In turn: the last of several parts then lists what all of them have met.
    with _turn(one.setup, lambda name: None):
        store.refresh()
        listed = write_failures(store, one.setup.dataset.root, one.setup.config.failures)
    return ExtractionSummary(
        store=str(store.path),
        key=one.setup.key,
        layers=one.setup.layers,
        stem=one.setup.stem,
        splits={split: store.splits[split] for split in splits},
        progress=progress,
        added=one.added,
        failures=tuple(failure for split in splits for failure in failed_in_any(store, split)),
        partial=tuple(row for split in splits for row in partial_in_any(store, split)),
        retried=one.retried,
        text_note=one.text_note,
        failures_file=str(listed) if listed else None,
    )


def _calibrate(
    setup: ExtractionSetup, extractor: ClipExtractor, known: Calibration, on_stage: Callable[[str], None]
) -> Calibration:
    """What is not known yet; PrecisionRefused where the dtype would lose too much."""
    on_stage(f"measuring on a sample of the videos what {setup.config.dtype} loses")
    derived = setup.layers if setup.config.cross_frame == "derive" else ()
    return calibrate(extractor, setup.arrays, known, derived=derived, max_error=setup.config.max_error)
