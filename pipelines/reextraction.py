"""Rows of a store made again, from the videos and the backbone that its manifest names."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vcache.extract.backbone import BackboneError, FrozenBackbone, load_backbone
from vcache.extract.datasets.base import DatasetError, Video, VideoDataset
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.preprocess import from_open_clip_config
from vcache.extract.video import VideoError
from vcache.extract.views import EvaluationView, PreparedClip, View, view_from_dict
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.calibration import Calibration, calibrate
from vcache.pipelines.decoding import Decoder, new_decoder
from vcache.pipelines.derivation import projection_constants
from vcache.pipelines.device import select_device
from vcache.pipelines.growth import video_table, videos_of
from vcache.pipelines.precision import channel_constants
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import extraction_spec, stored_precision
from vcache.pipelines.shards import slot_of
from vcache.pipelines.stages import PreparedVideo
from vcache.pipelines.text_sets import text_constant_again
from vcache.store.constants import Constant
from vcache.store.errors import CannotRecompute, StoreError
from vcache.store.key import spec_difference
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.origin import PartialRow, Recomputed
from vcache.store.parts import PartName, split_of
from vcache.store.quantise import constant_names, source_name
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure


class Reextraction:
    """What a store was made of (`store.origin.Origin`). The backbone is loaded when a row is first asked for.

    With `same_key`, features are refused unless the key comes out the same: weights, libraries and decoder are those of the
    first extraction. A damaged video is refused unless the store holds its row as partial, or with `allow_partial`. `on_video`
    is called after each video that is decoded, in another thread. A `backbone` that is loaded already, of the store's own
    model, saves loading it again. `listed` are videos as the dataset lists them now, which says where their files lie; of the
    others the store's own table does.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        root: Path | None = None,
        device: str = "auto",
        workers: int = 2,
        same_key: bool = True,
        allow_partial: bool = False,
        on_video: Callable[[], None] = lambda: None,
        backbone: FrozenBackbone | None = None,
        listed: Iterable[Video] = (),
    ) -> None:
        self.store, self.device, self.workers, self.same_key = store, device, workers, same_key
        self.allow_partial, self.on_video, self._loaded = allow_partial, on_video, backbone
        self._paths = {(video.split, video.video_id): video.path for video in listed}
        self.config = config_of(store.manifest)
        self.root = root or Path(store.manifest.facts["root"])
        self.decoder = str(store.manifest.spec["decoder"]["decoder"])

    @cached_property
    def differences(self) -> list[tuple[str, Any, Any]]:
        """(field, stored, now) of everything that changes a value and is not as it was when the store was made."""
        preprocessing = from_open_clip_config(self._backbone.preprocess_config, mode=self.config.preprocess)
        return spec_difference(
            self.store.manifest.spec,
            extraction_spec(self.config, self._backbone, preprocessing, self.decoder).to_dict(),
        )

    def recompute(self, part: PartName, view: int, rows: Sequence[int], arrays: tuple[ArraySpec, ...]) -> Recomputed:
        """Each of the rows with its arrays, or with why its video gives none: the bits that it had or would have had at first.

        A clip goes through the backbone in the slot of its row (shards.py), beside those of its batch that are asked for, too.
        """
        definition = self._view(part, view, arrays)
        extractor = self._checked_extractor
        int8 = {
            source_name(spec.name) for spec in arrays if spec.dtype == "int8" or spec.name != source_name(spec.name)
        }
        extractor.constants = channel_constants(self.store, int8, self._backbone.device)
        videos = videos_of(self.store.part_videos(part), split_of(part), rows)
        partial = frozenset(rows) if self.allow_partial else self._partial_rows(part, view)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            prepared = pool.map(lambda video, row: self._prepare(video, definition, row in partial), videos, rows)
            clips = zip(rows, videos, prepared, strict=True)
            for _, batch in itertools.groupby(clips, key=lambda clip: self._place(part, clip[0])[0]):
                yield from self._forward(part, list(batch), arrays)

    @property
    def extractor(self) -> ClipExtractor:
        """What makes clips of videos and features of clips; with `same_key`, refused as rows are."""
        return self._checked_extractor

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
        """The frozen weights of a block, text embeddings of the classes, or channel statistics of int8, taken once more from the
        same sample of videos."""
        kind, _, rest = name.partition("/")
        layer = rest.partition("/")[0]
        if kind == "blocks" and layer.isdecimal():
            made = projection_constants(self._backbone.query_key_weights, [int(layer)])
        elif kind == "text":
            made = text_constant_again(self.store.manifest, name, self.config, self.device)
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
        if self._loaded is not None:
            return self._loaded
        config = self.config
        try:
            return load_backbone(
                config.model,
                config.pretrained,
                random_weights=config.random_weights,
                device=select_device(self.device),
                precision=config.precision,
            )
        except (BackboneError, OSError) as error:
            raise CannotRecompute(f"the backbone that the store was made with cannot be loaded: {error}") from error

    @cached_property
    def _extractor(self) -> ClipExtractor:
        manifest = self.store.manifest
        if not self.root.is_dir():
            raise CannotRecompute(f"the videos are not in {self.root} any more. Say where they are with --root FOLDER")
        return ClipExtractor(
            VideoDataset(manifest.dataset, self.root, manifest.class_names, ()),
            self.config.sampling,
            from_open_clip_config(self._backbone.preprocess_config, mode=self.config.preprocess),
            self._backbone,
            num_threads=self.workers,
            batch_size=self._batch_size,
            decode=self._decoder.decode,
            decoder=self.decoder,
        )

    @property
    def _checked_extractor(self) -> ClipExtractor:
        if self.same_key and self.differences:
            lines = [f"  {field}: stored {stored!r}, now {now!r}" for field, stored, now in self.differences]
            raise CannotRecompute(
                "features made here and now would be others than those in the store:\n" + "\n".join(lines) + "\n"
                "Run the command where these are as they were"
            )
        return self._extractor

    @property
    def _batch_size(self) -> int:
        return int(self.store.manifest.facts.get("batch_size", 4))  # of stores that do not say

    def _view(self, part: PartName, number: int, arrays: tuple[ArraySpec, ...]) -> View:
        definitions = self.store.manifest.facts.get("views", [EvaluationView().to_dict()])
        if number >= len(definitions):
            raise CannotRecompute(
                f"view {number} of {part!r} was not made by `vcache extract`: its definition is missing"
            )
        try:
            view = view_from_dict(definitions[number])
        except ValueError as error:
            raise CannotRecompute(f"view {number} of {part!r} cannot be made: {error}") from error
        num_pixel_frames = max((spec.shape[0] for spec in arrays if spec.name in ("pixels", "pixel_index")), default=0)
        return replace(view, pixels_per_frame=num_pixel_frames // self.config.frames)

    def _partial_rows(self, part: PartName, view: int) -> frozenset[int]:
        try:
            return frozenset(row.row for row in self.store.view(part, view).partial())
        except StoreError:  # a commit record is damaged, and may have said so; such a video is then refused
            return frozenset()

    def _prepare(self, video: Video, view: View, allow_partial: bool) -> PreparedVideo | VideoError:
        extractor = self._extractor
        # A video that was missing may have come in another folder or format.
        video = replace(video, path=self._paths.get((video.split, video.video_id), video.path))
        try:
            rules = (view.clip_rule(extractor.sampling, video.video_id),)
            decoded = self._decoder.decode(replace(extractor.request(video, rules), allow_partial=allow_partial))
            clip = view.prepare(decoded, 0, extractor.preprocessing, video.video_id)
            return PreparedVideo((clip,), decoded.damage)
        except VideoError as error:
            return error
        finally:
            self.on_video()

    @cached_property
    def _decoder(self) -> Decoder:
        return new_decoder(self.workers, self.decoder)  # ends with this object

    def _place(self, part: PartName, row: int) -> tuple[int, int]:
        """The first row of the batch that a row belongs to, and its slot in it."""
        shard_rows = self.store.shard_rows(part, row // self.store.manifest.rows_per_shard)
        slot = slot_of(row, shard_rows, self._batch_size)
        return row - slot, slot

    def _forward(
        self,
        part: PartName,
        batch: list[tuple[int, Video, PreparedVideo | VideoError]],
        arrays: tuple[ArraySpec, ...],
    ) -> Recomputed:
        """Rows of one batch."""
        slots: list[PreparedClip | None] = [None] * self._batch_size
        for row, _, prepared in batch:
            slots[self._place(part, row)[1]] = prepared.clips[0] if isinstance(prepared, PreparedVideo) else None
        features = self._extractor.start(slots, arrays).rows() if any(slots) else []
        for row, video, prepared in batch:
            error = prepared if isinstance(prepared, VideoError) else prepared.damage
            trouble = RowFailure(row, video.video_id, video.path, error.kind, error.reason) if error else None
            computed = features[self._place(part, row)[1]] if isinstance(prepared, PreparedVideo) else None
            if computed is not None:
                yield row, PartialRow(computed, trouble) if trouble else computed
            else:
                assert trouble is not None
                yield row, trouble


def config_of(manifest: Manifest) -> ExtractionConfig:
    """The extraction that made a store, as far as it decides on values."""
    request = manifest.facts["request"]
    words = ("frames", "stride", "tsn", "dtype", "model", "pretrained", "random_weights", "preprocess", "val_fraction")
    return ExtractionConfig(
        dataset=request["dataset"],
        root=Path(request["root"]) if request["root"] else None,
        split=tuple(request["split"].split(",")) if request["split"] else None,
        precision=stored_precision(manifest),
        **{word: request[word] for word in words},
    )
