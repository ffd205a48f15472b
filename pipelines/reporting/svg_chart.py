"""Lines and points as SVG, small enough for a phone: sharp at any size, in the colours of the page, values on pointing at them.

Several small charts stand beside each other rather than a large one that a phone would shrink until nobody can read it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vcache.pipelines.line_chart import COLOURS, Axis, axis_around
from vcache.pipelines.reporting.markup import Content, Markup, tag

WIDE, TALL = 360, 226
"""Of the view box: at the 350 pixels of a phone letters of 13 are drawn as such."""
_RIGHT, _TOP, _BOTTOM = 12, 8, 36
_LETTER = 8
"""Width of a letter or digit, more or less."""
Number = float | int
MOST_POINTS = 240
"""Of a line; more are thinned, as no screen shows them apart."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line over the places of the chart. Where `ys` is None or not a number, the line is broken."""

    name: str
    """In the legend; empty: not in it."""
    xs: Sequence[Number]
    ys: Sequence[Number | None]
    errors: Sequence[Number | None] = ()
    """Half the length of an error bar; None or nothing: no bar."""
    colour: int = 0
    """Place among COLOURS."""
    line: bool = True
    """Else points alone."""
    small: bool = False
    """Its points, beside the line that they are the runs of."""
    faint: bool = False
    """Behind the others, and without points."""
    tip: str = ""
    """Of its points, where that is not the name."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn, and what stands around it."""

    title: str
    under: str
    """What the x axis is."""
    series: Sequence[Series]
    note: str = ""
    word: Callable[[float], str] = "{:.3g}".format
    """Of a value, in the tooltips."""
    tick: Callable[[float], str] = "{:.4g}".format
    """Of a value, at the axis."""
    place: Callable[[float], str] = "{:g}".format
    """Of a place, in the tooltips."""
    places: Sequence[str] = ()
    """Words at x = 0, 1, 2, ... where these are no numbers."""
    level: tuple[str, float] | None = None
    """A dashed line across the chart, as that of chance."""
    from_zero: bool = False
    legend: bool = True

    @property
    def has_points(self) -> bool:
        """Whether there is anything to draw but the axes."""
        return any(_known(one) for one in self.series)


@dataclass(frozen=True)
class _Frame:
    x: Axis
    y: Axis
    left: float

    def across(self, value: float) -> float:
        return round(self.left + (WIDE - self.left - _RIGHT) * self.x.share(value), 1)

    def down(self, value: float) -> float:
        return round(TALL - _BOTTOM - (TALL - _TOP - _BOTTOM) * self.y.share(value), 1)


def percent(value: float) -> str:
    """A share with a digit behind the point: "61.5%"."""
    return f"{100 * value:.1f}%"


def short_percent(value: float) -> str:
    """The same for an axis: "60%", "0.5%"."""
    return f"{100 * value:.4g}%"


def chart(wanted: Chart) -> Markup:
    """A figure with its title above and its legend below."""
    frame = _frame(wanted)
    drawn = [
        _axes(frame, wanted),
        [_level(frame, wanted.level[1])] if wanted.level else [],
        [_series(frame, one, wanted) for one in sorted(wanted.series, key=lambda one: not one.faint)],
    ]
    words = f"{wanted.title}, over {wanted.under}"
    picture = tag("svg", tag("title", words), drawn, viewBox=f"0 0 {WIDE} {TALL}", role="img", aria_label=words)
    note = tag("small", f" {wanted.note}") if wanted.note else None
    return tag("figure", tag("figcaption", wanted.title, note), picture, _legend(wanted))


def thinned(values: Sequence[object], most: int = MOST_POINTS) -> list[int]:
    """Places of at most so many of the values, evenly spread, the last among them."""
    step = max(1, math.ceil(len(values) / most))
    return list(range(len(values) - 1, -1, -step))[::-1]


def _known(one: Series) -> list[tuple[int, float, float]]:
    pairs = zip(one.xs, one.ys, strict=True)
    return [(i, float(x), float(y)) for i, (x, y) in enumerate(pairs) if y is not None and math.isfinite(y)]


def _frame(wanted: Chart) -> _Frame:
    ys = [wanted.level[1]] if wanted.level else []
    ys += [0.0] if wanted.from_zero else []
    for one in wanted.series:
        for i, _, y in _known(one):
            error = (one.errors[i] or 0.0) if one.errors else 0.0
            ys += [y - error, y + error]
    if wanted.places:
        last = len(wanted.places) - 1
        x = Axis(low=-0.5, high=last + 0.5, ticks=tuple(map(float, range(last + 1))), word="{:g}".format)
    else:
        xs = [x for one in wanted.series for _, x, _ in _known(one)]
        around = axis_around(xs, wanted.place)
        low, high = (min(xs), max(xs)) if xs and max(xs) > min(xs) else (around.low, around.high)
        ticks = tuple(tick for tick in around.ticks if low <= tick <= high)
        x = Axis(low=low, high=high, ticks=ticks, word=wanted.place)
    upright = axis_around(ys, wanted.tick)
    return _Frame(x, upright, 15.0 + _LETTER * max(len(upright.word(tick)) for tick in upright.ticks))


def _axes(frame: _Frame, wanted: Chart) -> list[Markup]:
    drawn, bottom = [], TALL - _BOTTOM
    every = 2 if len(frame.y.ticks) > 7 else 1
    for number, tick in enumerate(frame.y.ticks):
        y = frame.down(tick)
        drawn.append(tag("line", x1=frame.left, x2=WIDE - _RIGHT, y1=y, y2=y, class_="grid" if number else "axis"))
        if number % every == 0:
            drawn.append(tag("text", frame.y.word(tick), x=frame.left - 6, y=y + 4, text_anchor="end"))
    words = [wanted.places[int(tick)] if wanted.places else wanted.place(tick) for tick in frame.x.ticks]
    widest = max((len(word) for word in words), default=1) * _LETTER + 8
    room = (WIDE - frame.left - _RIGHT) / max(1, len(words))
    every = max(1, math.ceil(widest / room))
    for number, (tick, word) in enumerate(zip(frame.x.ticks, words, strict=True)):
        if number % every == 0:
            drawn.append(_tick_word(frame.across(tick), bottom + 15, word))
    return [*drawn, tag("text", wanted.under, x=(WIDE + frame.left) / 2, y=TALL - 4, text_anchor="middle")]


def _tick_word(x: float, y: Number, word: str) -> Markup:
    """In the middle below its place, and within the picture."""
    half = len(word) * _LETTER / 2
    return tag("text", word, x=round(min(max(x, half), WIDE - half), 1), y=y, text_anchor="middle")


def _level(frame: _Frame, value: float) -> Markup:
    y = frame.down(value)
    return tag("line", x1=frame.left, x2=WIDE - _RIGHT, y1=y, y2=y, class_="level")


def _series(frame: _Frame, one: Series, wanted: Chart) -> list[Content]:
    known = _known(one)
    points = [(frame.across(x), frame.down(y)) for _, x, y in known]
    colour = css_colour(one.colour)
    drawn: list[Content] = []
    if one.line and len(known) > 1:
        drawn.append(_path(known, points, colour, "series faint" if one.faint else "series"))
    if one.errors:
        drawn += [_error_bar(frame, x, y, one.errors[i] or 0.0, colour) for i, x, y in known if one.errors[i]]
    if one.faint or (one.line and len(known) > 80):
        return drawn
    radius = 2 if one.small or len(known) > 40 else 3
    for (_, x, y), (across, down) in zip(known, points, strict=True):
        at = wanted.places[round(x)] if wanted.places else wanted.place(x)
        told = tag("title", f"{one.tip or one.name}, {wanted.under} {at}: {wanted.word(y)}")
        drawn.append(
            tag("circle", told, cx=across, cy=down, r=radius, fill=colour, class_="run" if one.small else "dot")
        )
    return drawn


def _path(
    known: Sequence[tuple[int, float, float]], points: Sequence[tuple[float, float]], colour: str, kind: str
) -> Markup:
    """One line, broken where a value is missing."""
    parts, before = [], None
    for (place, _, _), (x, y) in zip(known, points, strict=True):
        parts.append(f"{'L' if before is not None and place == before + 1 else 'M'}{x:g} {y:g}")
        before = place
    return tag("path", d="".join(parts), stroke=colour, class_=kind)


def _error_bar(frame: _Frame, x: float, y: float, error: float, colour: str) -> Markup:
    across, low, high = frame.across(x), frame.down(y - error), frame.down(y + error)
    d = f"M{across:g} {low:g}V{high:g}M{across - 4:g} {low:g}h8M{across - 4:g} {high:g}h8"
    return tag("path", d=d, stroke=colour, stroke_width=1.5, fill="none")


def _legend(wanted: Chart) -> Markup | None:
    named: dict[str, str] = {}
    for one in wanted.series:
        if one.name:
            named.setdefault(one.name, css_colour(one.colour))
    entries = [tag("li", tag("span", style=f"background:{colour}"), name) for name, colour in named.items()]
    if wanted.level:
        entries.append(tag("li", tag("span", class_="dashed"), f"{wanted.level[0]} {wanted.word(wanted.level[1])}"))
    return tag("ul", entries, class_="legend") if wanted.legend and len(entries) > 1 else None


def css_colour(number: int) -> str:
    """One of COLOURS, from the first again after the last."""
    return "#{:02x}{:02x}{:02x}".format(*COLOURS[number % len(COLOURS)])
