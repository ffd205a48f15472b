"""What training does to the pixels of a clip: crop, flip and colours, drawn once, recorded, and applied from the record.

Nothing is drawn while images are made: `draw` decides everything from random streams and the size of the frames, and `apply`
makes the images from the record alone, so that a stored view can be made again bit for bit.

    frames -> short side to `resize_short` -> RandAugment -> crop -> the model's square -> flip -> jitter -> grey -> erasing
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vcache.extract.crops import Box, centre_crop, multi_scale_crop, random_resized_crop
from vcache.extract.operations import ROW, apply_operations
from vcache.extract.preprocess import as_images, resize, resized_to_short_side
from vcache.extract.randaugment import ColourJitter, RandAugment, draw_erasing, draw_grey

Streams = Callable[[str], random.Random]
"""A random stream for each decision, by its name: another operation in a recipe changes nothing that the others draw."""

_CROPS = ("rrc", "multiscale", "centre")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may be done to a clip. The recipes of the papers are in pipelines/presets.py."""

    resize_short: int | None = None
    """The short side before anything else; None leaves the size of the video."""
    interpolation: str | None = None
    """"bicubic" or "bilinear", antialiased; None is that of the evaluation view."""
    crop: str = "rrc"
    """"rrc": a rectangle of any size and shape in `scale` and `ratio`; "multiscale": sides from `scales` of the short side at
    fixed places; "centre": a square of the model's size, of the short side where nothing was resized."""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: float = 0.5
    """Probability that left and right are swapped."""
    randaugment: RandAugment | None = None
    jitter: ColourJitter | None = None
    grey: float = 0.0
    """Probability that the clip is without colour."""
    erasing: float = 0.0
    """Probability that a rectangle of the images is painted over."""

    def __post_init__(self) -> None:
        if self.crop not in _CROPS:
            raise ValueError(f"crop {self.crop!r} is not supported; choose from: {', '.join(_CROPS)}")
        if self.interpolation not in (None, "bicubic", "bilinear"):
            raise ValueError(f"interpolation {self.interpolation!r} is not supported; choose from: bicubic, bilinear")
        for name, value in {"flip": self.flip, "grey": self.grey, "erasing": self.erasing}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} ({value:g}) must be a probability, from 0 to 1")

    @property
    def num_operations(self) -> int:
        """Operations of `augment` in the record, those included that a draw left out."""
        return self._num_before_crop + 4 * (self.jitter is not None) + (self.grey > 0) + (self.erasing > 0)

    @property
    def _num_before_crop(self) -> int:
        return self.randaugment.num_ops if self.randaugment else 0

    def to_dict(self) -> dict[str, Any]:
        """Every field, in types that JSON has; `augmentation_from_dict` is the inverse."""
        return json.loads(json.dumps(asdict(self)))

    def draw(
        self, streams: Streams, *, num_frames: int, height: int, width: int, image_size: int
    ) -> dict[str, np.ndarray]:
        """Decide for one clip of frames of this size.

        `crop` (4,) float32 in pixels of the video, `flip` () uint8 and, where the recipe has any, `augment` (T, operation, 5)
        float32, the rows of operations.py: those of RandAugment, of jitter, grey and erasing.
        """
        resized_height, resized_width = self._resized(height, width)
        top, left, box_height, box_width = self._draw_box(streams("crop"), resized_height, resized_width, image_size)
        y, x = height / resized_height, width / resized_width
        record: dict[str, np.ndarray] = {
            "crop": np.array([top * y, left * x, box_height * y, box_width * x], dtype=np.float32),
            "flip": np.array(streams("flip").random() < self.flip, dtype=np.uint8),
        }
        operations = self._draw_operations(streams, num_frames, resized_height, resized_width, image_size)
        return {**record, "augment": np.concatenate(operations, axis=1)} if operations else record

    def _draw_operations(
        self, streams: Streams, num_frames: int, height: int, width: int, image_size: int
    ) -> list[np.ndarray]:
        drawn = []
        if self.randaugment:
            rng = streams("randaugment")
            drawn.append(self.randaugment.draw(rng, num_frames=num_frames, height=height, width=width))
        if self.jitter:
            drawn.append(self.jitter.draw(streams("jitter"), num_frames=num_frames))
        if self.grey:
            drawn.append(draw_grey(streams("grey"), self.grey, num_frames=num_frames))
        if self.erasing:
            rng = streams("erasing")
            drawn.append(draw_erasing(rng, self.erasing, num_frames=num_frames, image_size=image_size))
        return drawn

    def apply(
        self,
        frames: UInt8[np.ndarray, "T H W 3"],
        record: Mapping[str, np.ndarray],
        *,
        image_size: int,
        interpolation: str,
        mode: str,
    ) -> UInt8[Tensor, "T 3 S S"]:
        """The images that the record describes; `interpolation` is of the evaluation view, `mode` as in preprocess.py.

        Frames between those of the clip, as many for each of them, get the operations of the one before them.
        """
        interpolation = self.interpolation or interpolation
        height, width = frames.shape[1:3]
        resized = self._resized(height, width)
        images = as_images(frames)
        if resized != (height, width):
            images = resize(images, *resized, interpolation=interpolation, mode=mode)
        operations = self._operations_of(record, len(frames))
        if self.randaugment:
            images = apply_operations(images, operations[:, : self._num_before_crop], self.randaugment.fill)
        top, left, box_height, box_width = _box_of(record, height, width, resized)
        images = images[:, :, top : top + box_height, left : left + box_width]
        images = resize(images, image_size, image_size, interpolation=interpolation, mode=mode)
        if record["flip"]:
            images = images.flip(-1)
        return apply_operations(images, operations[:, self._num_before_crop :])

    def _operations_of(self, record: Mapping[str, np.ndarray], num_frames: int) -> np.ndarray:
        if not self.num_operations:
            return np.zeros((num_frames, 0, ROW), dtype=np.float32)
        operations = record["augment"]
        return operations.repeat(num_frames // len(operations), axis=0)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return resized_to_short_side(height, width, self.resize_short) if self.resize_short else (height, width)

    def _draw_box(self, rng: random.Random, height: int, width: int, image_size: int) -> Box:
        if self.crop == "rrc":
            return random_resized_crop(rng, height, width, scale=self.scale, ratio=self.ratio)
        if self.crop == "multiscale":
            return multi_scale_crop(rng, height, width, scales=self.scales, image_size=image_size)
        return centre_crop(height, width, image_size if self.resize_short else min(height, width))


def augmentation_from_dict(values: Mapping[str, Any]) -> Augmentation:
    """The inverse of `Augmentation.to_dict`.

    Raises:
        ValueError: a field is unknown, as in a store of a later version.
    """
    try:
        fields = _tuples(values)
        if fields.get("randaugment"):
            fields["randaugment"] = RandAugment(**_tuples(fields["randaugment"]))
        if fields.get("jitter"):
            fields["jitter"] = ColourJitter(**fields["jitter"])
        return Augmentation(**fields)
    except TypeError as error:
        raise ValueError(f"an augmentation that this version does not know: {dict(values)}") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _box_of(record: Mapping[str, np.ndarray], height: int, width: int, resized: tuple[int, int]) -> Box:
    """The recorded crop in whole pixels of the resized frames; float32 holds it to far less than half a pixel."""
    y, x = resized[0] / height, resized[1] / width
    top, left, box_height, box_width = record["crop"].tolist()
    return round(top * y), round(left * x), round(box_height * y), round(box_width * x)
