"""Lines stand where their values are, and are broken where there is none."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from vcache.pipelines.reporting.svg_chart import TALL, WIDE, Chart, Series, chart, short_percent, thinned


def drawn(wanted: Chart) -> ElementTree.Element:
    found = re.search(r"<svg.*</svg>", chart(wanted), re.DOTALL)
    assert found is not None
    return ElementTree.fromstring(found[0])


def of_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [one for one in svg.iter() if name in (one.get("class") or "").split()]


def test_points_are_proportional_to_values_and_within_the_axes() -> None:
    xs, ys = [1.0, 2.0, 4.0], [0.2, 0.6, 0.3]
    svg = drawn(Chart(title="a <b>", under="epoch", series=[Series(name="val", xs=xs, ys=ys)], from_zero=True))
    dots = [(float(dot.get("cx") or 0), float(dot.get("cy") or 0)) for dot in of_class(svg, "dot")]
    (x1, y1), (x2, y2), (x4, y3) = dots
    assert (x4 - x1) / (x2 - x1) == pytest.approx(3, rel=0.01)
    assert (y1 - y2) / (y1 - y3) == pytest.approx(0.4 / 0.1, rel=0.02)
    assert all(0 < x < WIDE and 0 < y < TALL for x, y in dots)
    assert [dot[0].text for dot in of_class(svg, "dot")][1] == "val, epoch 2: 0.6"


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_line_is_broken_where_a_value_is_missing(missing: float | None) -> None:
    series = Series(name="loss", xs=range(5), ys=[1.0, 2.0, missing, 2.0, 1.0])
    (path,) = of_class(drawn(Chart(title="t", under="x", series=[series])), "series")
    assert re.sub(r"[-0-9. ]", "", path.get("d") or "") == "MLML"


def test_an_error_bar_is_twice_the_error_long() -> None:
    series = Series(name="m", xs=[0, 1], ys=[0.4, 0.6], errors=[0.1, None])
    svg = drawn(Chart(title="t", under="lr", series=[series], places=["1e-3", "1e-2"], tick=short_percent))
    bars = [d for one in svg.iter("path") if "V" in (d := one.get("d") or "")]
    (bar,) = bars
    low, high = map(float, re.findall(r"^M[\d.]+ ([\d.]+)V([\d.]+)", bar)[0])
    y4, y6 = (float(dot.get("cy") or 0) for dot in of_class(svg, "dot"))
    assert low - high == pytest.approx(y4 - y6, abs=0.3)
    assert (low + high) / 2 == pytest.approx(y4, abs=0.2)
    assert {"1e-3", "1e-2", "lr"} <= {one.text for one in svg.iter("text")}


def test_long_curves_are_thinned_to_their_end() -> None:
    for number in (1, 5, 240, 241, 1000):
        places = thinned([0.0] * number)
        assert len(places) <= 240 and places[-1] == number - 1 and len(set(places)) == len(places)
        assert len({b - a for a, b in pairwise(places)}) <= 1


def test_nothing_to_draw_is_an_empty_chart() -> None:
    assert of_class(drawn(Chart(title="t", under="x", series=[Series(name="a", xs=[], ys=[])])), "dot") == []
