"""Heat maps lie where their patches are, colours can be read, and sheets keep the order of their pictures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.pipelines.pictures import (
    Range,
    Row,
    Scale,
    Tiling,
    colours,
    cut,
    marked,
    overlay,
    percent,
    ranged_overlay,
    sheet,
    text_width,
    wrapped,
)


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB bytes."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_colours_grow_lighter_with_every_step_and_about_evenly() -> None:
    steps = lightness(colours(np.linspace(0, 1, 101)).astype(float))
    assert (np.diff(steps) > 0).all()
    assert np.abs(steps - np.linspace(0, 98, 101)).max() < 7


def test_values_beyond_the_ends_have_the_colours_of_the_ends() -> None:
    assert np.array_equal(colours(np.array([-3.0, 2.0])), colours(np.array([0.0, 1.0])))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_peak_appears_in_its_patch_whatever_the_grid(data: st.DataObject) -> None:
    grid = (data.draw(st.integers(1, 4), "rows"), data.draw(st.integers(1, 5), "columns"))
    patch = (data.draw(st.integers(3, 7), "height"), data.draw(st.integers(3, 7), "width"))
    factor = data.draw(st.integers(1, 3), "factor")
    row, column = data.draw(st.integers(0, grid[0] - 1)), data.draw(st.integers(0, grid[1] - 1))
    size = max(grid[0] * patch[0], grid[1] * patch[1]) + data.draw(st.integers(0, 2), "border")
    weights, tiling = np.zeros(grid), Tiling(grid=grid, patch=patch)
    weights[row, column] = 0.3
    heat = lightness(overlay(np.zeros((size, size, 3), dtype=np.uint8), weights, 0.3, tiling, factor).astype(float))
    assert heat.shape == (size * factor, size * factor)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    top, left = row * patch[0] * factor, column * patch[1] * factor
    assert top <= y < top + patch[0] * factor and left <= x < left + patch[1] * factor
    assert tiling.box(row, column, factor) == (left, top, left + patch[1] * factor, top + patch[0] * factor)
    others = heat.copy()  # no other patch has its centre as light
    others[top : top + patch[0] * factor, left : left + patch[1] * factor] = 0
    centres = others[patch[0] * factor // 2 :: patch[0] * factor, patch[1] * factor // 2 :: patch[1] * factor]
    assert centres.max(initial=0) < heat.max()


def test_without_weight_an_overlay_is_the_dimmed_frame_in_grey() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    got = overlay(frame, np.zeros((2, 3)), 0.5, Tiling(grid=(2, 3), patch=(3, 2)), 2)
    grey = frame.mean(axis=-1).repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_allclose(got.mean(axis=-1), 0.35 * grey, atol=2)
    assert np.ptp(got.astype(int), axis=-1).max() <= 3


def test_a_border_that_no_patch_covers_stays_without_heat() -> None:
    got = overlay(np.zeros((7, 7, 3), dtype=np.uint8), np.ones((2, 2)), 1.0, Tiling(grid=(2, 2), patch=(3, 3)), 1)
    assert got[:6, :6].min() > 50
    assert got[6:].max() < 5 and got[:, 6:].max() < 5


def test_a_mark_surrounds_its_box_and_stays_within_the_picture() -> None:
    picture = np.full((12, 16, 3), 7, dtype=np.uint8)
    inner = marked(picture, (5, 4, 9, 8), width=2)
    outline = (inner != 7).any(axis=-1)
    assert not outline[4:8, 5:9].any() and outline[2:10, 3:11].sum() == 8 * 8 - 4 * 4 == outline.sum()
    corner = (marked(picture, (12, 8, 16, 12), width=2) != 7).any(axis=-1)
    assert corner[6, 10:].all() and corner[11, 10:].all() and corner[6:, 15].all()
    assert (picture == 7).all()


def solid(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((30, 44, 3), colour, dtype=np.uint8)


def test_a_sheet_shows_every_picture_whole_and_in_order() -> None:
    names = [(250, 1, 2), (1, 250, 3), (4, 5, 250), (250, 251, 6), (251, 7, 249)]
    rows = [
        Row(words=["one"], pictures=[solid(name) for name in names[:3]], captions=["a", "b", "c"]),
        Row(words=["two"], pictures=[solid(name) for name in names[3:]], scale=Scale(largest=0.2, even=0.1)),
    ]
    image = np.asarray(sheet(["A title"], ["x", "y", "z"], rows))
    places = []
    for name in names:
        where = np.argwhere((image == name).all(axis=-1))
        assert len(where) == 30 * 44, f"{name} is cut or covered"
        places.append(tuple(where[0]))
    assert places[0][0] == places[1][0] == places[2][0] < places[3][0] == places[4][0]
    assert places[0][1] == places[3][1] < places[1][1] == places[4][1] < places[2][1]


WORDS = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=40), max_size=12)


@settings(max_examples=40, deadline=None)
@given(words=WORDS, width=st.integers(40, 300))
def test_no_line_is_wider_than_its_place_and_no_word_that_fits_is_lost(words: list[str], width: int) -> None:
    lines = wrapped(" ".join(words), 14, width)
    assert all(text_width(line, 14) <= width for line in lines)
    if all(text_width(word, 14) <= width for word in words):
        assert " ".join(lines).split() == words


def test_what_is_too_long_ends_in_dots() -> None:
    assert cut("short", 14, 200) == "short"
    assert cut("a very long name of a class", 14, 80).endswith("...")


@pytest.mark.parametrize(
    ("value", "words"),
    [(1.0, "100%"), (0.18, "18%"), (0.023, "2.3%"), (0.0007, "0.07%"), (0.00002, "<0.01%"), (0.0, "0.00%")],
)
def test_weights_are_told_in_two_digits(value: float, words: str) -> None:
    assert percent(value) == words


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_range_leaves_outliers_beyond_its_ends(data: st.DataObject) -> None:
    values = np.random.default_rng(data.draw(st.integers(0, 99))).uniform(3, 5, 400)
    outliers = data.draw(st.lists(st.floats(50, 1e6), max_size=3))
    scale = Range.of(np.concatenate([values, outliers]))
    assert 3 < scale.low < 3.2 and 4.8 < scale.high <= 5
    places = scale.places(np.array([scale.low, (scale.low + scale.high) / 2, scale.high]))
    np.testing.assert_allclose(places, [0, 0.5, 1], atol=1e-6)


def test_small_is_blue_large_is_red_and_what_is_the_same_everywhere_is_white() -> None:
    frame, tiling = np.zeros((8, 8, 3), dtype=np.uint8), Tiling(grid=(1, 2), patch=(8, 3))
    got = ranged_overlay(frame, np.array([[3.0, 9.0]]), Range(low=4.0, high=8.0), tiling, 1).astype(int)
    assert got[4, 0, 2] - got[4, 0, 0] > 40 and got[4, 5, 0] - got[4, 5, 2] > 40
    assert np.ptp(got[:, 6:], axis=-1).max() < 5 < got[:, 6:].min()  # a border without patches
    even = ranged_overlay(frame, np.full((1, 2), 7.0), Range.of(np.full(4, 7.0)), tiling, 1)
    assert np.ptp(even.astype(int), axis=-1).max() < 5


def test_a_place_without_a_picture_stays_empty() -> None:
    rows = [Row(words=["one"], pictures=[None, solid((250, 1, 2))], scale=Range(low=1.0, high=2.0))]
    image = np.asarray(sheet(["A title"], ["", ""], rows))
    where = np.argwhere((image == (250, 1, 2)).all(axis=-1))
    assert len(where) == 30 * 44
    top, left = where[0]
    assert (image[top : top + 30, left - 50 : left - 6] == 255).all()
