"""Line charts: values at their heights, bars around them, names apart from each other, axes of round numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vcache.pipelines.line_chart import BLUE, COLOURS, RED, Axis, Level, Line, axis_around, line_chart


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6))
def test_an_axis_holds_its_values_between_few_round_numbers(values: list[float]) -> None:
    axis = axis_around(values)
    little = 1e-9 * (axis.high - axis.low)
    assert axis.low <= min(values) + little and max(values) - little <= axis.high
    assert 3 <= len(axis.ticks) <= 12 and (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high)
    steps = np.diff(axis.ticks)
    assert steps.min() == pytest.approx(steps.max(), rel=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"


def test_an_axis_of_values_a_rounding_apart_from_a_round_step() -> None:
    for low in range(1, 40):
        axis = axis_around([low / 10, low / 10 + 0.3])
        assert len(axis.ticks) >= 4 and axis.low <= low / 10 + 1e-9 and low / 10 + 0.3 <= axis.high + 1e-9


def test_of_nothing_the_axis_goes_around_zero_to_one() -> None:
    assert axis_around([]).low == 0 and axis_around([]).high == 1


def drawn(*lines: Line, levels: tuple[Level, ...] = (), places: int = 3) -> np.ndarray:
    words = [str(number) for number in range(places)]
    axis = Axis(low=10.0, high=50.0, ticks=(10.0, 30.0, 50.0), word="{:g}".format)
    return np.asarray(line_chart("Title", "a note", words, "shots", lines, levels=levels, axis=axis))


def of_colour(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(y, x) of its pixels left of the names."""
    found = np.argwhere((image == colour).all(axis=-1))
    return found[found[:, 1] <= 14 + 56 + 420]


def middle(image: np.ndarray, colour: tuple[int, int, int], x: int) -> float:
    found = of_colour(image, colour)
    return float(found[found[:, 1] == x][:, 0].mean())


def test_a_value_is_at_its_height_and_a_missing_one_is_passed_over() -> None:
    image = drawn(
        Line(name="one", colour=RED, values=(10.0, None, 50.0)),
        Line(name="two", colour=BLUE, values=(30.0, 30.0, 30.0)),
    )
    left = 14 + 56
    low, half, high = middle(image, RED, left + 1), middle(image, BLUE, left + 1), middle(image, RED, left + 419)
    assert low - high == pytest.approx(320, abs=3) and (low + high) / 2 == pytest.approx(half, abs=2)
    assert middle(image, RED, left + 105) == pytest.approx(low - 320 / 4, abs=3)  # straight to the next that is there


def test_an_error_bar_reaches_as_far_as_it_says() -> None:
    image = drawn(Line(name="one", colour=RED, values=(20.0, 30.0, 40.0), errors=(None, 10.0, 0.0)))
    found = of_colour(image, RED)
    at_bar = found[found[:, 1] == 14 + 56 + 210][:, 0]
    assert at_bar.max() - at_bar.min() == pytest.approx(160, abs=3)
    assert np.ptp(found[found[:, 1] == 14 + 56][:, 0]) < 12


def test_a_level_is_dashed_from_end_to_end() -> None:
    image = drawn(
        Line(name="one", colour=RED, values=(20.0, 30.0, 40.0)), levels=(Level(name="zero", colour=BLUE, value=45.0),)
    )
    columns = np.unique(of_colour(image, BLUE)[:, 1]) - (14 + 56)
    assert columns.min() < 4 and columns.max() > 400 and len(columns) == pytest.approx(210, abs=35)
    assert len(np.unique(of_colour(image, BLUE)[:, 0])) <= 3


@pytest.mark.parametrize("num", [1, 5, 30])
def test_names_do_not_overlap_and_stay_in_the_picture(num: int) -> None:
    colours = [(number, 3, 200 - number) for number in range(num)]
    lines = [Line(name=f"a line {number}", colour=one, values=(10.0, 10.0)) for number, one in enumerate(colours)]
    image = drawn(*lines, places=2)
    names = image[:, 14 + 56 + 420 + 8 :]
    spans = [np.argwhere((names == one).all(axis=-1))[:, 0] for one in colours]
    tops = sorted((span.min(), span.max()) for span in spans)
    assert all(len(span) for span in spans) and all(a[1] < b[0] for a, b in pairwise(tops))


def test_a_line_without_values_has_no_name_and_one_place_is_in_the_middle() -> None:
    nothing = drawn(Line(name="one", colour=RED, values=(None, None, None)))
    assert not (nothing == RED).all(axis=-1).any()
    alone = drawn(Line(name="one", colour=RED, values=(30.0,)), places=1)
    assert of_colour(alone, RED)[:, 1].mean() == pytest.approx(14 + 56 + 210, abs=1)


def test_the_colours_differ_and_a_picture_is_an_image() -> None:
    assert len(set(COLOURS)) == len(COLOURS) and {RED, BLUE}.isdisjoint(COLOURS)
    assert isinstance(line_chart("t", "n", ["1"], "u", []), Image.Image)
