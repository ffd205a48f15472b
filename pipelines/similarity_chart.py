"""CKA with CLIP as a chart over the layers, as numbers and on the screen."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.clip_similarity import LayerSimilarity, Similarity
from vcache.pipelines.pictures import BACKGROUND, INK, TEXT, TITLE, text_width, wrapped, write

_SERIES = {"integrated": (178, 24, 43), "temporal": (33, 102, 172)}
"""Colours: the ends of the blue and red of the heat maps."""
_GRID = (215, 215, 215)
_STEP, _WIDE, _TALL, _LEFT, _RIGHT, _MARGIN = 44, 420, 320, 56, 150, 14
"""Pixels: between layers at least, of all layers at least, from 0 to 1, left and right of the lines, and around the sheet."""

Point = tuple[int, int]


def write_similarity(similarity: Similarity, out: Path | None = None) -> dict[str, Any]:
    """Write the chart, RUN/cka.png if it is not named, and the numbers beside it as JSON; returns these."""
    picture = out or Path(similarity.run) / "cka.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    described = asdict(similarity) | {"picture": str(picture)}
    described = json.loads(json.dumps(described))  # as it is read: tuples are lists
    chart(similarity).save(picture)
    picture.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def print_similarity(described: dict[str, Any]) -> None:
    """What a person reads of these numbers."""
    console.out.print(f"linear CKA of {described['head']}'s features with CLIP's", markup=False, highlight=False)
    table = Table(box=None)
    for column in ("layer", *_SERIES):
        table.add_column(column, justify="right")
    for one in described["layers"]:
        table.add_row(str(one["layer"]), *("-" if one[name] is None else f"{one[name]:.3f}" for name in _SERIES))
    console.out.print(table)
    console.out.print(f"  {_examples(described)}", soft_wrap=True, markup=False, highlight=False)
    console.out.print(f"  {described['picture']}", soft_wrap=True, markup=False, highlight=False)
    for note in described["notes"]:
        console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)


def chart(similarity: Similarity) -> Image.Image:
    """A line for each kind of features over the layers, from 0 to 1 (figure 5a of DiST)."""
    layers = similarity.layers
    step = max(_STEP, _WIDE // max(1, len(layers) - 1))
    width = 2 * _MARGIN + _LEFT + step * max(1, len(layers) - 1) + _RIGHT
    title = f"Linear CKA of the features of {similarity.head} with those of CLIP"
    lines = wrapped(title, TITLE, width - 2 * _MARGIN)
    small = wrapped(f"{similarity.run}: {_examples(asdict(similarity))}", TEXT, width - 2 * _MARGIN)
    top = _MARGIN + len(lines) * (TITLE + 8) + len(small) * (TEXT + 5) + 20
    image = Image.new("RGB", (width, top + _TALL + 3 * TEXT + _MARGIN), BACKGROUND)
    for number, line in enumerate(lines):
        write(image, (_MARGIN, _MARGIN + number * (TITLE + 8)), line, TITLE)
    for number, line in enumerate(small):
        write(image, (_MARGIN, _MARGIN + len(lines) * (TITLE + 8) + number * (TEXT + 5)), line)
    origin = (_MARGIN + _LEFT, top + _TALL)
    _draw_axes(image, [one.layer for one in layers], origin, step)
    _draw_lines(image, layers, origin, step)
    return image


def _draw_axes(image: Image.Image, layers: Sequence[int], origin: Point, step: int) -> None:
    draw, (left, bottom) = ImageDraw.Draw(image), origin
    right = left + step * max(1, len(layers) - 1)
    for fifth in range(6):
        y = bottom - round(_TALL * fifth / 5)
        draw.line((left, y, right, y), fill=INK if fifth == 0 else _GRID)
        words = f"{fifth / 5:.1f}"
        write(image, (left - text_width(words, TEXT) - 10, y - TEXT // 2 - 2), words)
    for place, layer in enumerate(layers):
        words = str(layer)
        write(image, (left + place * step - text_width(words, TEXT) // 2, bottom + 6), words)
    write(image, (left, bottom + 8 + TEXT), "layer of the backbone")


def _draw_lines(image: Image.Image, layers: Sequence[LayerSimilarity], origin: Point, step: int) -> None:
    draw, ends = ImageDraw.Draw(image), {}
    for name, colour in _SERIES.items():
        points = [
            (origin[0] + place * step, origin[1] - round(_TALL * value))
            for place, one in enumerate(layers)
            if (value := getattr(one, name)) is not None
        ]
        if not points:
            continue
        draw.line(points, fill=colour, width=3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        ends[name] = points[-1]
    _write_names(image, ends)


def _write_names(image: Image.Image, ends: dict[str, Point]) -> None:
    """To the right of the lines' ends, with their last values, apart from each other."""
    lowest = -TEXT
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        lowest = max(y - TEXT // 2 - 2, lowest + TEXT + 4)
        write(image, (x + 12, lowest), name, colour=_SERIES[name])


def _examples(described: dict[str, Any]) -> str:
    videos = console.count(described["num_videos"], "video")
    examples = {"patch": "patches", "frame": "means of frames", "clip": "means of clips"}[described["level"]]
    return f"{described['num_examples']:,} {examples} of {videos} of {described['split']}"
