"""A timeline as a CSV for programs, and as a picture: the probable classes along the video."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from vcache.pipelines.pictures import (
    BACKGROUND,
    INK,
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
from vcache.pipelines.prediction.windows import Timeline

_MARGIN, _NAMES, _GAP, _BAR = 16, 220, 10, 76
"""Pixels: around the sheet, of the names at most, between parts, and of the colour bar with its numbers."""
_ROW, _LEAST, _WIDE = 26, 640, 1400
"""Pixels: height of a class, and width of the time at least and at most."""
_PER_WINDOW = 8
"""Pixels of a window, where there is room."""
_MOST_CLASSES = 12
_NOT_READ = (205, 205, 205)
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)
"""Seconds between two marks of the axis."""


def clock(seconds: float, *, tenths: bool = False) -> str:
    """ "0:07", "12:30", "1:02:03", with `tenths` "0:07.5"."""
    whole = round(seconds * 10) / 10 if tenths else round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(int(minutes), 60)
    last = f"{rest:04.1f}" if tenths else f"{int(rest):02d}"
    return f"{hours}:{minutes:02d}:{last}" if hours else f"{minutes}:{last}"


def write_timeline_csv(timeline: Timeline, path: Path, num_top: int) -> None:
    """A line for each window: start and stop in seconds, the most probable class, its probability, the `num_top` most probable
    classes, why it could not be decoded, and the probability of every class."""
    names = timeline.class_names
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("start_seconds", "stop_seconds", "class", "probability", f"top{num_top}", "failure", *names))
        for window, (start, stop) in enumerate(zip(timeline.starts, timeline.stops, strict=True)):
            span = (f"{start:.3f}", f"{stop:.3f}")
            if failure := timeline.failures[window]:
                lines.writerow((*span, "", "", "", f"{failure.kind}: {failure.reason}", *[""] * len(names)))
                continue
            values = timeline.probabilities[window]
            best = np.argsort(-values, kind="stable")[:num_top]
            top = "; ".join(names[k] for k in best)
            lines.writerow(
                (*span, names[best[0]], f"{values[best[0]]:.6f}", top, "", *(f"{value:.6f}" for value in values))
            )


def shown_classes(timeline: Timeline) -> Int[np.ndarray, " n"]:
    """Those with the largest sums of probabilities, in the order of the middle of their time."""
    known = np.nan_to_num(timeline.probabilities)
    most = np.argsort(-known.sum(axis=0), kind="stable")[:_MOST_CLASSES]
    middle = (timeline.starts + timeline.stops) / 2
    weights = known[:, most] ** 2  # of classes that are never probable, the time would be that of all of the video
    centre = (weights * middle[:, None]).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)
    return most[np.argsort(centre, kind="stable")]


def draw_timeline(timeline: Timeline, model: str) -> Image.Image:
    """A row for each class, dark where it is improbable and pale where it is certain; grey is what could not be decoded."""
    shown = shown_classes(timeline)
    names = [timeline.class_names[k] for k in shown]
    beside = min(_NAMES, max(text_width(name, TEXT) for name in names))
    wide = int(np.clip(len(timeline.starts) * _PER_WINDOW, _LEAST, _WIDE))
    left = _MARGIN + beside + _GAP
    width = left + wide + _GAP + _BAR + _MARGIN
    titles = wrapped(f"{timeline.video.video_id}", TITLE, width - 2 * _MARGIN)
    note = f"Probabilities by {model} in {_windows(timeline)}"
    notes = wrapped(note, TEXT, width - 2 * _MARGIN)
    top = _MARGIN + len(titles) * (TITLE + 8) + len(notes) * (TEXT + 5) + _GAP
    tall = _ROW * len(names)
    image = Image.new("RGB", (width, top + tall + 2 * TEXT + 2 * _MARGIN), BACKGROUND)
    for number, line in enumerate(titles):
        write(image, (_MARGIN, _MARGIN + number * (TITLE + 8)), line, TITLE)
    for number, line in enumerate(notes):
        write(image, (_MARGIN, _MARGIN + len(titles) * (TITLE + 8) + number * (TEXT + 5)), line)
    image.paste(Image.fromarray(_heat(timeline, shown, wide)), (left, top))
    for number, name in enumerate(names):
        word = cut(name, TEXT, beside)
        write(image, (left - _GAP - text_width(word, TEXT), top + number * _ROW + (_ROW - TEXT) // 2 - 2), word)
    _draw_axis(image, timeline, (left, top + tall), wide)
    scale = Range(low=0.0, high=1.0, sequential=True)
    draw_range(image, scale, (left + wide + _GAP, top), max(tall, 4 * TEXT), grey=0.0)
    return image


def _windows(timeline: Timeline) -> str:
    num, length = len(timeline.starts), timeline.stops[0] - timeline.starts[0]
    if num == 1:
        return f"one window of {length:g} s"
    return f"{num} windows of {length:g} s, one every {timeline.starts[1] - timeline.starts[0]:g} s"


def _heat(timeline: Timeline, shown: Sequence[int] | np.ndarray, wide: int) -> np.ndarray:
    """(rows x _ROW, wide, 3): at every moment the window whose middle is nearest, with a line between classes."""
    window = nearest_windows(timeline, (np.arange(wide) + 0.5) / wide * timeline.stops[-1])
    values = timeline.probabilities[window][:, shown].T  # (classes, wide)
    picture = np.where(np.isnan(values)[..., None], np.uint8(_NOT_READ[0]), colours(np.nan_to_num(values)))
    picture = picture.repeat(_ROW, axis=0)
    picture[_ROW - 1 : -1 : _ROW] = 255
    return picture


def nearest_windows(timeline: Timeline, seconds: Float[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """At each moment the window whose middle is nearest, of two the earlier."""
    middle = (timeline.starts + timeline.stops) / 2
    return np.searchsorted((middle[1:] + middle[:-1]) / 2, seconds, side="left")


def _draw_axis(image: Image.Image, timeline: Timeline, corner: tuple[int, int], wide: int) -> None:
    (left, top), end = corner, float(timeline.stops[-1])
    room = wide // (text_width(clock(end), TEXT) + 24)
    step = next((step for step in _STEPS if end / step <= room), _STEPS[-1])
    draw = ImageDraw.Draw(image)
    for number in range(int(end / step) + 1):
        x = left + round(number * step / end * (wide - 1))
        draw.line((x, top, x, top + 5), fill=INK)
        word = clock(float(number * step))
        write(
            image,
            (max(left, min(x - text_width(word, TEXT) // 2, left + wide - text_width(word, TEXT))), top + 8),
            word,
        )
