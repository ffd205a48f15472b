"""Heat maps over frames: a colour scale, overlays, marked patches and sheets of labelled pictures. Pillow alone.

A map of weights is drawn from 0 to a stated largest value, never stretched: an even map is evenly bright. Values that are never
near 0 are drawn over a stated range.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

# Nine of the 256 colours of magma (matplotlib, CC0), from black to pale yellow: lightness grows all the way.
_MAGMA = np.array(
    [
        (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122),
        (229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191),
    ],
    dtype=np.float64,
)  # fmt: skip
# The 11 classes of RdBu (ColorBrewer, Apache licence) the other way round: blue, white, red; told apart by the colour-blind, too.
_BLUE_RED = np.array(
    [
        (5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240), (247, 247, 247),
        (253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43), (103, 0, 31),
    ],
    dtype=np.float64,
)  # fmt: skip
_FRAME_SHARE = 0.35
"""Of the frame, in grey, in an overlay; the rest is the colour of the map."""

COLUMNS = 8
"""Frames beside each other; longer clips go on below."""

BACKGROUND, INK, MARK = (255, 255, 255), (20, 20, 20), (255, 40, 40)
TEXT, TITLE = 14, 18
"""Heights of letters in pixels."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Where the patches lie in a square frame, in pixels of the backbone's input."""

    grid: tuple[int, int]
    """Patches: rows, columns."""
    patch: tuple[int, int]
    """Height and width of one; a border that no patch covers is to the right and at the bottom."""

    def box(self, row: int, column: int, factor: int = 1) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a patch, the last two exclusive, in a frame enlarged by the factor."""
        height, width = self.patch[0] * factor, self.patch[1] * factor
        return column * width, row * height, (column + 1) * width, (row + 1) * height


@dataclass(frozen=True, kw_only=True)
class Range:
    """Colours from `low` to `high`; values beyond have the colour of that end."""

    low: float
    high: float
    sequential: bool = False
    """From black to pale, as weights are; else small is blue, large is red, and the mean of both ends white."""

    @classmethod
    def of(cls, values: Float[np.ndarray, "*shape"], *, beyond: float = 0.01) -> "Range":
        """With this share of the values beyond each end: a few outliers do not take the colours from the others."""
        low, high = np.quantile(values, [beyond, 1 - beyond])
        return cls(low=float(low), high=float(high))

    def places(self, values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """0 at the low end, 1 at the high one; all 0.5 where both are the same."""
        if self.high <= self.low:
            return np.full(values.shape, 0.5)
        return (values - self.low) / (self.high - self.low)

    @property
    def palette(self) -> Float[np.ndarray, "n 3"]:
        return _MAGMA if self.sequential else _BLUE_RED


def blocks(num_frames: int) -> Iterator[slice]:
    """The frames of each line of a sheet."""
    for start in range(0, num_frames, COLUMNS):
        yield slice(start, min(start + COLUMNS, num_frames))


def enlargement(side: int, smallest: int) -> int:
    """The whole number by which a picture is at least so many pixels high."""
    return max(1, math.ceil(smallest / side))


def colours(
    values: Float[np.ndarray, "*shape"], palette: Float[np.ndarray, "n 3"] = _MAGMA
) -> UInt8[np.ndarray, "*shape 3"]:
    """The colour of each value of 0 to 1; values beyond are taken for the ends."""
    places = np.linspace(0, 1, len(palette))
    channels = [np.interp(values, places, palette[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def enlarged(frame: UInt8[np.ndarray, "S S 3"], factor: int) -> UInt8[np.ndarray, "fS fS 3"]:
    """Each pixel as a square of `factor` pixels: what the backbone sees, and nothing between."""
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def overlay(
    frame: UInt8[np.ndarray, "S S 3"], weights: Float[np.ndarray, "h w"], largest: float, tiling: Tiling, factor: int
) -> UInt8[np.ndarray, "fS fS 3"]:
    """The weights of the patches, bilinear between their centres, over the dimmed frame; `largest` has the last colour."""
    return _tinted(frame, weights / max(largest, 1e-12), tiling, factor, _MAGMA, nothing=0.0)


def ranged_overlay(
    frame: UInt8[np.ndarray, "S S 3"], values: Float[np.ndarray, "h w"], scale: Range, tiling: Tiling, factor: int
) -> UInt8[np.ndarray, "fS fS 3"]:
    """The same of values that are drawn from one end of a range to the other."""
    nothing = 0.0 if scale.sequential else 0.5
    return _tinted(frame, scale.places(values), tiling, factor, scale.palette, nothing=nothing)


def _tinted(
    frame: UInt8[np.ndarray, "S S 3"],
    places: Float[np.ndarray, "h w"],
    tiling: Tiling,
    factor: int,
    palette: Float[np.ndarray, "n 3"],
    *,
    nothing: float,
) -> UInt8[np.ndarray, "fS fS 3"]:
    """`places` of the patches in the palette; `nothing` is that of a border that no patch covers."""
    grey = enlarged(frame, factor).mean(axis=-1, keepdims=True)
    heat = np.full(grey.shape[:2], nothing, dtype=np.float32)
    height, width = (n * size * factor for n, size in zip(tiling.grid, tiling.patch, strict=True))
    scaled = Image.fromarray(places.clip(0, 1).astype(np.float32))
    heat[:height, :width] = np.asarray(scaled.resize((width, height), Image.Resampling.BILINEAR))
    return (_FRAME_SHARE * grey + (1 - _FRAME_SHARE) * colours(heat, palette)).round().astype(np.uint8)


def marked(
    picture: UInt8[np.ndarray, "H W 3"], box: tuple[int, int, int, int], *, width: int
) -> UInt8[np.ndarray, "H W 3"]:
    """A copy with a red outline around the box, within it where the picture ends."""
    image = Image.fromarray(picture)
    left, top, right, bottom = box
    corners = max(0, left - width), max(0, top - width), right + width - 1, bottom + width - 1
    corners = (*corners[:2], min(corners[2], image.width - 1), min(corners[3], image.height - 1))
    ImageDraw.Draw(image).rectangle(corners, outline=MARK, width=width)
    return np.asarray(image)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the colours of a row of pictures mean."""

    largest: float
    even: float
    """What each token would have if all had the same."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures side by side, with words to their left and under each of them."""

    words: Sequence[str]
    """Lines; of one too long the end is cut off."""
    pictures: Sequence[UInt8[np.ndarray, "H W 3"] | None]
    """None leaves the place empty."""
    captions: Sequence[str] = ()
    scale: Scale | Range | None = None


_MARGIN, _GAP, _LABEL, _BAR = 12, 6, 120, 96
"""Pixels: around a sheet, between pictures, and the widths of the words to the left and of the scale to the right."""


def sheet(title: Sequence[str], header: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """All rows below each other, under a title and the words above each column. Pictures of one sheet have one size."""
    tall, wide = next(picture for row in rows for picture in row.pictures if picture is not None).shape[:2]
    width = 2 * _MARGIN + _LABEL + len(header) * (wide + _GAP) + _BAR
    lines = [line for text in title for line in wrapped(text, TITLE, width - 2 * _MARGIN)]
    top = _MARGIN + len(lines) * (TITLE + 8) + _GAP
    tops = []
    at = top + (TEXT + _GAP + 4 if any(header) else 0)
    for row in rows:
        tops.append(at)
        at += tall + _GAP + (TEXT + _GAP if row.captions else 0)
    image = Image.new("RGB", (width, at + _MARGIN - _GAP), BACKGROUND)
    for number, line in enumerate(lines):
        write(image, (_MARGIN, _MARGIN + number * (TITLE + 8)), line, TITLE)
    for column, words in enumerate(header):
        write(image, (_left(column, wide), top), cut(words, TEXT, wide))
    for row, at in zip(rows, tops, strict=True):
        _draw_row(image, row, at, tall, wide)
    return image


def wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines of whole words that are not wider than so many pixels, unless a word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [cut(line, size, width) for line in lines]


def cut(text: str, size: int, width: int) -> str:
    """The text, or its beginning and an ellipsis, in so many pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}...", size) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def text_width(text: str, size: int) -> int:
    """Pixels."""
    return round(_font(size).getlength(text))


def write(
    image: Image.Image, place: tuple[int, int], text: str, size: int = TEXT, colour: tuple[int, int, int] = INK
) -> None:
    """One line of text, its corner at the place."""
    ImageDraw.Draw(image).text(place, text, fill=colour, font=_font(size))


def percent(value: float) -> str:
    """A weight for people, in two digits or so: "18%", "2.3%", "0.07%", "<0.01%"."""
    if 0 < value < 0.00005:
        return "<0.01%"
    digits = 0 if value >= 0.0995 else 1 if value >= 0.00995 else 2
    return f"{100 * value:.{digits}f}%"


def _draw_row(image: Image.Image, row: Row, top: int, tall: int, wide: int) -> None:
    for number, line in enumerate(row.words):
        write(image, (_MARGIN, top + number * (TEXT + 5)), cut(line, TEXT, _LABEL - _GAP))
    for column, picture in enumerate(row.pictures):
        if picture is not None:
            image.paste(Image.fromarray(picture), (_left(column, wide), top))
    for column, caption in enumerate(row.captions):
        write(image, (_left(column, wide), top + tall + 2), cut(caption, TEXT, wide))
    corner = (_left(len(row.pictures), wide), top)
    if isinstance(row.scale, Scale):
        _draw_scale(image, row.scale, corner, tall)
    elif row.scale:
        draw_range(image, row.scale, corner, tall)


def _draw_scale(image: Image.Image, scale: Scale, corner: tuple[int, int], tall: int) -> None:
    """A bar from 0 at the bottom to the largest value, dimmed as the overlays are, and a line at the even value."""
    left, top = corner
    _paste_bar(image, corner, tall, _MAGMA)
    even = tall * (1 - scale.even / scale.largest) if scale.largest > scale.even else 0.0
    ticks = {0.0: percent(scale.largest), float(tall - TEXT - 2): "0"}
    for y, words in ticks.items():
        write(image, (left + 20, top + round(y)), words)
    y = top + round(min(even, tall - 1))
    ImageDraw.Draw(image).line((left - 2, y, left + 17, y), fill=INK, width=2)
    below = min(max(y - TEXT // 2, top + TEXT + 4), top + tall - 2 * TEXT - 8)
    write(image, (left + 20, below), f"even {percent(scale.even)}")


def draw_range(
    image: Image.Image, scale: Range, corner: tuple[int, int], tall: int, *, grey: float = _FRAME_SHARE
) -> None:
    """A bar with its ends, which stand for what lies beyond them too, and what is between them; with `grey` as in overlays."""
    left, top = corner
    _paste_bar(image, corner, tall, scale.palette, grey)
    ticks = {0: scale.high, (tall - TEXT) // 2: (scale.low + scale.high) / 2, tall - TEXT - 2: scale.low}
    for y, value in ticks.items():
        write(image, (left + 20, top + y), f"{value:.3g}")


def _paste_bar(
    image: Image.Image,
    corner: tuple[int, int],
    tall: int,
    palette: Float[np.ndarray, "n 3"],
    grey: float = _FRAME_SHARE,
) -> None:
    column = np.linspace(1, 0, tall)[:, None].repeat(14, axis=1)
    bar = (grey * 128 + (1 - grey) * colours(column, palette)).round().astype(np.uint8)
    image.paste(Image.fromarray(bar), corner)


def _left(column: int, wide: int) -> int:
    return _MARGIN + _LABEL + column * (wide + _GAP)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # comes with Pillow
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
