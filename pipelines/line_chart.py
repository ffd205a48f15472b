"""Lines over a few places of an axis, with error bars, dashed levels and their names at the right. Pillow alone.

y |      o----o  first 0.81          values are drawn where they are; None leaves the place out, and the line goes on
  |  o---+----o  second 0.74
  |- - - - - - - level               a level crosses the whole chart
  +--1---3---all
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vcache.pipelines.pictures import BACKGROUND, INK, TEXT, TITLE, cut, text_width, wrapped, write

Colour = tuple[int, int, int]
Point = tuple[int, int]

RED, BLUE = (178, 24, 43), (33, 102, 172)
"""The ends of the blue and red of the heat maps."""
COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (110, 110, 110),
)  # fmt: skip
"""Of Okabe and Ito, which the colour-blind tell apart; their yellow is too pale for lines on white."""

_GRID = (215, 215, 215)
_STEP, _WIDE, _TALL, _LEFT, _MARGIN = 44, 420, 320, 56, 14
"""Pixels: between places at least, of all places at least, from low to high at least, left of the lines, around the sheet."""
_NAME, _DASH, _CAP = 260, 8, 5
"""Pixels: of a name at most, of a dash, and half the width of the ends of an error bar."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Values at the places of the axis."""

    name: str
    colour: Colour
    values: Sequence[float | None]
    errors: Sequence[float | None] = ()
    """Half the length of the bar at each place; None or nothing: no bar."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A value that does not depend on the place: a dashed line."""

    name: str
    colour: Colour
    value: float


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From low to high, with numbers beside it at these values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    word: Callable[[float], str]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


UNIT = Axis(low=0.0, high=1.0, ticks=tuple(fifth / 5 for fifth in range(6)), word="{:.1f}".format)


def axis_around(values: Sequence[float], word: Callable[[float], str] = "{:g}".format) -> Axis:
    """Of round numbers, four to eleven of them, around the values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    third = (high - low) / 3 * (1 + 1e-9)  # of 0.3 to 0.6 it is a bit below 0.1, and its logarithm is not
    power = 10.0 ** math.floor(math.log10(third))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= third)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks, word=word)


@dataclass(frozen=True)
class _Frame:
    """Where the chart lies in the picture: the pixel of low at the first place, and pixels between places and up to high."""

    left: int
    bottom: int
    step: int
    tall: int
    num_places: int
    axis: Axis

    @property
    def right(self) -> int:
        return self.left + self.step * max(1, self.num_places - 1)

    def at(self, place: int, value: float) -> Point:
        # One place alone stands in the middle.
        x = self.left + place * self.step if self.num_places > 1 else (self.left + self.right) // 2
        return x, self.y(value)

    def y(self, value: float) -> int:
        return self.bottom - round(self.tall * self.axis.share(value))


def line_chart(
    title: str,
    note: str,
    places: Sequence[str],
    under: str,
    lines: Sequence[Line],
    *,
    levels: Sequence[Level] = (),
    axis: Axis = UNIT,
) -> Image.Image:
    """The lines under a title and a note in small letters; `places` are the words at the x axis, `under` says what they are."""
    shown = [line for line in lines if any(value is not None for value in line.values)]
    names = [line.name for line in shown] + [level.name for level in levels]
    step = max(_STEP, _WIDE // max(1, len(places) - 1))
    beside = min(_NAME, max((text_width(name, TEXT) for name in names), default=0)) + 20
    width = 2 * _MARGIN + _LEFT + step * max(1, len(places) - 1) + max(beside, 150)
    titles, notes = wrapped(title, TITLE, width - 2 * _MARGIN), wrapped(note, TEXT, width - 2 * _MARGIN)
    top = _MARGIN + len(titles) * (TITLE + 8) + len(notes) * (TEXT + 5) + 20
    tall = max(_TALL, len(names) * (TEXT + 4))
    image = Image.new("RGB", (width, top + tall + 3 * TEXT + _MARGIN), BACKGROUND)
    for number, words in enumerate(titles):
        write(image, (_MARGIN, _MARGIN + number * (TITLE + 8)), words, TITLE)
    for number, words in enumerate(notes):
        write(image, (_MARGIN, _MARGIN + len(titles) * (TITLE + 8) + number * (TEXT + 5)), words)
    frame = _Frame(_MARGIN + _LEFT, top + tall, step, tall, len(places), axis)
    _draw_axes(image, frame, places, under)
    for level in levels:
        _draw_level(image, frame, level)
    for one in shown:
        _draw_line(image, frame, one)
    _write_names(image, frame, [*map(_end, shown), *((level.name, level.colour, level.value) for level in levels)])
    return image


def _draw_axes(image: Image.Image, frame: _Frame, places: Sequence[str], under: str) -> None:
    draw = ImageDraw.Draw(image)
    for number, tick in enumerate(frame.axis.ticks):
        y, words = frame.y(tick), frame.axis.word(tick)
        draw.line((frame.left, y, frame.right, y), fill=_GRID if number else INK)
        write(image, (frame.left - text_width(words, TEXT) - 10, y - TEXT // 2 - 2), words)
    for place, words in enumerate(places):
        x, _ = frame.at(place, frame.axis.low)
        write(image, (x - text_width(words, TEXT) // 2, frame.bottom + 6), words)
    write(image, (frame.left, frame.bottom + 8 + TEXT), under)


def _draw_level(image: Image.Image, frame: _Frame, level: Level) -> None:
    draw, y = ImageDraw.Draw(image), frame.y(level.value)
    for x in range(frame.left, frame.right, 2 * _DASH):
        draw.line((x, y, min(x + _DASH, frame.right), y), fill=level.colour, width=2)


def _draw_line(image: Image.Image, frame: _Frame, line: Line) -> None:
    draw = ImageDraw.Draw(image)
    known = [(place, value) for place, value in enumerate(line.values) if value is not None]
    points = [frame.at(place, value) for place, value in known]
    draw.line(points, fill=line.colour, width=3)
    for place, value in known:
        error = line.errors[place] if line.errors else None
        if error:
            (x, low), (_, high) = frame.at(place, value - error), frame.at(place, value + error)
            draw.line((x, low, x, high), fill=line.colour, width=2)
            for y in (low, high):
                draw.line((x - _CAP, y, x + _CAP, y), fill=line.colour, width=2)
    for x, y in points:
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=line.colour)


def _end(line: Line) -> tuple[str, Colour, float]:
    return line.name, line.colour, next(value for value in reversed(line.values) if value is not None)


def _write_names(image: Image.Image, frame: _Frame, ends: Sequence[tuple[str, Colour, float]]) -> None:
    """To the right of the lines, at the height of their last values, apart from each other, and none below the axis."""
    ordered = sorted(ends, key=lambda end: -end[2])
    tops: list[int] = []
    for _, _, value in ordered:
        top = frame.y(value) - TEXT // 2 - 2
        tops.append(max(top, tops[-1] + TEXT + 4) if tops else top)
    lowest = frame.bottom - TEXT
    for place in reversed(range(len(tops))):
        tops[place] = min(tops[place], lowest)
        lowest = tops[place] - TEXT - 4
    for (name, colour, _), top in zip(ordered, tops, strict=True):
        write(image, (frame.right + 12, top), cut(name, TEXT, _NAME), colour=colour)
