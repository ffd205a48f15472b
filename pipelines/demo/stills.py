"""Still pictures of the shapes with captions, for training the tiny CLIP. Sixteen of the 64 combinations are never shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vcache.pipelines.demo.shapes import (
    BACKGROUNDS,
    COLOUR_NAMES,
    NUM_BACKGROUND_NUMBERS,
    SHAPES,
    Scene,
    Sprite,
    draw,
    vary_colour,
)

Combination = tuple[int, int]  # shape, colour

COMBINATIONS: tuple[Combination, ...] = tuple((s, c) for s in range(len(SHAPES)) for c in range(len(COLOUR_NAMES)))
# Two colours of every shape, and so two shapes of every colour, that no caption of the training set names.
HELD_OUT = tuple((s, c) for s, c in COMBINATIONS if (c - s) % len(COLOUR_NAMES) in (0, 3))
SEEN = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """From one large shape in the middle of a plain picture to everything the world has."""

    two_objects: float = 0.25  # how often a second one is there
    smallest: float = 0.17  # of the sizes, up to 0.62
    spread: float = 1.0  # of places, angles and backgrounds; 0: in the middle, upright, on plain
    full_caption: bool = True  # or else only colour and shape


@dataclass(frozen=True, kw_only=True)
class Object:
    """A shape somewhere in a still; the fields as in `Sprite`."""

    shape: int
    colour: int
    rgb: Float[np.ndarray, " 3"]
    size: float
    centre_x: float
    centre_y: float
    angle: float


@dataclass(frozen=True, kw_only=True)
class Still:
    """A picture that can be drawn, and what there is to say about it."""

    objects: tuple[Object, ...]
    background: int
    background_numbers: Float[np.ndarray, " 10"]
    gain: float
    noise: float
    caption: str

    @property
    def combination(self) -> Combination:
        """Shape and colour of the object that the caption names first."""
        return self.objects[0].shape, self.objects[0].colour


def combination_name(combination: Combination, size: str = "") -> str:
    """`(7, 1)` -> "an orange moon"."""
    words = f"{size} {appearance(combination)}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def appearance(combination: Combination) -> str:
    """`(7, 1)` -> "orange moon"."""
    shape, colour = combination
    return f"{COLOUR_NAMES[colour]} {SHAPES[shape]}"


def random_still(
    rng: np.random.Generator, combinations: Sequence[Combination], difficulty: Difficulty | None = None
) -> Still:
    """A still whose first object is one of the combinations, with a caption that fits.

    A second object is always of the SEEN ones, so that the held-out names stay out of the training set.
    """
    difficulty = difficulty or Difficulty()
    first = _first_object(rng, combinations, difficulty)
    background = int(rng.integers(len(BACKGROUNDS))) if rng.random() < difficulty.spread else 0
    opening = rng.choice(["", "", "a photo of ", "a picture of ", "an image of "])
    place = f"{BACKGROUNDS[background]} background"
    ending = rng.choice([f" on a {place}", f", {place}", ""], p=[0.25, 0.15, 0.6])
    if rng.random() < difficulty.two_objects:
        first, second = _beside(rng, first)
        objects: tuple[Object, ...] = (first, second)
        caption = f"{opening}{_say_both(rng, first, second)}{ending}"
    else:
        objects = (first,)
        caption = f"{opening}{_say_one(rng, first)}{ending}" if difficulty.full_caption else f"{opening}{_name(first)}"
    return Still(
        objects=objects,
        background=background,
        background_numbers=rng.random(NUM_BACKGROUND_NUMBERS),
        gain=rng.uniform(0.75, 1.15),
        noise=rng.uniform(0, 0.06),
        caption=caption,
    )


def draw_stills(stills: Sequence[Still], *, image_size: int = 64, noise_seed: int = 0) -> UInt8[Tensor, "N S S 3"]:
    """The pictures, RGB."""
    most = max(len(still.objects) for still in stills)
    scene = Scene(
        background=torch.tensor([still.background for still in stills]),
        background_numbers=_stack([still.background_numbers for still in stills]),
        sprites=tuple(_sprite(stills, layer) for layer in range(most)),
        shake=torch.zeros(len(stills), 2),
        gain=torch.tensor([still.gain for still in stills]),
        noise=torch.tensor([still.noise for still in stills]),
    )
    return draw(scene, height=image_size, width=image_size, noise_seed=noise_seed)


def _first_object(rng: np.random.Generator, combinations: Sequence[Combination], difficulty: Difficulty) -> Object:
    shape, colour = combinations[int(rng.integers(len(combinations)))]
    size = math.exp(rng.uniform(math.log(difficulty.smallest), math.log(0.62)))
    reach = max(0.05, 0.95 - size * 0.8)  # keeps most of it in the picture
    return Object(
        shape=shape,
        colour=colour,
        rgb=vary_colour(rng, colour),
        size=size,
        centre_x=difficulty.spread * rng.uniform(-reach, reach),
        centre_y=difficulty.spread * rng.uniform(-reach, reach),
        angle=difficulty.spread * rng.uniform(-0.35, 0.35),
    )


def _beside(rng: np.random.Generator, first: Object) -> tuple[Object, Object]:
    """The first object, not too large, and another beside it; after 20 tries the two may overlap."""
    first = replace(first, size=min(first.size, 0.42))
    for _ in range(20):
        shape, colour = SEEN[rng.integers(len(SEEN))]
        size = rng.uniform(0.2, 0.42)
        reach = 0.95 - size * 0.8
        x, y = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
        apart = math.hypot(x - first.centre_x, y - first.centre_y) > 0.75 * (first.size + size)
        if apart and (shape, colour) != (first.shape, first.colour):
            break
    rgb, angle = vary_colour(rng, colour), rng.uniform(-0.35, 0.35)
    second = Object(shape=shape, colour=colour, rgb=rgb, size=size, centre_x=x, centre_y=y, angle=angle)
    return first, second


def _name(thing: Object, size: str = "") -> str:
    return combination_name((thing.shape, thing.colour), size)


def _say_one(rng: np.random.Generator, thing: Object) -> str:
    """With its place, its size, both or neither."""
    says_place = rng.random() < 0.55
    size = "small" if thing.size < 0.26 else "big" if thing.size > 0.42 else ""
    named = _name(thing, size if rng.random() < 0.6 else "")
    return f"{named} {_place(thing)}" if says_place else named


def _say_both(rng: np.random.Generator, first: Object, second: Object) -> str:
    dx, dy = second.centre_x - first.centre_x, second.centre_y - first.centre_y
    beside, over = "left of" if dx > 0 else "right of", "above" if dy > 0 else "below"
    link = rng.choice(["and", beside if abs(dx) > abs(dy) else over])
    return f"{_name(first)} {link} {_name(second)}"


def _place(thing: Object) -> str:
    """In thirds of the picture: "at the top left", "on the right", "in the middle", ..."""
    column = ("left", "", "right")[np.digitize(thing.centre_x, [-0.25, 0.25])]
    row = ("top", "", "bottom")[np.digitize(thing.centre_y, [-0.25, 0.25])]
    if row:
        return f"at the {row} {column}".strip()
    return f"on the {column}" if column else "in the middle"


def _stack(rows: list[np.ndarray]) -> Float[Tensor, "N M"]:
    return torch.from_numpy(np.stack(rows)).float()


def _sprite(stills: Sequence[Still], layer: int) -> Sprite:
    """The objects at one place of the painting order; a still without one gets a transparent stand-in."""
    there = [layer < len(still.objects) for still in stills]
    objects = [still.objects[layer if present else 0] for still, present in zip(stills, there, strict=True)]
    return Sprite(
        shape=torch.tensor([thing.shape for thing in objects]),
        rgb=_stack([thing.rgb for thing in objects]),
        centre_x=torch.tensor([thing.centre_x for thing in objects]),
        centre_y=torch.tensor([thing.centre_y for thing in objects]),
        size=torch.tensor([thing.size for thing in objects]),
        angle=torch.tensor([thing.angle for thing in objects]),
        alpha=torch.tensor([float(present) for present in there]),
    )
