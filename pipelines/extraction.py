"""The extraction pipeline on one machine: dataset -> sampling -> decode -> preprocess -> frozen backbone -> store.

One shard is the unit of work and of loss: decode threads run ahead of the backbone, rows go to the shard in order, and a
shard counts once its commit record is there. The same command again finds the committed shards and does the rest; a command
that asks for more layers writes only the arrays that a shard lacks. Videos that the dataset lists and the store does not know
are added as a new part of their split.
"""

import datetime
import importlib.metadata
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from vcache.extract.backbone import BackboneFacts, FrozenBackbone, load_backbone
from vcache.extract.datasets.base import Video, VideoDataset
from vcache.extract.datasets.registry import list_datasets, load_dataset
from vcache.extract.decode import decoder_versions
from vcache.extract.layers import resolve_layers
from vcache.extract.preprocess import Preprocessing, from_open_clip_config
from vcache.extract.sampling import Sampling, StridedSampling, TSNSampling
from vcache.extract.spec import DTYPES, ExtractionSpec
from vcache.pipelines.calibration import Calibration, calibrate, record_calibration, stored_calibration
from vcache.pipelines.derivation import input_array, projection_constants
from vcache.pipelines.device import select_device
from vcache.pipelines.growth import check_classes, new_videos, video_table
from vcache.pipelines.precision_error import MAX_ERROR
from vcache.pipelines.room import check_room, tasks_bytes
from vcache.pipelines.shards import ExtractionProgress, ShardExtractor, ShardTask, missing_shards
from vcache.pipelines.stores import anything_at, default_store_path
from vcache.store.constants import Constant, write_constants
from vcache.store.key import cache_key
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest
from vcache.store.object_path import StorePath
from vcache.store.parts import PartName, check_split_name, part_name
from vcache.store.quantise import quantised_specs
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

# A shard is what a killed run loses. Larger files than 128 MB are no faster to write or read, and where rows are small the
# bound on the rows is what keeps the loss small.
SHARD_BYTES = 128 * 2**20
MAX_ROWS_PER_SHARD = 64

CROSS_FRAME = ("qk", "maps", "derive", "none")
PREPROCESS = ("fast", "exact")

_LOCAL_DIR = "local-dir:"  # open_clip's prefix for a model in a folder


class ExtractionError(ValueError):
    """What was asked cannot be extracted into this store; the message says what differs and what to do."""


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """One `vcache extract` command.

    Only `frames`, `stride`, `tsn`, `preprocess`, `dtype`, `model` and `pretrained` change a stored value, through the spec and
    its key; the rest says what to store, where, and how fast.
    """

    dataset: str
    """A registered name, a folder, or a CSV file."""
    layers: str = "-4:"
    split: tuple[str, ...] | None = None
    """Splits to extract; None is all that the dataset has."""
    frames: int = 8
    stride: int = 16
    """Frames between two sampled ones; not used with `tsn`."""
    tsn: bool = False
    """Segment centres over the whole video in place of a strided window in its middle."""
    cross_frame: str = "qk"
    """"qk": the queries and keys of the same layers; "maps": the head-mean softmax maps made of them; "derive": what enters
    these blocks, and their frozen weights, from which training makes Q/K again; "none": nothing."""
    dtype: str = "float16"
    """"float16", "bfloat16", "float32", or "int8" with a scale per token (store/quantise.py)."""
    max_error: float = MAX_ERROR
    """How much of the standardised features the dtype may lose on a sample before the extraction is refused."""
    model: str = "ViT-B-16-quickgelu"
    pretrained: str | None = "openai"
    random_weights: bool = False
    preprocess: str = "fast"
    root: Path | None = None
    store: StorePath | None = None
    val_fraction: float = 0.2
    """Share of the videos that a dataset without splits of its own puts into `val`."""
    device: str = "auto"
    workers: int = 2
    """Decode threads."""
    batch_size: int = 4
    """Clips in one forward pass."""
    max_failures: float = 0.01
    """Share of the videos that may fail, at least one, before the exit status says so."""
    ignore_free_space: bool = False
    """Begin although the disk has less room than the features take."""

    def __post_init__(self) -> None:
        for name, allowed in {"cross_frame": CROSS_FRAME, "dtype": DTYPES, "preprocess": PREPROCESS}.items():
            if getattr(self, name) not in allowed:
                raise ExtractionError(
                    f"--{name.replace('_', '-')} {getattr(self, name)!r}: there are {', '.join(allowed)}."
                )
        for name in ("frames", "stride", "workers", "batch_size"):
            if getattr(self, name) < 1:
                raise ExtractionError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1.")
        if not 0 <= self.max_failures <= 1:
            raise ExtractionError(f"--max-failures {self.max_failures:g}: a share of the videos, from 0 to 1.")
        if not self.max_error > 0:
            raise ExtractionError(f"--max-error {self.max_error:g}: must be above 0.")
        if self.cross_frame == "maps" and self.frames < 2:
            raise ExtractionError("--cross-frame maps needs at least two frames: maps are between neighbours.")
        if self.tsn and self.stride != ExtractionConfig.stride:
            raise ExtractionError(f"--stride {self.stride} has no meaning with --tsn, which covers the whole video.")

    @property
    def sampling(self) -> Sampling:
        if self.tsn:
            return TSNSampling(num_frames=self.frames)
        return StridedSampling(num_frames=self.frames, stride_frames=self.stride)


@dataclass(frozen=True, kw_only=True)
class ExtractionSetup:
    """A command with all that its words stand for, loaded and checked; nothing is written yet."""

    config: ExtractionConfig
    dataset: VideoDataset
    backbone: FrozenBackbone
    preprocessing: Preprocessing
    layers: tuple[int, ...]
    """Absolute."""

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return array_specs(self.backbone.facts, self.layers, self.config)

    @cached_property
    def constants(self) -> dict[str, Constant]:
        """What the arrays of all videos are read with."""
        return projection_constants(self.backbone, self.layers) if self.config.cross_frame == "derive" else {}

    @cached_property
    def spec(self) -> ExtractionSpec:
        return extraction_spec(self.config, self.backbone, self.preprocessing)

    @cached_property
    def key(self) -> str:
        return cache_key(self.spec.to_dict())

    @cached_property
    def path(self) -> StorePath:
        """The store that the command writes or extends."""
        config = self.config
        return config.store or default_store_path(self.dataset.name, config.model, config.frames, self.key)

    @property
    def rows_per_shard(self) -> int:
        """Of a store that is made by this command; one that is there has its own."""
        largest = max(spec.row_bytes for spec in self.arrays)
        return max(1, min(MAX_ROWS_PER_SHARD, SHARD_BYTES // largest))

    def extractor(self) -> ShardExtractor:
        return ShardExtractor(
            self.dataset,
            self.config.sampling,
            self.preprocessing,
            self.backbone,
            num_threads=self.config.workers,
            batch_size=self.config.batch_size,
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


def prepare_extraction(config: ExtractionConfig) -> ExtractionSetup:
    """Find the videos and load the backbone.

    Raises:
        DatasetError, LayerError, RandomWeightsRefused: the request itself cannot be met.
        ExtractionError: none of the videos is there.
    """
    dataset = load_dataset(config.dataset, root=config.root, splits=config.split, val_fraction=config.val_fraction)
    _check_dataset(dataset)
    backbone = load_backbone(
        config.model, config.pretrained, random_weights=config.random_weights, device=select_device(config.device)
    )
    preprocessing = from_open_clip_config(backbone.preprocess_config, mode=config.preprocess)
    return ExtractionSetup(
        config=config,
        dataset=dataset,
        backbone=backbone,
        preprocessing=preprocessing,
        layers=resolve_layers(config.layers, backbone.facts.num_layers),
    )


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
        create_store(path, _manifest(setup), {split: video_table(videos) for split, videos in to_add.items()})
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


def extraction_spec(config: ExtractionConfig, backbone: FrozenBackbone, preprocessing: Preprocessing) -> ExtractionSpec:
    """Everything of this command that changes a stored value."""
    return ExtractionSpec(
        model=backbone.facts.model,
        weights_sha256=backbone.weights_sha256,
        preprocessing=preprocessing.to_dict(),
        sampling=config.sampling.to_dict(),
        view={"crop": "centre", "flip": False},
        decoder=decoder_versions(),
        versions={**preprocessing.versions(), **_versions("torch", "open_clip_torch")},
        dtype=config.dtype,
    )


def array_specs(facts: BackboneFacts, layers: Iterable[int], config: ExtractionConfig) -> tuple[ArraySpec, ...]:
    """The arrays of one view, row by row of videos; ARCHITECTURE "What is stored" has the layout."""
    T, N, D, H = config.frames, facts.num_tokens, facts.width, facts.num_heads
    dtype = "float16" if config.dtype == "int8" else config.dtype
    specs = [
        ArraySpec(name="frame_index", dims=("frame",), shape=(T,), chunk=(T,), dtype="int32"),
        ArraySpec(name="crop", dims=("box",), shape=(4,), chunk=(4,), dtype="float32"),
        ArraySpec(name="flip", dims=(), shape=(), chunk=(), dtype="uint8"),
        ArraySpec(
            name="embed",
            dims=("frame", "channel"),
            shape=(T, facts.embed_dim),
            chunk=(T, facts.embed_dim),
            dtype=dtype,
        ),
    ]
    for layer in layers:
        tokens = ArraySpec(
            name=f"tokens/{layer}",
            dims=("frame", "token", "channel"),
            shape=(T, N, D),
            chunk=(1, N, D),
            dtype=dtype,
        )
        cls = ArraySpec(name=f"cls/{layer}", dims=("frame", "channel"), shape=(T, D), chunk=(T, D), dtype=dtype)
        specs += [tokens, cls]
        if config.cross_frame == "qk":
            head = replace(
                tokens,
                name=f"q/{layer}",
                dims=("frame", "head", "token", "dim"),
                shape=(T, H, N, facts.head_dim),
                chunk=(1, H, N, facts.head_dim),
            )
            specs += [head, replace(head, name=f"k/{layer}")]
        if config.cross_frame == "maps":
            P = N - 1
            maps = replace(
                tokens,
                name=f"maps/{layer}",
                dims=("pair", "side", "query", "key"),
                shape=(T - 1, 2, P, P),
                chunk=(1, 2, P, P),
            )
            specs.append(maps)
        if config.cross_frame == "derive":
            specs.append(replace(tokens, name=input_array(layer)))
    if config.dtype == "int8":
        specs = [stored for spec in specs for stored in quantised_specs(spec)]
    return tuple({spec.name: spec for spec in specs}.values())  # what enters a block may be another one's tokens


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
            add_split(store, split, video_table(videos))
        elif split in added:
            add_videos(store, split, video_table(videos))
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
            "request": _request(config),
            "root": str(dataset.root.resolve()),
            # The last bit of a float32 may depend on it, on some devices: `vcache repair` makes the same bits again.
            "batch_size": config.batch_size,
        },
        versions=_versions("vcache", "zarr", "numpy"),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _request(config: ExtractionConfig) -> dict[str, object]:
    """The command's words that make the same store again, from any folder; matching.py turns them back into a command."""
    registered = {name for name, info in list_datasets().items() if not info.chosen_by_path}
    return {
        "dataset": config.dataset if config.dataset in registered else _absolute(config.dataset),
        "root": _absolute(config.root) if config.root else None,
        "split": ",".join(config.split) if config.split else None,
        "frames": config.frames,
        "stride": config.stride,
        "tsn": config.tsn,
        "dtype": config.dtype,
        "model": _absolute_model(config.model),
        "pretrained": _absolute_file(config.pretrained),
        "random_weights": config.random_weights,
        "preprocess": config.preprocess,
        "val_fraction": config.val_fraction,
    }


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


def _absolute_model(model: str) -> str:
    folder = model.removeprefix(_LOCAL_DIR)
    return model if folder == model else _LOCAL_DIR + _absolute(folder)


def _absolute_file(pretrained: str | None) -> str | None:
    """A checkpoint's path made absolute; a tag stays a tag."""
    return _absolute(pretrained) if pretrained and Path(pretrained).expanduser().is_file() else pretrained


def _check_dataset(dataset: VideoDataset) -> None:
    """Refuse what a store cannot hold, and a wrong root: every video would be recorded as failed, for good."""
    for split in dataset.splits:
        try:
            check_split_name(split)
        except ValueError as error:
            raise ExtractionError(f"{dataset.name}: {error}. Rename the split in the dataset.") from error
    if not any((dataset.root / video.path).is_file() for video in dataset.videos):
        raise ExtractionError(
            f"none of the {len(dataset.videos)} videos that {dataset.name} lists is in {dataset.root}; the first should be "
            f"{dataset.root / dataset.videos[0].path}. Say where they are with --root FOLDER; `vcache datasets` has the layouts."
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


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}
