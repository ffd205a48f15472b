"""Correlation maps as a picture, as numbers and on the screen."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.markup import escape
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.class_correlation import ClassCorrelation, CorrelationMap
from vcache.pipelines.pictures import (
    BACKGROUND,
    TEXT,
    TITLE,
    Range,
    colours,
    cut,
    draw_range,
    text_width,
    wrapped,
    write,
)

_SIDE, _CELL, _LEAST_CELL = 400, 20, 2
"""Pixels: of a map about, of a cell beside which there is room for a name, and of a cell at least."""
_MARGIN, _NAMES, _BAR, _GAP = 14, 200, 76, 22
"""Pixels: around the sheet, of the names of the classes at most, of a colour bar with its numbers, and between maps."""
_TITLE = "Inter-class correlation: cosines of the embeddings of {shown}"


def default_range(one: CorrelationMap) -> Range:
    """From the least to the largest of two different classes: 1 of each class with itself would take all the colours. Up to 1
    where all are the same."""
    low, high = float(one.of_pairs.min()), float(one.of_pairs.max())
    return Range(low=low, high=high if high > low else 1.0, sequential=True)


def write_correlation(
    correlation: ClassCorrelation, out: Path, limits: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Write the picture, and the numbers beside it as JSON; returns these. `limits` are the ends of all colour bars."""
    ranges = [_range(one, limits) for one in correlation.maps]
    described = {
        "classes": list(correlation.class_names),
        "num_classes": correlation.num_classes,
        "maps": [_describe(one, scale) for one, scale in zip(correlation.maps, ranges, strict=True)],
        "picture": str(out),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_maps(correlation, ranges).save(out)
    out.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def print_correlation(described: dict[str, Any]) -> None:
    """What a person reads of these numbers."""
    title = _TITLE.format(shown=_shown(len(described["classes"]), described["num_classes"]))
    console.out.print(title, markup=False, highlight=False)
    table = Table(box=None)
    table.add_column("")
    for column in ("mean", "least", "largest", "rank corr."):
        table.add_column(column, justify="right", no_wrap=True)
    for one in described["maps"]:
        follows = one["rank_correlation_with_first"]
        numbers = [f"{one[name]:.3f}" for name in ("mean_of_pairs", "least_of_pairs", "largest_of_pairs")]
        name = escape(f"{one['source']}: {one['what']}")
        table.add_row(name, *numbers, "-" if follows is None else f"{follows:.3f}")
    console.out.print(table)
    console.out.print("  of pairs of different classes; rank correlation with the first map", highlight=False)
    console.out.print(f"  {described['picture']}", soft_wrap=True, markup=False, highlight=False)


def draw_maps(correlation: ClassCorrelation, ranges: Sequence[Range]) -> Image.Image:
    """Side by side, each with its own colours; the names of the classes are beside the rows of the first."""
    names, num = correlation.class_names, len(correlation.class_names)
    cell = max(_CELL, _SIDE // num) if num * _CELL <= 2 * _SIDE else max(_LEAST_CELL, 2 * _SIDE // num)
    beside = min(_NAMES, max(text_width(name, TEXT) for name in names)) + 10 if cell >= _CELL else 0
    side = cell * num
    width = 2 * _MARGIN + beside + len(correlation.maps) * (side + 8 + _BAR + _GAP) - _GAP
    titles = wrapped(_TITLE.format(shown=_shown(num, correlation.num_classes)), TITLE, width - 2 * _MARGIN)
    words = [_words(one, side + 8 + _BAR, first=one is correlation.maps[0]) for one in correlation.maps]
    top = _MARGIN + len(titles) * (TITLE + 8) + max(map(len, words)) * (TEXT + 5) + 8
    image = Image.new("RGB", (width, top + side + _MARGIN), BACKGROUND)
    for number, line in enumerate(titles):
        write(image, (_MARGIN, _MARGIN + number * (TITLE + 8)), line, TITLE)
    for row, name in enumerate(names if beside else ()):
        word = cut(name, TEXT, _NAMES)
        place = (_MARGIN + beside - 6 - text_width(word, TEXT), top + row * cell + (cell - TEXT) // 2 - 2)
        write(image, place, word)
    for number, (one, scale) in enumerate(zip(correlation.maps, ranges, strict=True)):
        left = _MARGIN + beside + number * (side + 8 + _BAR + _GAP)
        for row, word in enumerate(words[number]):
            write(image, (left, _MARGIN + len(titles) * (TITLE + 8) + row * (TEXT + 5)), word)
        picture = colours(scale.places(one.cosines).clip(0, 1), scale.palette)
        image.paste(Image.fromarray(picture.repeat(cell, axis=0).repeat(cell, axis=1)), (left, top))
        draw_range(image, scale, (left + side + 8, top), side, grey=0.0)
    return image


def _words(one: CorrelationMap, width: int, *, first: bool) -> list[str]:
    known = one.rank_correlation is not None and not first
    follows = f", rank correlation with the first {one.rank_correlation:.2f}" if known else ""
    said = (f"{one.source}: {one.what}", f"mean of pairs {one.mean:.2f}{follows}")
    return [line for text in said for line in wrapped(text, TEXT, width)]


def _range(one: CorrelationMap, limits: tuple[float, float] | None) -> Range:
    return Range(low=limits[0], high=limits[1], sequential=True) if limits else default_range(one)


def _describe(one: CorrelationMap, scale: Range) -> dict[str, Any]:
    return {
        "source": one.source,
        "what": one.what,
        "mean_of_pairs": one.mean,
        "least_of_pairs": float(one.of_pairs.min()),
        "largest_of_pairs": float(one.of_pairs.max()),
        "rank_correlation_with_first": one.rank_correlation,
        "range": [scale.low, scale.high],
        "cosines": np.round(one.cosines, 6).tolist(),
    }


def _shown(shown: int, there: int) -> str:
    return f"{shown} classes" + (f" of {there}" if shown < there else "")
