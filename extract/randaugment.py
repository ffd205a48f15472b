"""RandAugment (Cubuk et al. 2020) and the other random operations of training: drawn here, done by operations.py.

The sets and magnitudes are timm's, which EVL uses through SlowFast's copy, and those of pytorch-randaugment, which
ActionCLIP uses. Differs from both: geometry is bilinear, where timm takes bicubic and pytorch-randaugment the nearest pixel, and
a box is filled with the mean colour.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from vcache.extract.operations import ROW, row

_OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "colour",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
OPERATION_SETS = {"plain": _OPERATIONS, "increasing": _OPERATIONS, "absolute": (*_OPERATIONS, "fill")}

Row = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` operations, each chosen at random from all and done with `probability`.

    timm's "rand-m7-n4-mstd0.5-inc1" is what the defaults say.
    """

    num_ops: int = 4
    magnitude: float = 7.0
    magnitude_std: float = 0.5
    """Of the normal distribution that each magnitude is drawn from, cut to 0 and `max_magnitude`."""
    max_magnitude: float = 10.0
    """The magnitude of the strongest operations: 10 in timm, 30 in pytorch-randaugment."""
    probability: float = 0.5
    operations: str = "increasing"
    """"increasing": all get stronger with the magnitude; "plain": posterize and solarize get weaker, and colours go from factor
    0.1 to 1.9; "absolute": as plain, with translations of up to 100 pixels and not of 45% of the side, and one more, a
    filled square of up to 40 pixels."""
    per_frame: bool = False
    """Drawn for each frame anew; the same for all frames of a clip if not."""
    fill: tuple[int, int, int] = (128, 128, 128)

    def __post_init__(self) -> None:
        if self.operations not in OPERATION_SETS:
            raise ValueError(f"operations {self.operations!r} are not known; choose from: {', '.join(OPERATION_SETS)}")
        if self.num_ops < 1 or not 0 <= self.magnitude <= self.max_magnitude:
            raise ValueError(
                f"num_ops ({self.num_ops}) must be at least 1, magnitude ({self.magnitude:g}) from 0 to {self.max_magnitude:g}"
            )

    def draw(
        self, rng: random.Random, *, num_frames: int, height: int, width: int
    ) -> Float32[np.ndarray, "T operation 5"]:
        """Operations for frames of this size."""
        drawn = [self._draw(rng, height, width) for _ in range((num_frames if self.per_frame else 1) * self.num_ops)]
        return _for_frames(drawn, num_frames, self.num_ops)

    def _draw(self, rng: random.Random, height: int, width: int) -> Row:
        """One operation. Always the same count of numbers, whichever it is."""
        name = rng.choice(OPERATION_SETS[self.operations])
        done = rng.random() < self.probability
        level = min(max(rng.gauss(self.magnitude, self.magnitude_std), 0.0), self.max_magnitude) / self.max_magnitude
        sign = rng.choice((-1.0, 1.0))
        place = rng.random() * height, rng.random() * width
        if not done:
            return row("none")
        if name == "fill":
            return row("fill", *_square(place, 40 * level, height, width))
        return row(name, self._argument(name, level, sign, height, width))

    def _argument(self, name: str, level: float, sign: float, height: int, width: int) -> float | int:
        """What an operation of this level, from 0 to 1, is done with."""
        increasing, absolute = self.operations == "increasing", self.operations == "absolute"
        match name:
            case "rotate":
                return sign * 30 * level
            case "posterize":
                return 4 - int(4 * level) if increasing else int(4 * level)
            case "solarize":
                return 256 - int(256 * level) if increasing else int(256 * level)
            case "solarize_add":
                return int(110 * level)
            case "colour" | "contrast" | "brightness" | "sharpness":
                return max(0.1, 1 + sign * 0.9 * level) if increasing else 0.1 + 1.8 * level
            case "shear_x" | "shear_y":
                return sign * 0.3 * level
            case "translate_x":
                return sign * (100 if absolute else 0.45 * width) * level
            case "translate_y":
                return sign * (100 if absolute else 0.45 * height) * level
        return 0.0  # autocontrast, equalize and invert have no strength


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """torchvision's ColorJitter with `probability`: brightness, contrast, saturation and hue in random order."""

    probability: float = 0.8
    brightness: float = 0.4
    """The factor is drawn from 1 - brightness to 1 + brightness, not below 0; likewise contrast and saturation."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Turns, drawn from -hue to hue."""
    per_frame: bool = False
    """Order and factors are drawn for each frame anew, as ActionCLIP does; whether at all is drawn once."""

    def draw(self, rng: random.Random, *, num_frames: int) -> Float32[np.ndarray, "T 4 5"]:
        """Four operations for each frame."""
        if rng.random() >= self.probability:
            return np.zeros((num_frames, 4, ROW), dtype=np.float32)
        drawn = [each for _ in range(num_frames if self.per_frame else 1) for each in self._draw(rng)]
        return _for_frames(drawn, num_frames, 4)

    def _draw(self, rng: random.Random) -> list[Row]:
        amounts = {"brightness": self.brightness, "contrast": self.contrast, "colour": self.saturation}
        rows = [row(name, rng.uniform(max(0.0, 1 - amount), 1 + amount)) for name, amount in amounts.items()]
        rows.append(row("hue", rng.uniform(-self.hue, self.hue)))
        rng.shuffle(rows)
        return rows


def draw_grey(rng: random.Random, probability: float, *, num_frames: int) -> Float32[np.ndarray, "T 1 5"]:
    """Grey frames with this probability."""
    return _for_frames([row("grey") if rng.random() < probability else row("none")], num_frames, 1)


def draw_erasing(
    rng: random.Random, probability: float, *, num_frames: int, image_size: int
) -> Float32[np.ndarray, "T 1 5"]:
    """With this probability a rectangle of 2% to 33% of the image, the same in all frames (Zhong et al. 2020, numbers of timm).

    Differs: it is filled with the mean colour, where AIM's recipe fills it with noise.
    """
    erase = rng.random() < probability
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * image_size**2
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if erase and 0 < height < image_size and 0 < width < image_size:
            top, left = rng.randint(0, image_size - height), rng.randint(0, image_size - width)
            return _for_frames([row("fill", top, left, height, width)], num_frames, 1)
    return _for_frames([row("none")], num_frames, 1)


def _square(centre: tuple[float, float], side: float, height: int, width: int) -> tuple[int, int, int, int]:
    """The part of a square that lies in the frame: top, left, height, width."""
    top, left = (int(max(0.0, place - side / 2)) for place in centre)
    return top, left, min(int(side), height - top), min(int(side), width - left)


def _for_frames(drawn: list[Row], num_frames: int, num_operations: int) -> Float32[np.ndarray, "T operation 5"]:
    """Rows drawn once, or frame by frame, as one array for all frames."""
    rows = np.array(drawn, dtype=np.float32).reshape(-1, num_operations, ROW)
    return np.ascontiguousarray(np.broadcast_to(rows, (num_frames, num_operations, ROW)))
