"""Views: how every video of a store is turned into one clip of images. View 0 is the evaluation view.

decoded = decode_video(DecodeRequest(path=path, clips=tuple(view.clip_rule(sampling, video_id) for view in views)))
clip = views[0].prepare(decoded, 0, preprocessing, video_id)
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vcache.extract.augment import Augmentation, augmentation_from_dict
from vcache.extract.operations import ROW
from vcache.extract.preprocess import Preprocessing
from vcache.extract.sampling import ClipRule, FrameRule, PixelRule, Sampling
from vcache.extract.video import DecodedVideo

EVALUATION_SPLITS = ("val", "validation", "test")

RecordSpec = tuple[tuple[str, ...], tuple[int, ...], str]
"""Names of the axes, shape and dtype of one array of a record, the same for all videos of a view."""


@dataclass(frozen=True)
class PreparedClip:
    """One view of one video, ready for the backbone but for normalisation (`Preprocessing.normalise`)."""

    images: UInt8[Tensor, "T 3 S S"]
    record: Mapping[str, np.ndarray]
    """What was done to make the view, under the names of the store's arrays: `frame_index` (T,) int32, `crop` (4,) float32,
    which is top, left, height, width in pixels of the video, and `flip` () uint8. Where the view has pixels, also `pixels`
    (K, S, S, 3) uint8, of which every K/T-th is an image of the clip, and `pixel_index` (K,) int32."""


@dataclass(frozen=True, kw_only=True)
class View(ABC):
    """The definition of one view of a store."""

    pixels_per_frame: int = field(default=0, compare=False)
    """Frames whose pixels are kept for each frame of the clip (DiST's alpha), 0 for none. No part of the definition: pixels are
    one more array of the view."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The definition, in types that JSON has; `view_from_dict` is the inverse."""

    @abstractmethod
    def covers(self, split: str) -> bool:
        """Whether the videos of this split get the view."""

    @abstractmethod
    def replay(
        self,
        frames: UInt8[np.ndarray, "F H W 3"],
        record: Mapping[str, np.ndarray],
        preprocessing: Preprocessing,
    ) -> UInt8[Tensor, "F 3 S S"]:
        """The images of the clip's frames, or of its pixel frames, as the record says and with nothing drawn.

        They may be in channels-last order, as frames are.
        """

    @abstractmethod
    def _frames_of_clip(self, sampling: Sampling, video_id: str) -> ClipRule: ...

    @abstractmethod
    def _draw(
        self, num_frames: int, height: int, width: int, preprocessing: Preprocessing, video_id: str
    ) -> dict[str, np.ndarray]: ...

    def clip_rule(self, sampling: Sampling, video_id: str) -> FrameRule:
        """Which frames of this video the view takes, those between for the pixels too."""
        clip = self._frames_of_clip(sampling, video_id)
        return PixelRule(clip=clip, pixels_per_frame=self.pixels_per_frame) if self.pixels_per_frame else clip

    def prepare(self, video: DecodedVideo, number: int, preprocessing: Preprocessing, video_id: str) -> PreparedClip:
        """The images of clip `number` of the decoded video, which was asked for with this view's rule."""
        step = self.pixels_per_frame or 1
        frames, indices = video.clip(number), video.clips[number]
        height, width = frames.shape[1:3]
        record = {"frame_index": np.array(indices[::step], dtype=np.int32)}
        record |= self._draw(len(indices) // step, height, width, preprocessing, video_id)
        images = self.replay(frames, record, preprocessing)
        if self.pixels_per_frame:
            record["pixels"] = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
            record["pixel_index"] = np.array(indices, dtype=np.int32)
        return PreparedClip(images[::step].contiguous(), record)

    def record_specs(self, num_frames: int) -> dict[str, RecordSpec]:
        """The arrays of the record of a clip, without the pixels."""
        return {
            "frame_index": (("frame",), (num_frames,), "int32"),
            "crop": (("box",), (4,), "float32"),
            "flip": ((), (), "uint8"),
        }

    def pixel_specs(self, num_frames: int, image_size: int) -> dict[str, RecordSpec]:
        """The arrays that the pixels add to it; none without pixels."""
        if not self.pixels_per_frame:
            return {}
        num_pixels = num_frames * self.pixels_per_frame
        shape = (num_pixels, image_size, image_size, 3)
        return {
            "pixels": (("pixel_frame", "height", "width", "colour"), shape, "uint8"),
            "pixel_index": (("pixel_frame",), (num_pixels,), "int32"),
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationView(View):
    """One crop of one of the evaluation clips, each as (which, of how many).

    Crops lie along the long side of the resized frame: one is the centre, three are left, centre and right, or top, centre
    and bottom. The outer ones touch the border, as in SlowFast; the middle one is the single one, to the pixel (SlowFast rounds
    half a pixel up, mmaction2 down and takes it from the right one too).
    """

    temporal: tuple[int, int] = (0, 1)
    spatial: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for name, (which, of) in {"temporal": self.temporal, "spatial": self.spatial}.items():
            if not 0 <= which < of:
                raise ValueError(f"{name} view ({which}) must be at least 0 and below their number ({of})")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "evaluation", "temporal": list(self.temporal), "spatial": list(self.spatial)}

    def covers(self, split: str) -> bool:
        """The centre of the one clip is of all videos; more of them are for evaluation only."""
        return self == EvaluationView() or split in EVALUATION_SPLITS

    def replay(
        self,
        frames: UInt8[np.ndarray, "F H W 3"],
        record: Mapping[str, np.ndarray],
        preprocessing: Preprocessing,
    ) -> UInt8[Tensor, "F 3 S S"]:
        return preprocessing.cropped(frames, self._position)

    def _frames_of_clip(self, sampling: Sampling, video_id: str) -> ClipRule:
        which, of = self.temporal
        return ClipRule(sampling=sampling, view=which, num_views=of)

    def _draw(
        self, num_frames: int, height: int, width: int, preprocessing: Preprocessing, video_id: str
    ) -> dict[str, np.ndarray]:
        crop = preprocessing.crop_box(height, width, self._position)
        return {"crop": np.array(crop, dtype=np.float32), "flip": np.zeros((), dtype=np.uint8)}

    @property
    def _position(self) -> float:
        which, of = self.spatial
        return 0.5 if of == 1 else which / (of - 1)


@dataclass(frozen=True, kw_only=True)
class TrainingView(View):
    """A random clip with a random crop, flip and colours, drawn from (seed, video, view) and nothing else.

    Every decision has a stream of its own, seeded with the first 8 bytes of SHA-256 of "seed/video/view/decision" (the
    frames: of "seed/video/view"). So what one draws is independent of the recipe's other operations, of the number that the view
    has in a store, of the other videos, and of the machine.
    """

    seed: int
    view: int
    """Which of the training views, from 1."""
    augmentation: Augmentation

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "training",
            "seed": self.seed,
            "view": self.view,
            "augmentation": self.augmentation.to_dict(),
        }

    def covers(self, split: str) -> bool:
        return split not in EVALUATION_SPLITS

    def replay(
        self,
        frames: UInt8[np.ndarray, "F H W 3"],
        record: Mapping[str, np.ndarray],
        preprocessing: Preprocessing,
    ) -> UInt8[Tensor, "F 3 S S"]:
        return self.augmentation.apply(
            frames,
            record,
            image_size=preprocessing.image_size,
            interpolation=preprocessing.interpolation,
            mode=preprocessing.mode,
        )

    def record_specs(self, num_frames: int) -> dict[str, RecordSpec]:
        """The arrays of the record of a clip, without the pixels: `augment` is there where the recipe has operations."""
        specs, num_operations = super().record_specs(num_frames), self.augmentation.num_operations
        if num_operations:
            specs["augment"] = (("frame", "operation", "value"), (num_frames, num_operations, ROW), "float32")
        return specs

    def _frames_of_clip(self, sampling: Sampling, video_id: str) -> ClipRule:
        return ClipRule(sampling=sampling, seed=_seed(f"{self.seed}/{video_id}/{self.view}"))

    def _draw(
        self, num_frames: int, height: int, width: int, preprocessing: Preprocessing, video_id: str
    ) -> dict[str, np.ndarray]:
        def stream(decision: str) -> random.Random:
            return random.Random(_seed(f"{self.seed}/{video_id}/{self.view}/{decision}"))

        return self.augmentation.draw(
            stream, num_frames=num_frames, height=height, width=width, image_size=preprocessing.image_size
        )


def view_from_dict(values: Mapping[str, Any]) -> View:
    """The inverse of `View.to_dict`.

    Raises:
        ValueError: the kind of view, or a part of its augmentation, is unknown to this version.
    """
    match values:
        case {"kind": "evaluation", "temporal": [t, of_t], "spatial": [s, of_s]}:
            return EvaluationView(temporal=(t, of_t), spatial=(s, of_s))
        case {"kind": "training", "seed": seed, "view": view, "augmentation": augmentation}:
            return TrainingView(seed=seed, view=view, augmentation=augmentation_from_dict(augmentation))
    raise ValueError(f"a view that this version does not know: {dict(values)}")


def views_of_request(
    num_training_views: int = 1,
    eval_grid: tuple[int, int] | None = None,
    augmentation: Augmentation | None = None,
    seed: int = 0,
) -> list[View]:
    """View 0, then `num_training_views` - 1 random ones, then the evaluation grid of (temporal, spatial) views, clip by clip.

    Raises:
        ValueError: a number is below 1.
    """
    temporal, spatial = eval_grid or (1, 1)
    for name, value in {"training views": num_training_views, "clips": temporal, "crops": spatial}.items():
        if value < 1:
            raise ValueError(f"number of {name} ({value}) must be at least 1")
    training = [
        TrainingView(seed=seed, view=view, augmentation=augmentation or Augmentation())
        for view in range(1, num_training_views)
    ]
    grid = [
        EvaluationView(temporal=(t, temporal), spatial=(s, spatial)) for t in range(temporal) for s in range(spatial)
    ]
    return list(dict.fromkeys([EvaluationView(), *training, *grid]))


def assign_view_numbers(
    recorded: Sequence[Mapping[str, Any]], wanted: Sequence[View]
) -> tuple[dict[int, View], list[dict[str, Any]]]:
    """Numbers for the wanted views in a store whose view v is `recorded[v]`, and that list with the new ones at its end.

    A view that is recorded keeps its number; a store that records none has view 0, the evaluation view.

    Raises:
        ValueError: a recorded view is unknown to this version.
    """
    views = [view_from_dict(values) for values in recorded] or [EvaluationView()]
    definitions = [dict(values) for values in recorded] or [EvaluationView().to_dict()]
    numbers: dict[int, View] = {}
    for view in wanted:
        if view not in views:
            views.append(view)
            definitions.append(view.to_dict())
        numbers[views.index(view)] = view
    return numbers, definitions


def _seed(words: str) -> int:
    """64 bits; never Python's hash(), which differs from process to process."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")
