"""Rows of a store made again, from the videos and the backbone that its manifest names."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from vcache.extract.backbone import BackboneError, FrozenBackbone, load_backbone
from vcache.extract.datasets.base import DatasetError, Video, VideoDataset
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.preprocess import from_open_clip_config
from vcache.extract.video import VideoError
from vcache.extract.views import PreparedClip
from vcache.pipelines.calibration import Calibration, calibrate
from vcache.pipelines.derivation import projection_constants
from vcache.pipelines.device import select_device
from vcache.pipelines.growth import video_table, videos_of
from vcache.pipelines.precision import channel_constants
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import extraction_spec
from vcache.pipelines.shards import ShardExtractor
from vcache.store.constants import Constant
from vcache.store.errors import CannotRecompute, StoreError
from vcache.store.key import spec_difference
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.origin import Recomputed
from vcache.store.parts import PartName, split_of
from vcache.store.quantise import constant_names, source_name
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure


class Reextraction:
    """What a store was made of (`store.origin.Origin`). The backbone is loaded when a row is first asked for.

    With `same_key`, features are refused unless the key comes out the same: weights, libraries and decoder are those of the
    first extraction. `on_video` is called after each video that is decoded, in another thread.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        root: Path | None = None,
        device: str = "auto",
        workers: int = 2,
        same_key: bool = True,
        on_video: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.device, self.workers, self.same_key = store, device, workers, same_key
        self.on_video = on_video
        self.config = config_of(store.manifest)
        self.root = root or Path(store.manifest.facts["root"])

    @cached_property
    def differences(self) -> list[tuple[str, Any, Any]]:
        """(field, stored, now) of everything that changes a value and is not as it was when the store was made."""
        preprocessing = from_open_clip_config(self._backbone.preprocess_config, mode=self.config.preprocess)
        return spec_difference(
            self.store.manifest.spec, extraction_spec(self.config, self._backbone, preprocessing).to_dict()
        )

    def recompute(self, part: PartName, view: int, rows: Sequence[int], arrays: tuple[ArraySpec, ...]) -> Recomputed:
        """Each of the rows with its arrays, or with why its video gives none.

        A clip goes through the backbone in a batch of as many clips as at first, filled up with copies: the last bit of a sum
        may depend on how many rows a matrix has (seen on two cores for clips that were alone), and on nothing else of the
        other clips.
        """
        if view != 0:
            raise CannotRecompute(f"view {view} of {part!r} was not made by `vcache extract`, which makes view 0")
        extractor = self._checked_extractor
        int8 = {
            source_name(spec.name) for spec in arrays if spec.dtype == "int8" or spec.name != source_name(spec.name)
        }
        extractor.constants = channel_constants(self.store, int8, self._backbone.device)
        sizes, table = self._batch_sizes(part, rows), self.store.part_videos(part)
        videos = videos_of(table, part, rows)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            clips = zip(rows, videos, pool.map(self._prepare, videos), strict=True)
            for (_, size), batch in itertools.groupby(clips, key=lambda clip: sizes[clip[0]]):
                yield from _forward(extractor, list(batch), size, arrays)

    def list_videos(self, part: PartName) -> VideoTable:
        """The videos of the part's split as the dataset lists them now; the classes must be those of the store."""
        try:
            dataset = self._load_dataset(None)
            if dataset.class_names != self.store.manifest.class_names:
                raise CannotRecompute(
                    f"the dataset {dataset.name} has other classes now than {self.store.path} was made with"
                )
            return video_table(dataset.split(split_of(part)), dataset)
        except DatasetError as error:
            raise CannotRecompute(f"the videos of {part!r} cannot be listed: {error}") from error

    def constant(self, name: str) -> Constant:
        """The frozen weights of a block, or channel statistics of int8, taken once more from the same sample of videos."""
        kind, _, rest = name.partition("/")
        layer = rest.partition("/")[0]
        if kind == "blocks" and layer.isdecimal():
            made = projection_constants(self._backbone, [int(layer)])
        else:
            made = self._channel_statistics(name)
        if name not in made:
            raise CannotRecompute(f"nothing says how {name} is made. Restore its folder from a copy")
        return made[name]

    def _channel_statistics(self, name: str) -> dict[str, Constant]:
        declared = (spec for split in self.store.splits for spec in self.store.arrays(split).values())
        spec = next((spec for spec in declared if spec.dtype == "int8" and name in constant_names(spec.name)), None)
        if spec is None:
            return {}
        extractor = self._checked_extractor
        extractor.dataset = self._load_dataset(self.config.split)
        values = calibrate(extractor, [spec], Calibration(), max_error=math.inf).constants
        return {name: Constant(("channel",), array) for name, array in values.items()}

    def _load_dataset(self, splits: tuple[str, ...] | None) -> VideoDataset:
        config = self.config
        return load_dataset(config.dataset, root=config.root, splits=splits, val_fraction=config.val_fraction)

    @cached_property
    def _backbone(self) -> FrozenBackbone:
        config = self.config
        try:
            return load_backbone(
                config.model,
                config.pretrained,
                random_weights=config.random_weights,
                device=select_device(self.device),
            )
        except (BackboneError, OSError) as error:
            raise CannotRecompute(f"the backbone that the store was made with cannot be loaded: {error}") from error

    @cached_property
    def _extractor(self) -> ShardExtractor:
        manifest = self.store.manifest
        if not self.root.is_dir():
            raise CannotRecompute(f"the videos are not in {self.root} any more. Say where they are with --root FOLDER")
        return ShardExtractor(
            VideoDataset(manifest.dataset, self.root, manifest.class_names, ()),
            self.config.sampling,
            from_open_clip_config(self._backbone.preprocess_config, mode=self.config.preprocess),
            self._backbone,
            num_threads=self.workers,
            batch_size=self._batch_size,
        )

    @property
    def _checked_extractor(self) -> ShardExtractor:
        if self.same_key and self.differences:
            lines = [f"  {field}: stored {stored!r}, now {now!r}" for field, stored, now in self.differences]
            raise CannotRecompute(
                "features made here and now would be others than those in the store:\n" + "\n".join(lines) + "\n"
                "Run the command where these are as they were"
            )
        return self._extractor

    @property
    def _batch_size(self) -> int:
        return int(self.store.manifest.facts.get("batch_size", ExtractionConfig.batch_size))

    def _prepare(self, video: Video) -> PreparedClip | VideoError:
        try:
            return self._extractor.prepare(video)
        except VideoError as error:
            return error
        finally:
            self.on_video()

    def _batch_sizes(self, part: PartName, rows: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Row -> the first row of the batch that it was in, and how many clips that batch had."""
        failed, sizes = self._failed_rows(part), {}
        for row in rows:
            shard = self.store.shard_rows(part, row // self.store.manifest.rows_per_shard)
            first = row - (row - shard.start) % self._batch_size
            neighbours = set(range(first, min(first + self._batch_size, shard.stop))) - failed
            sizes[row] = first, max(1, len(neighbours))
        return sizes

    def _failed_rows(self, part: PartName) -> set[int]:
        try:
            return {failure.row for failure in self.store.view(part).failures()}
        except StoreError:  # a commit record is damaged; the sizes of full batches are then the best guess
            return set()


def config_of(manifest: Manifest) -> ExtractionConfig:
    """The extraction that made a store, as far as it decides on values."""
    request = manifest.facts["request"]
    words = ("frames", "stride", "tsn", "dtype", "model", "pretrained", "random_weights", "preprocess", "val_fraction")
    return ExtractionConfig(
        dataset=request["dataset"],
        root=Path(request["root"]) if request["root"] else None,
        split=tuple(request["split"].split(",")) if request["split"] else None,
        **{word: request[word] for word in words},
    )


def _forward(
    extractor: ShardExtractor,
    batch: list[tuple[int, Video, PreparedClip | VideoError]],
    size: int,
    arrays: tuple[ArraySpec, ...],
) -> Iterator[tuple[int, dict[str, Any] | RowFailure]]:
    """Rows that were in one batch of `size` clips."""
    clips = [clip for _, _, clip in batch if isinstance(clip, PreparedClip)]
    filled = clips + clips[-1:] * (size - len(clips))
    features = iter(extractor.forward(filled, arrays)) if clips else iter(())
    for row, video, clip in batch:
        if isinstance(clip, VideoError):
            yield row, RowFailure(row, video.video_id, video.path, clip.kind, clip.reason)
        else:
            yield row, next(features)
