"""A request with all that its words stand for: videos, backbone, preprocessing, and from them the key and the arrays."""

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from vcache.extract.backbone import BackboneFacts, FrozenBackbone, check_backbone, load_backbone
from vcache.extract.datasets.base import VideoDataset
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.decode import decoder_versions
from vcache.extract.layers import LayerSelection, select_layers
from vcache.extract.preprocess import Preprocessing, from_open_clip_config
from vcache.extract.spec import ExtractionSpec
from vcache.extract.views import EvaluationView, View, assign_view_numbers, views_of_request
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.decoding import Decode, decode_here
from vcache.pipelines.derivation import STEM_ARRAY, input_array, projection_constants
from vcache.pipelines.device import select_device
from vcache.pipelines.presets import recipe
from vcache.pipelines.request import ExtractionConfig, ExtractionError
from vcache.pipelines.stores import anything_at, default_store_path
from vcache.store.constants import Constant
from vcache.store.key import cache_key
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, read_manifest
from vcache.store.object_path import StorePath
from vcache.store.parts import check_split_name
from vcache.store.quantise import quantised_specs
from vcache.store.reader import FeatureStore

# A shard is what a killed run loses. Larger files than 128 MB are no faster to write or read, and where rows are small the
# bound on the rows is what keeps the loss small.
SHARD_BYTES = 128 * 2**20
MAX_ROWS_PER_SHARD = 64
# Frames in a batch: a GPU is busy with this many of ViT-B; on a CPU a batch that stays in the caches is no slower than a larger
# one, and a shard's last batch wastes less.
_FRAMES_ON_GPU, _CLIPS_ON_CPU = 256, 4


@dataclass(frozen=True, kw_only=True)
class ExtractionSetup:
    """A command with all that its words stand for, loaded and checked; nothing is written yet."""

    config: ExtractionConfig
    dataset: VideoDataset
    backbone: FrozenBackbone
    preprocessing: Preprocessing
    layers: tuple[int, ...]
    """Absolute."""
    stem: bool = False
    """Whether what enters block 0 is kept, too."""
    wanted_views: tuple[View, ...] = (EvaluationView(),)
    view_definitions: tuple[dict[str, Any], ...] = ()
    """Of each view of the store, `View.to_dict()`, by its number: those it records and then the new ones; see `in_store`."""
    shard_rows: int | None = None
    """Rows of a shard, where another store of the same command decides."""

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Those of view 0."""
        return array_specs(self.backbone.facts, self.layers, self.config, stem=self.stem)

    @cached_property
    def views(self) -> dict[int, View]:
        """The views that are wanted, by their number in the store."""
        return assign_view_numbers(self.view_definitions, self.wanted_views)[0]

    def in_store(self, store: FeatureStore | None) -> "ExtractionSetup":
        """The same with the numbers that the views have in this store, or get in it; None is one that is to be made.

        Raises:
            ExtractionError: the store keeps another number of pixel frames.
        """
        if store is not None and self.config.pixels:
            _check_pixels(store, self.config.pixels)
        recorded = store.manifest.facts.get("views", []) if store is not None else []
        _, definitions = assign_view_numbers(recorded, self.wanted_views)
        return replace(self, view_definitions=tuple(definitions))

    def view_facts(self) -> dict[str, Any]:
        """What the manifest says of the views: nothing where there is only view 0."""
        return {"views": list(self.view_definitions)} if len(self.view_definitions) > 1 else {}

    def view_arrays(self, split: str) -> dict[int, tuple[ArraySpec, ...]]:
        """The arrays of each view that the videos of this split get, by the number of the view."""
        return {
            number: array_specs(self.backbone.facts, self.layers, self.config, view, stem=self.stem)
            for number, view in self.views.items()
            if view.covers(split)
        }

    @cached_property
    def constants(self) -> dict[str, Constant]:
        """What the arrays of all videos are read with."""
        derives = self.config.cross_frame == "derive"
        return projection_constants(self.backbone.query_key_weights, self.layers) if derives else {}

    @property
    def decoder(self) -> str:
        """The decoder of every video."""
        return "images" if self.dataset.frame_folders else self.config.decoder

    @cached_property
    def spec(self) -> ExtractionSpec:
        return extraction_spec(self.config, self.backbone, self.preprocessing, self.decoder)

    @cached_property
    def key(self) -> str:
        return cache_key(self.spec.to_dict())

    @cached_property
    def path(self) -> StorePath:
        """The store that the command writes or extends."""
        config = self.config
        return config.store or default_store_path(self.dataset.name, config.model, config.frames, self.key)

    @property
    def batch_size(self) -> int:
        """Of a store that is made by this command."""
        by_device = _CLIPS_ON_CPU
        if self.backbone.device.type == "cuda":
            by_device = max(1, _FRAMES_ON_GPU // self.config.frames)
        return self.config.batch_size or by_device

    @property
    def rows_per_shard(self) -> int:
        """Of a store that is made by this command; one that is there has its own."""
        if self.shard_rows is not None:
            return self.shard_rows
        arrays = [spec for split in self.dataset.splits for specs in self.view_arrays(split).values() for spec in specs]
        return rows_of_a_shard(arrays, self.batch_size)

    def batch_size_in(self, store: FeatureStore) -> int:
        """Clips of a batch in a store that is there: those that its rows were computed in, so that the last bits agree.

        Raises:
            ExtractionError: another number is asked for.
        """
        stored: int = store.manifest.facts.get("batch_size", self.batch_size)
        if self.config.batch_size not in (None, stored):
            raise ExtractionError(
                f"--batch-size {self.config.batch_size}: {store.path} was made with batches of {stored} clips, and the last "
                "bits of its features may depend on it. Leave the option out."
            )
        return stored

    def extractor(self, *, batch_size: int | None = None, decode: Decode = decode_here) -> ClipExtractor:
        return ClipExtractor(
            self.dataset,
            self.config.sampling,
            self.preprocessing,
            self.backbone,
            num_threads=self.config.decode_workers,
            batch_size=batch_size or self.batch_size,
            decode=decode,
            decoder=self.decoder,
        )


def rows_of_a_shard(arrays: Iterable[ArraySpec], batch_size: int) -> int:
    """How many videos a shard of a new store holds, so that its largest file is near SHARD_BYTES."""
    rows = SHARD_BYTES // max(spec.row_bytes for spec in arrays)
    # Whole batches, as the last one of a shard is filled up.
    return max(1, min(MAX_ROWS_PER_SHARD, rows // batch_size * batch_size or rows))


def prepare_extraction(config: ExtractionConfig) -> ExtractionSetup:
    """Find the videos and load the backbone.

    Raises:
        UnsupportedBackbone: the model's image tower cannot be tapped; said before the videos are listed.
        DatasetError, LayerError, RandomWeightsRefused: the request itself cannot be met.
        ExtractionError: none of the videos is there.
    """
    _check_model(config)
    return load_setup(config, _dataset(config))


def prepare_extractions(
    configs: Sequence[ExtractionConfig], on_stage: Callable[[str], None] = lambda name: None
) -> tuple[ExtractionSetup, ...]:
    """`prepare_extraction` of several requests over the same videos, whose shards then hold the same videos."""
    for config in configs:
        _check_model(config)
    on_stage("listing the videos")
    dataset, setups = _dataset(configs[0]), []
    for config in configs:
        on_stage(f"loading {config.model}")
        setups.append(load_setup(config, dataset))
    if len(setups) == 1:  # whose shards are its own affair, and its store need not be looked at yet
        return tuple(setups)
    return with_common_shards(
        setups, [read_manifest(setup.path).rows_per_shard for setup in setups if anything_at(setup.path)]
    )


def with_common_shards(setups: Sequence[ExtractionSetup], stored: Sequence[int]) -> tuple[ExtractionSetup, ...]:
    """The setups of one command with shards of the same videos; `stored` is rows per shard of those stores that are there."""
    if len(setups) == 1:
        return tuple(setups)
    _check_one_store_each(setups)
    own = [replace(setup, shard_rows=None) for setup in setups]
    shard_rows = stored[0] if stored else min(setup.rows_per_shard for setup in own)
    return tuple(replace(setup, shard_rows=shard_rows) for setup in own)


def _check_one_store_each(setups: Sequence[ExtractionSetup]) -> None:
    """A command that writes one store twice would wait for itself to let go of it."""
    for number, setup in enumerate(setups):
        if any(setup.path == other.path for other in setups[:number]):
            raise ExtractionError(f"--model {setup.config.model} is named twice. Name each model once.")


def _check_model(config: ExtractionConfig) -> None:
    """Refuse a backbone by its name, which takes a moment, before videos are listed and weights looked for."""
    pretrained = None if config.random_weights else config.pretrained
    check_backbone(config.model, pretrained, derive=config.cross_frame == "derive")


def _dataset(config: ExtractionConfig) -> VideoDataset:
    dataset = load_dataset(config.dataset, root=config.root, splits=config.split, val_fraction=config.val_fraction)
    _check_dataset(dataset)
    return dataset


def load_setup(config: ExtractionConfig, dataset: VideoDataset) -> ExtractionSetup:
    """Load the backbone, for videos that are listed already.

    Raises:
        LayerError, RandomWeightsRefused, ExtractionError: the request itself cannot be met.
    """
    device = select_device(config.device)
    backbone = load_backbone(
        config.model,
        config.pretrained,
        random_weights=config.random_weights,
        device=device,
        precision=_precision(config, device),
    )
    preprocessing = from_open_clip_config(backbone.preprocess_config, mode=config.preprocess)
    _check_crops(config, preprocessing)
    selection = select_layers(config.layers, backbone.facts.num_layers)
    _check_cross_frame(config, selection)
    return ExtractionSetup(
        config=config,
        dataset=dataset,
        backbone=backbone,
        preprocessing=preprocessing,
        layers=selection.layers,
        stem=selection.stem,
        wanted_views=wanted_views(config, dataset.name),
    )


def wanted_views(config: ExtractionConfig, dataset: str) -> tuple[View, ...]:
    """The views that the command asks for, view 0 first."""
    augmentation = recipe(config.augment, dataset)
    views = views_of_request(config.views, config.eval_grid, augmentation, config.view_seed)
    return tuple(replace(view, pixels_per_frame=config.pixels // config.frames) for view in views)


def _check_cross_frame(config: ExtractionConfig, selection: LayerSelection) -> None:
    """What was asked for by itself and cannot be: "qk" is the default, and of the stem alone it is nothing."""
    if not selection.layers and config.cross_frame in ("maps", "derive"):
        raise ExtractionError(
            f"--cross-frame {config.cross_frame}: attention between frames is of layers, and --layers {config.layers} keeps "
            "none. Leave --cross-frame out, or name the layers."
        )


def _check_crops(config: ExtractionConfig, preprocessing: Preprocessing) -> None:
    if config.eval_grid[1] > 1 and preprocessing.resize_mode == "squash":
        raise ExtractionError(
            f"--eval-views {config.eval_views}: {config.model} is shown whole frames made square, of which there is one crop. "
            f"Say --eval-views {config.eval_grid[0]}x1."
        )


def extraction_spec(
    config: ExtractionConfig, backbone: FrozenBackbone, preprocessing: Preprocessing, decoder: str
) -> ExtractionSpec:
    """Everything of this command that changes a stored value; `decoder` is what reads the videos."""
    return ExtractionSpec(
        model=backbone.facts.model,
        weights_sha256=backbone.weights_sha256,
        preprocessing=preprocessing.to_dict(),
        sampling=config.sampling.to_dict(),
        view={"crop": "centre", "flip": False},
        decoder=decoder_versions(decoder),
        versions={**preprocessing.versions(), **versions_of("torch", "open_clip_torch", *backbone.tower.libraries)},
        dtype=config.dtype,
        precision=str(backbone.dtype).removeprefix("torch."),
    )


def _precision(config: ExtractionConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    if config.store is not None and anything_at(config.store):
        return stored_precision(read_manifest(config.store))
    if device.type == "cpu":
        return "float32"
    return "float16" if config.dtype == "int8" else config.dtype


def stored_precision(manifest: Manifest) -> str:
    """Of the arithmetic that made a store; one that does not say was made in float32."""
    return str(manifest.spec.get("precision", "float32"))


def array_specs(
    facts: BackboneFacts,
    layers: Iterable[int],
    config: ExtractionConfig,
    view: View | None = None,
    *,
    stem: bool = False,
) -> tuple[ArraySpec, ...]:
    """The arrays of one view (view 0 if none is named), row by row of videos; ARCHITECTURE "What is stored" has the layout."""
    T, N, D = config.frames, facts.num_tokens, facts.width
    dtype = "float16" if config.dtype == "int8" else config.dtype
    specs = [
        *_record_specs(view or EvaluationView(), T, facts.image_size),
        ArraySpec(
            name="embed",
            dims=("frame", "channel"),
            shape=(T, facts.embed_dim),
            chunk=(T, facts.embed_dim),
            dtype=dtype,
        ),
    ]
    stem_spec = ArraySpec(
        name=STEM_ARRAY, dims=("frame", "token", "channel"), shape=(T, N, D), chunk=(1, N, D), dtype=dtype
    )
    specs += [stem_spec] if stem else []
    specs += [spec for layer in layers for spec in _layer_specs(layer, stem_spec, facts, config.cross_frame)]
    if config.dtype == "int8":
        specs = [stored for spec in specs for stored in quantised_specs(spec)]
    return tuple({spec.name: spec for spec in specs}.values())  # what enters a block may be another one's tokens


def _layer_specs(layer: int, stem_spec: ArraySpec, facts: BackboneFacts, cross_frame: str) -> Iterator[ArraySpec]:
    """Tokens of a layer are laid out as those of the stem."""
    T, N, D = stem_spec.shape
    H, d, P = facts.num_heads, facts.head_dim, N - 1
    yield replace(stem_spec, name=f"tokens/{layer}")
    yield replace(stem_spec, name=f"cls/{layer}", dims=("frame", "channel"), shape=(T, D), chunk=(T, D))
    if cross_frame == "qk":
        for name in (f"q/{layer}", f"k/{layer}"):
            dims = ("frame", "head", "token", "dim")
            yield replace(stem_spec, name=name, dims=dims, shape=(T, H, N, d), chunk=(1, H, N, d))
    if cross_frame == "maps":
        dims = ("pair", "side", "query", "key")
        yield replace(stem_spec, name=f"maps/{layer}", dims=dims, shape=(T - 1, 2, P, P), chunk=(1, 2, P, P))
    if cross_frame == "derive":
        yield replace(stem_spec, name=input_array(layer))


def _record_specs(view: View, num_frames: int, image_size: int) -> Iterator[ArraySpec]:
    """What says how a clip was made, read whole; and its pixels, frame by frame."""
    for name, (dims, shape, dtype) in view.record_specs(num_frames).items():
        yield ArraySpec(name=name, dims=dims, shape=shape, chunk=shape, dtype=dtype)
    for name, (dims, shape, dtype) in view.pixel_specs(num_frames, image_size).items():
        chunk = (1, *shape[1:]) if name == "pixels" else shape
        yield ArraySpec(name=name, dims=dims, shape=shape, chunk=chunk, dtype=dtype)


def _check_pixels(store: FeatureStore, num_pixel_frames: int) -> None:
    for split in store.splits:
        for view in store.views(split):
            there = store.arrays(split, view).get("pixels")
            if there is not None and there.shape[0] != num_pixel_frames:
                raise ExtractionError(
                    f"--pixels {num_pixel_frames}: {store.path} keeps {there.shape[0]} pixel frames of each clip. "
                    f"Say --pixels {there.shape[0]}, or name another store with --store."
                )


def _check_dataset(dataset: VideoDataset) -> None:
    """Refuse what a store cannot hold, and a wrong root: every video would be recorded as failed, for good."""
    for split in dataset.splits:
        try:
            check_split_name(split)
        except ValueError as error:
            raise ExtractionError(f"{dataset.name}: {error}. Rename the split in the dataset.") from error
    if not any((dataset.root / video.path).exists() for video in dataset.videos):
        raise ExtractionError(
            f"none of the {len(dataset.videos)} videos that {dataset.name} lists is in {dataset.root}; the first should be "
            f"{dataset.root / dataset.videos[0].path}. Say where they are with --root FOLDER; `vcache datasets` has the layouts."
        )


def versions_of(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}
