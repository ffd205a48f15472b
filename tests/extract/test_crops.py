"""Rectangles of training views against torchvision's distribution and ActionCLIP's list."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from vcache.extract.crops import centre_crop, multi_scale_crop, random_resized_crop

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SCALES = (1.0, 0.875, 0.75, 0.66)
sizes = st.integers(1, 900)


@given(sizes, sizes, st.integers(0, 2**40), st.integers(1, 400))
def test_every_crop_lies_in_the_frame(height: int, width: int, seed: int, image_size: int) -> None:
    rng = random.Random(seed)
    for top, left, box_height, box_width in (
        random_resized_crop(rng, height, width, scale=SCALE, ratio=RATIO),
        random_resized_crop(rng, height, width, scale=(0.4, 0.9), ratio=(3.0, 4.0)),
        multi_scale_crop(rng, height, width, scales=SCALES, image_size=image_size),
        centre_crop(height, width, image_size),
    ):
        assert top >= 0 and left >= 0 and box_height >= 1 and box_width >= 1
        assert top + box_height <= height and left + box_width <= width


def test_random_resized_crops_are_spread_as_torchvisions() -> None:
    height, width = 90, 130
    rng = random.Random(0)
    ours = np.array([random_resized_crop(rng, height, width, scale=SCALE, ratio=RATIO) for _ in range(4000)], float)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.zeros(1, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(4000)], float)
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(ours, quantile, axis=0), np.quantile(theirs, quantile, axis=0), atol=4)
    areas = ours[:, 2] * ours[:, 3] / (height * width)
    assert 0.07 < areas.min() < 0.1 and areas.max() <= 1


def test_a_frame_that_no_rectangle_fits_gives_the_largest_in_its_centre() -> None:
    # Ten times as wide as high: with almost the whole area asked for, no ratio up to 4/3 fits.
    assert random_resized_crop(random.Random(1), 60, 600, scale=(0.9, 1.0), ratio=RATIO) == (0, 260, 60, 80)


@pytest.mark.parametrize("height, width, image_size", [(240, 320, 224), (340, 256, 225), (64, 51, 49)])
def test_multi_scale_crops_are_those_that_actionclip_lists(height: int, width: int, image_size: int) -> None:
    lengths = [int(min(height, width) * scale) for scale in SCALES]
    lengths = [image_size if abs(length - image_size) < 3 else length for length in lengths]
    expected = set()
    for i, h in enumerate(lengths):
        for w in lengths[max(i - 1, 0) : i + 2]:
            y, x = (height - h) // 4, (width - w) // 4
            corners = [(0, 0), (0, 4 * x), (4 * y, 0), (4 * y, 4 * x), (2 * y, 2 * x)]
            sides = [(2 * y, 0), (2 * y, 4 * x), (4 * y, 2 * x), (0, 2 * x)]
            quarters = [(y, x), (y, 3 * x), (3 * y, x), (3 * y, 3 * x)]
            expected |= {(top, left, h, w) for top, left in corners + sides + quarters}
    rng = random.Random(2)
    drawn = {multi_scale_crop(rng, height, width, scales=SCALES, image_size=image_size) for _ in range(6000)}
    assert drawn == expected


def test_the_centre_is_a_square_of_the_size_or_of_the_short_side() -> None:
    assert centre_crop(60, 100, 40) == (10, 30, 40, 40)
    assert centre_crop(60, 100, 80) == (0, 20, 60, 60)
