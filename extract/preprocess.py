"""uint8 frames -> the images an open_clip model was trained on.

Two modes with the same crop. "exact" does what open_clip's evaluation transform does, frame by frame on PIL images: equal
to it bit for bit. "fast" resizes the whole clip at once with torchvision's antialiased uint8 kernel, at a quarter of the
time: within 2/255 of "exact" before normalisation, 0.002/255 on average. Other resizers (float interpolation, OpenCV,
the decoder's own) are off by 6/255 to 46/255 and are not offered.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

_INTERPOLATIONS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
_RESIZE_MODES = ("shortest", "squash")
_MODES = ("fast", "exact")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize to a square of `image_size` and normalise; `from_open_clip_config` fills it in for a model."""

    image_size: int
    mean: tuple[float, ...]
    """Per channel, for values of 0 to 1."""
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    """"bicubic" or "bilinear", always antialiased."""
    resize_mode: str = "shortest"
    """"shortest": the short side becomes `image_size`, the centre is cut out; "squash": both sides do, nothing is cut."""
    mode: str = "fast"
    """"fast" or "exact", see the head of this file."""

    def __post_init__(self) -> None:
        _check_choice("interpolation", self.interpolation, tuple(_INTERPOLATIONS))
        _check_choice("resize_mode", self.resize_mode, _RESIZE_MODES)
        _check_choice("mode", self.mode, _MODES)
        if self.image_size < 1:
            raise ValueError(f"image_size ({self.image_size}) must be at least 1")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean {self.mean} and std {self.std} must have one value for each of red, green and blue")

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float[Tensor, "T 3 S S"]:
        """The normalised images of one clip, float32."""
        return self.normalise(self.pixels(frames))

    def normalise(self, pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
        """float32 images of what `pixels` gave, on its device."""
        images = pixels.to(torch.float32).div_(255)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return images.sub_(mean).div_(std)

    def pixels(self, frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[Tensor, "T 3 S S"]:
        """The resized and cropped frames before normalisation."""
        return self.cropped(frames).contiguous()

    def cropped(self, frames: UInt8[np.ndarray, "T H W 3"], position: float = 0.5) -> UInt8[Tensor, "T 3 S S"]:
        """The same in the channels-last order of the frames, and not only from the centre.

        `position` is the place of the square along the long side: 0 left or top, 0.5 the centre, 1 right or bottom.
        """
        height, width = self._resized(*frames.shape[1:3])
        top, left = self._crop_offset(height, position), self._crop_offset(width, position)
        images = resize(as_images(frames), height, width, interpolation=self.interpolation, mode=self.mode)
        return images[:, :, top : top + self.image_size, left : left + self.image_size]

    def crop_box(self, height: int, width: int, position: float = 0.5) -> tuple[float, float, float, float]:
        """What part of a frame of this size the images show: top, left, height, width in its pixels."""
        resized_height, resized_width = self._resized(height, width)
        y, x = height / resized_height, width / resized_width
        top, left = self._crop_offset(resized_height, position) * y, self._crop_offset(resized_width, position) * x
        return top, left, self.image_size * y, self.image_size * x

    def to_dict(self) -> dict[str, Any]:
        """Every field, in types that JSON has."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def versions(self) -> dict[str, str]:
        """The library that does the resizing: another version may give other pixels."""
        library = "pillow" if self.mode == "exact" else "torchvision"
        return {library: version(library)}

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size before the crop."""
        size = self.image_size
        if self.resize_mode == "squash":
            return size, size
        return resized_to_short_side(height, width, size)

    def _crop_offset(self, length: int, position: float) -> int:
        return round((length - self.image_size) * position)  # 0 along the short side, wherever the square lies


def as_images(frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[Tensor, "T 3 H W"]:
    """The frames as torch has them: a view in channels-last order, of the same memory where it may be written to."""
    return torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2)


def resized_to_short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """The size of a frame whose short side becomes `size`."""
    # torchvision cuts the long side down to an integer, and so do we, or the crop would lie half a pixel off.
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize(
    images: UInt8[Tensor, "T 3 H W"], height: int, width: int, *, interpolation: str, mode: str
) -> UInt8[Tensor, "T 3 h w"]:
    """A whole clip resized with antialiasing, in one of the two modes at the head of this file."""
    if mode == "exact":
        resample = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
        frames = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        resized = [Image.fromarray(frame).resize((width, height), resample) for frame in frames]
        return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
    # The kernel is twice as slow on contiguous (T, 3, H, W).
    images = images.contiguous(memory_format=torch.channels_last)
    return F.resize(images, [height, width], interpolation=_INTERPOLATIONS[interpolation], antialias=True)


def from_open_clip_config(preprocess_cfg: Mapping[str, Any], mode: str = "fast") -> Preprocessing:
    """The evaluation transform of an open_clip model (`visual.preprocess_cfg`), without open_clip.

    Raises:
        ValueError: the config asks for what is not implemented here: images that are not square, a padded border.
    """
    size = preprocess_cfg["size"]
    sizes = {size} if isinstance(size, int) else set(size)
    if len(sizes) != 1:
        raise ValueError(f"the model wants images of {tuple(size)} pixels; only square ones are supported")
    # open_clip's "random" is for training and means bicubic at evaluation.
    interpolation = preprocess_cfg.get("interpolation") or "bicubic"
    return Preprocessing(
        image_size=sizes.pop(),
        mean=_per_channel(preprocess_cfg["mean"]),
        std=_per_channel(preprocess_cfg["std"]),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        resize_mode=preprocess_cfg.get("resize_mode") or "shortest",
        mode=mode,
    )


def _per_channel(values: float | tuple[float, ...] | list[float]) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(float(value) for value in values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not supported; choose from: {', '.join(choices)}")
