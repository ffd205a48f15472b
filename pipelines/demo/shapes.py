"""Coloured shapes on dull backgrounds, drawn from signed distance functions: N images at a time, of one `Scene`.

An image depends on its row of the scene and on the seed of the noise, never on the number of threads.
Picture coordinates: x to the right, y down, the shorter side spans -1..1. Angles turn clockwise, as y goes down.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import grid_sample

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 225, 50),
    "green": (40, 165, 60),
    "cyan": (60, 210, 220),
    "blue": (40, 70, 215),
    "purple": (140, 45, 175),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
NUM_BACKGROUND_NUMBERS = 10
_RGB = np.array(list(COLOURS.values()), np.float32) / 255


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """One shape in each of N images."""

    shape: Int64[Tensor, " N"]  # index into SHAPES
    rgb: Float[Tensor, "N 3"]  # 0..1
    centre_x: Float[Tensor, " N"]
    centre_y: Float[Tensor, " N"]
    size: Float[Tensor, " N"]  # about the radius
    angle: Float[Tensor, " N"]
    alpha: Float[Tensor, " N"]  # 0 leaves it out, 1 hides what is behind


@dataclass(frozen=True, kw_only=True)
class Scene:
    """N images: a background, the sprites painted over it in order, and what the camera adds."""

    background: Int64[Tensor, " N"]  # index into BACKGROUNDS
    background_numbers: Float[Tensor, "N 10"]  # 0..1: angle, fineness, phase, ... of the pattern
    sprites: tuple[Sprite, ...]
    shake: Float[Tensor, "N 2"]  # x and y by which the camera is off
    gain: Float[Tensor, " N"]  # brightness, 1 = as it is
    noise: Float[Tensor, " N"]  # standard deviation, of 0..1


def draw(scene: Scene, *, height: int, width: int, noise_seed: int) -> UInt8[Tensor, "N height width 3"]:
    """The RGB images of a scene."""
    N = len(scene.background)
    short_side = min(height, width)
    x, y = _pixel_centres(height, width)
    x, y = x + _planes(scene.shake[:, 0]), y + _planes(scene.shake[:, 1])  # (N, height, width)
    image = draw_background(scene.background, scene.background_numbers, x, y)
    for sprite in scene.sprites:
        image = _paint(image, sprite, x, y, short_side)
    grain = torch.randn(N, 1, height, width, generator=torch.Generator().manual_seed(noise_seed))
    image = image * scene.gain.view(N, 1, 1, 1) + grain * scene.noise.view(N, 1, 1, 1)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def vary_colour(rng: np.random.Generator, colour: int) -> Float[np.ndarray, " 3"]:
    """A colour of COLOUR_NAMES as it looks this time: brighter or darker, and a little off in hue."""
    return np.clip(_RGB[colour] * rng.uniform(0.85, 1.08) + rng.uniform(-0.05, 0.05, 3), 0, 1).astype(np.float32)


def _pixel_centres(height: int, width: int) -> tuple[Float[Tensor, "height width"], Float[Tensor, "height width"]]:
    half = min(height, width) / 2
    y = (torch.arange(height) + 0.5 - height / 2) / half
    x = (torch.arange(width) + 0.5 - width / 2) / half
    return x.expand(height, width), y[:, None].expand(height, width)


def _planes(values: Float[Tensor, " N"]) -> Float[Tensor, "N 1 1"]:
    return values.view(-1, 1, 1)


def _paint(
    image: Float[Tensor, "N 3 height width"],
    sprite: Sprite,
    x: Float[Tensor, "N height width"],
    y: Float[Tensor, "N height width"],
    short_side: int,
) -> Float[Tensor, "N 3 height width"]:
    """The images with the sprite over them, its edge blended over one pixel."""
    size, cosine, sine = _planes(sprite.size), _planes(sprite.angle.cos()), _planes(sprite.angle.sin())
    dx, dy = (x - _planes(sprite.centre_x)) / size, (y - _planes(sprite.centre_y)) / size
    local_x, local_y = dx * cosine + dy * sine, -dx * sine + dy * cosine
    distance = torch.full_like(local_x, 9.0)  # far outside
    for index, distance_to in enumerate(_DISTANCE_TO.values()):
        chosen = (sprite.shape == index) & (sprite.alpha > 0)
        if chosen.any():
            distance[chosen] = distance_to(local_x[chosen], local_y[chosen])
    cover = ((0.5 - distance * size * short_side / 2).clamp(0, 1) * _planes(sprite.alpha))[:, None]
    shade = (1 - 0.06 * (local_y + 1).clamp(0, 2))[:, None]  # a little darker towards the bottom
    return image * (1 - cover) + sprite.rgb[:, :, None, None] * shade * cover


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: approximate signed distance, in units of the size, negative inside. Radii are such that areas look alike.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - 0.85


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.76


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.12  # the corners' centre lies below the middle of its height
    sector = 2 * math.pi / 3
    angle = torch.remainder(torch.atan2(x, -y), sector) - sector / 2
    return (x * x + y * y).sqrt() * angle.cos() - 1.05 * math.cos(sector / 2)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """The line from a point of the star to the dent beside it; folding makes all ten edges the same one."""
    sector = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    radius = (x * x + y * y).sqrt()
    along, across = radius * angle.cos(), radius * angle.sin()
    point = 1.08
    edge_x, edge_y = 0.44 * math.cos(sector / 2) - point, 0.44 * math.sin(sector / 2)
    return ((along - point) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.92, y - 0.3), torch.maximum(x - 0.3, y - 0.92))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return ((x * x + y * y).sqrt() - 0.68).abs() - 0.22


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x = x.abs()
    lobe = ((x - 0.42) ** 2 + (y + 0.32) ** 2).sqrt() - 0.47
    tip = torch.maximum((x * 0.8 + y * 0.6) - 0.56, -y - 0.32)
    return torch.minimum(lobe, torch.maximum(tip, x - 0.9))


def _moon(x: Tensor, y: Tensor) -> Tensor:
    bite = 0.70 - ((x - 0.46) ** 2 + y * y).sqrt()
    return torch.maximum((x * x + y * y).sqrt() - 0.92, bite)


_DISTANCE_TO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
}
SHAPES = tuple(_DISTANCE_TO)


# ---------------------------------------------------------------------------------------------------------------------
# Backgrounds: a pattern in 0..1 that mixes two dull tones. u, w are x, y turned by the pattern's angle.


@dataclass(frozen=True)
class _Plane:
    x: Float[Tensor, "M height width"]
    y: Float[Tensor, "M height width"]
    u: Float[Tensor, "M height width"]
    w: Float[Tensor, "M height width"]
    fineness: Float[Tensor, "M 1 1"]
    phase: Float[Tensor, "M 1 1"]
    seeds: Float[Tensor, "M 2"]


def draw_background(
    kind: Int64[Tensor, " N"],
    numbers: Float[Tensor, "N 10"],
    x: Float[Tensor, "N height width"],
    y: Float[Tensor, "N height width"],
) -> Float[Tensor, "N 3 height width"]:
    """Two dull tones: hardly any hue and at most about 0.6 bright, so that no background has one of the colours."""
    angle, fineness, phase, _, _, dark, contrast, *hue = (_planes(column) for column in numbers.unbind(1))
    cosine, sine = torch.cos(angle * math.pi), torch.sin(angle * math.pi)
    u, w = x * cosine + y * sine, -x * sine + y * cosine
    fineness = 2.5 + 5 * fineness
    tone = torch.zeros_like(x)
    for index, pattern in enumerate(_PATTERN_OF.values()):
        m = kind == index
        if m.any():
            tone[m] = pattern(_Plane(x[m], y[m], u[m], w[m], fineness[m], phase[m], numbers[m, 3:5]))
    brightness = 0.12 + 0.34 * dark + (0.08 + 0.18 * contrast) * tone
    tint = torch.stack([1 + 0.22 * (channel - 0.5) for channel in hue], 1)
    return brightness[:, None] * tint


def _plain(plane: _Plane) -> Tensor:
    return plane.u * 0.6 + plane.phase  # a slow gradient


def _striped(plane: _Plane) -> Tensor:
    wave = torch.sin(plane.u * plane.fineness * 2 * math.pi + 6.28 * plane.phase)
    return (wave * 4).clamp(-1, 1) * 0.5 + 0.5


def _checkered(plane: _Plane) -> Tensor:
    waves = torch.sin(plane.u * plane.fineness * 5) * torch.sin(plane.w * plane.fineness * 5)
    return (waves * 6).clamp(-1, 1) * 0.5 + 0.5


def _cloudy(plane: _Plane) -> Tensor:
    where = torch.stack([plane.x * 0.5, plane.y * 0.5], -1)
    coarse, fine = _cells(plane.seeds[:, 0] * 97, 7), _cells(plane.seeds[:, 1] * 89, 17)
    soft = grid_sample(coarse, where, mode="bicubic", align_corners=True, padding_mode="reflection")
    rough = grid_sample(fine, where, mode="bilinear", align_corners=True, padding_mode="reflection")
    return (0.65 * soft + 0.35 * rough)[:, 0]


def _dotted(plane: _Plane) -> Tensor:
    du = torch.remainder(plane.u * plane.fineness, 1) - 0.5
    dw = torch.remainder(plane.w * plane.fineness, 1) - 0.5
    return (((du * du + dw * dw).sqrt() - 0.28) * 12).clamp(-0.5, 0.5) + 0.5


def _cells(seed: Float[Tensor, " M"], side: int) -> Float[Tensor, "M 1 side side"]:
    """Numbers in 0..1 that depend on the seed alone: a generator per image would draw them one image at a time."""
    cell = torch.arange(side * side, dtype=torch.float64).view(1, 1, side, side)
    value = torch.sin(cell * 12.9898 + seed.double().view(-1, 1, 1, 1) * 78.233) * 43758.5453
    return (value - value.floor()).float()


_PATTERN_OF: dict[str, Callable[[_Plane], Tensor]] = {
    "plain": _plain,
    "striped": _striped,
    "checkered": _checkered,
    "cloudy": _cloudy,
    "dotted": _dotted,
}
BACKGROUNDS = tuple(_PATTERN_OF)
