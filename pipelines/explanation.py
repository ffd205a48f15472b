"""What can be asked of a trained head about one video, and what is found: for explaining.py and explanation_sheets.py."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from vcache.pipelines.pictures import Tiling


class ExplainError(ValueError):
    """What cannot be shown as asked: head, video, layer, frame or patch."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be looked at; None is the choice that `explain` makes."""

    video: str | None = None
    """A video id, a path as the store lists it, or a file."""
    row: int | None = None
    """A row of the split, in place of `video`."""
    split: str | None = None
    layer: int | str | None = None
    """The backbone layer that a decoder layer reads, or "all"; None: that of the last decoder layer."""
    frame: int | None = None
    """Of the clip, 0-based; None: that of the patch."""
    patch: tuple[int, int] | None = None
    """Row and column; None: the patch that the query of the last shown decoder layer attends to most."""


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Two queries over the tokens of one layer, CLS first in each frame."""

    number: int
    """The decoder layer, from 1."""
    layer: int
    """Of the backbone, absolute."""
    query: Float[np.ndarray, "T N"]
    """The head's query for the whole clip; sums to 1."""
    cls: Float[np.ndarray, "T N"]
    """CLIP's own CLS query of each frame; sums to 1 in each."""

    @property
    def most_attended(self) -> tuple[int, int]:
        """(frame, patch) with the largest weight of `query`; CLS is no patch."""
        frame, patch = np.unravel_index(self.query[:, 1:].argmax(), self.query[:, 1:].shape)
        return int(frame), int(patch)


@dataclass(frozen=True, kw_only=True)
class CrossFrame:
    """The attention of one patch over those of the frames before and after; None where there is no such frame."""

    layer: int
    frame: int
    patch: tuple[int, int]
    previous: Float[np.ndarray, "h w"] | None
    next: Float[np.ndarray, "h w"] | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What was found out about one video."""

    run: Path
    head: str
    video_id: str
    split: str | None
    """None, as `row` and `truth`, of a file that the store does not list."""
    row: int | None
    truth: str | None
    predictions: tuple[tuple[str, float], ...]
    """The first classes with their probabilities."""
    images: UInt8[np.ndarray, "T S S 3"]
    """What the backbone was given."""
    frame_index: tuple[int, ...]
    """Which frames of the video these are."""
    tiling: Tiling
    layers: tuple[LayerAttention, ...]
    cross_frame: CrossFrame | None
    """None of a clip of one frame."""
    notes: tuple[str, ...]
    """What a reader has to know: other versions, other features than the stored ones, damage."""


def parse_layer(word: str) -> int | str:
    """ "all" or the number of a layer."""
    if word == "all":
        return word
    try:
        return int(word)
    except ValueError as error:
        raise ExplainError(f"--layer {word}: say the number of a layer, as 11 or -1, or all.") from error


def parse_patch(word: str) -> tuple[int, int]:
    """ "3,4" as row and column."""
    try:
        row, column = (int(part) for part in word.split(","))
    except ValueError as error:
        raise ExplainError(f"--patch {word}: say row and column, as 3,4.") from error
    return row, column
