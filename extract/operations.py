"""What can be done to the colours and the geometry of uint8 frames, as numbered operations that a store records.

One operation is a row of five numbers: a code and its arguments, 0 where there is none. A clip's operations are an array
(frame, operation, 5): the same row for all frames is one call on the whole clip. Statistics, as of autocontrast, are each
frame's own. Pillow's operations are the model: equal to them but for autocontrast and geometry, which are within one level, and
hue, which Pillow has in 256 steps.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F

CODES = {
    name: code
    for code, name in enumerate(
        (
            "none",
            "autocontrast",
            "equalize",
            "invert",
            "rotate",  # degrees counter-clockwise, about the centre
            "posterize",  # bits that are kept, 0 to 8
            "solarize",  # values from this threshold on are inverted
            "solarize_add",  # what is added to values below 128
            "colour",  # the factor between grey (0), unchanged (1) and beyond; also of the next three
            "contrast",
            "brightness",
            "sharpness",
            "shear_x",  # columns per row
            "shear_y",
            "translate_x",  # pixels to the left
            "translate_y",
            "hue",  # turns, -0.5 to 0.5
            "grey",
            "fill",  # top, left, height, width in pixels
        )
    )
}
"""Stores hold these numbers: new names go to the end."""

ROW = 5
BOX_COLOUR = (123, 117, 104)
"""What "fill" paints: CLIP's mean colour, which is 0 after normalisation."""

# What is fast depends on the order in memory: frames come in channels-last order, and most operations keep it.
_Images = UInt8[Tensor, "T 3 H W"]
_NAMES = tuple(CODES)
_LUMA = (19595, 38470, 7471)  # of 65536: ITU-R 601 as Pillow rounds it


def row(name: str, *arguments: float | int) -> tuple[float, ...]:
    """One operation as it is recorded."""
    return (float(CODES[name]), *map(float, arguments), *[0.0] * (ROW - 1 - len(arguments)))


def apply_operations(
    images: UInt8[Tensor, "T 3 H W"],
    operations: Float32[np.ndarray, "T operation 5"],
    fill: tuple[int, int, int] = (128, 128, 128),
) -> UInt8[Tensor, "T 3 H W"]:
    """The operations one after the other; `fill` is what geometry leaves uncovered."""
    for rows in operations.swapaxes(0, 1):
        if (rows == rows[0]).all():
            images = _apply(images, rows[0].tolist(), fill)
        else:
            images = torch.cat([_apply(images[i : i + 1], rows[i].tolist(), fill) for i in range(len(rows))])
    return images


def _apply(images: UInt8[Tensor, "T 3 H W"], row: list[float], fill: tuple[int, int, int]) -> UInt8[Tensor, "T 3 H W"]:
    name, (a, b, c, d) = _NAMES[int(row[0])], row[1:]
    if name in _COLOURS:
        return _COLOURS[name](images, a)
    if name in _MATRICES:
        return _warp(images, _MATRICES[name](a, images.shape[-2] / 2, images.shape[-1] / 2), fill)
    if name == "fill":
        images = images.clone()
        images[:, :, int(a) : int(a + c), int(b) : int(b + d)] = torch.tensor(BOX_COLOUR, dtype=torch.uint8)[
            :, None, None
        ]
    return images


def _blend(images: _Images, other: Tensor | float, factor: float) -> _Images:
    """`other` at factor 0, the images at 1, and beyond; cut to whole numbers, as Pillow does."""
    other = other.to(torch.float32) if isinstance(other, Tensor) else other
    return (images.to(torch.float32).sub_(other).mul_(factor).add_(other)).clamp_(0, 255).to(torch.uint8)


def _luma(images: _Images) -> UInt8[Tensor, "T 1 H W"]:
    red, green, blue = (channel.to(torch.int32) for channel in images.contiguous().unbind(1))
    weighted = red.mul_(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return weighted.add_(1 << 15).bitwise_right_shift_(16).to(torch.uint8)[:, None]


def _contrast(images: _Images, factor: float) -> _Images:
    # Whole numbers: a mean in floats could depend on how many frames are summed at once.
    grey = _luma(images)
    sums, pixels = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64), grey[0].numel()
    return _blend(images, (2 * sums + pixels) // (2 * pixels), factor)


def _posterize(images: _Images, bits: float) -> _Images:
    return images & (~((1 << (8 - int(bits))) - 1) & 0xFF)


def _solarize(images: _Images, threshold: float) -> _Images:
    if threshold > 255:
        return images
    # All bits of a byte flipped are 255 less the byte; torch.where takes several times as long.
    return images ^ (images >= int(threshold)).to(torch.uint8).mul_(255)


def _solarize_add(images: _Images, added: float) -> _Images:
    # Below 128 and at most 127 more: there is no overflow.
    return images + (images < 128).to(torch.uint8).mul_(min(int(added), 127))


_COLOURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "autocontrast": lambda images, _: F.autocontrast(images.contiguous()),  # 9 times as fast as in channels-last order
    "equalize": lambda images, _: F.equalize(images),
    "invert": lambda images, _: 255 - images,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "colour": lambda images, factor: _blend(images, _luma(images), factor),
    "contrast": _contrast,
    "brightness": lambda images, factor: _blend(images, 0.0, factor),
    "sharpness": lambda images, factor: F.adjust_sharpness(images, factor),
    "hue": lambda images, turns: F.adjust_hue(images, turns),
    "grey": lambda images, _: _luma(images).expand(-1, 3, -1, -1),
}

_Matrix = tuple[float | int, ...]


def _rotation(degrees: float, centre_y: float, centre_x: float) -> _Matrix:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (
        cos, -sin, centre_x - cos * centre_x + sin * centre_y,
        sin, cos, centre_y - sin * centre_x - cos * centre_y,
    )  # fmt: skip


# From where a pixel is taken: x = a * column + b * row + c, y = d * column + e * row + f, in the corner's coordinates.
_MATRICES: dict[str, Callable[[float, float, float], _Matrix]] = {
    "rotate": _rotation,
    "shear_x": lambda factor, *_: (1, factor, 0, 0, 1, 0),
    "shear_y": lambda factor, *_: (1, 0, 0, factor, 1, 0),
    "translate_x": lambda pixels, *_: (1, 0, pixels, 0, 1, 0),
    "translate_y": lambda pixels, *_: (1, 0, 0, 0, 1, pixels),
}


def _warp(images: _Images, matrix: _Matrix, fill: tuple[int, int, int]) -> _Images:
    """Bilinear, all frames at once."""
    frames, _, height, width = images.shape
    grid, inside = _sources(matrix, height, width)
    # Frames as channels of one image: the weights of a pixel are worked out once.
    source = images.reshape(1, frames * 3, height, width).to(torch.float32)
    warped = torch.nn.functional.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Cut to whole numbers, as Pillow does, where float32 may be a little short of one.
    pixels = warped.add_(2**-10).to(torch.uint8).view(frames, 3, height, width)
    return torch.where(inside, pixels, torch.tensor(fill, dtype=torch.uint8)[:, None, None])


def _sources(
    matrix: _Matrix, height: int, width: int
) -> tuple[Float32[Tensor, "1 {height} {width} 2"], Bool[Tensor, "{height} {width}"]]:
    """From where each pixel is taken, in the coordinates of grid_sample, and whether that is inside the frame."""
    a, b, c, d, e, f = matrix
    rows = (torch.arange(height, dtype=torch.float64) + 0.5)[:, None]
    columns = (torch.arange(width, dtype=torch.float64) + 0.5)[None]
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1).to(torch.float32)[None], inside
