"""Which rectangle of a frame a training view shows, in whole pixels: top, left, height, width."""

import math
import random

Box = tuple[int, int, int, int]

_ATTEMPTS = 10


def random_resized_crop(
    rng: random.Random, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A rectangle of a random share of the area (`scale`) and of a random width / height (`ratio`, even in its logarithm).

    The rule of Inception as torchvision and SlowFast have it: after ten rectangles that do not fit, the largest one in the
    centre with an allowed ratio.
    """
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_height, box_width = min(height, round(width / aspect)), min(width, round(height * aspect))
    return _centred(height, width, max(box_height, 1), max(box_width, 1))


def multi_scale_crop(rng: random.Random, height: int, width: int, *, scales: tuple[float, ...], image_size: int) -> Box:
    """Sides from `scales` of the short side, at most one step apart, at one of 13 fixed places (TSN; ActionCLIP at 31c34df).

    A side within 2 pixels of `image_size` becomes it, unless the frame is smaller. The places are a grid of five by five of
    which the corners, the centre, the middles of the sides and the centres of the quarters are used.
    """
    lengths = [int(min(height, width) * scale) for scale in scales]
    lengths = [image_size if abs(length - image_size) < 3 else max(length, 1) for length in lengths]
    sides = [(h, w) for i, h in enumerate(lengths) for j, w in enumerate(lengths) if abs(i - j) <= 1]
    box_height, box_width = rng.choice(sides)
    box_height, box_width = min(box_height, height), min(box_width, width)
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
    row, column = rng.choice(places)
    return (height - box_height) // 4 * row, (width - box_width) // 4 * column, box_height, box_width


def centre_crop(height: int, width: int, size: int) -> Box:
    """A square of `size`, or of the short side if that is less."""
    size = min(size, height, width)
    return _centred(height, width, size, size)


def _centred(height: int, width: int, box_height: int, box_width: int) -> Box:
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
