"""What can be asked of a trained head about one video, and what is found: for explaining*.py and the sheets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from vcache.pipelines.pictures import Tiling, percent


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
    """A backbone layer that the head reads, or "all"; None: the one that it reads last."""
    frame: int | None = None
    """Of the clip, 0-based; None: that of the patch. It and the patch are for heads that attend."""
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
class Attention:
    """What a head with a query attends to."""

    layers: tuple[LayerAttention, ...]
    cross_frame: CrossFrame | None
    """None of a clip of one frame."""


@dataclass(frozen=True, kw_only=True)
class MotionCorrelation:
    """Spearman's rank correlation, over patches and frames, of the norm of features with how much the patch changed since the
    pixel frame before. None where one of both is the same everywhere."""

    temporal: float | None
    """Of the temporal encoder, in all frames but the first."""
    temporal_at_clip_frames: float | None
    """In those of them that the backbone sees too, to compare with `spatial`."""
    spatial: float | None
    """Of the backbone."""


@dataclass(frozen=True, kw_only=True)
class LayerMagnitude:
    """L2 norms over the channels, patch by patch, of what is known at one layer of the backbone."""

    layer: int
    """Of the backbone, absolute."""
    spatial: Float[np.ndarray, "T h w"]
    """Of the frozen layer."""
    temporal: Float[np.ndarray, "F h w"]
    """Of the temporal encoder, of F = gamma*T frames; frame gamma*t is frame t of the clip."""
    correlation: MotionCorrelation


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """How large the features of a temporal encoder and of the backbone are, beside the motion in the pixels."""

    layers: tuple[LayerMagnitude, ...]
    pixels: UInt8[np.ndarray, "F S S 3"]
    pixel_index: tuple[int, ...]
    """Which frames of the video these are."""
    motion: Float[np.ndarray, "changes h w"]
    """Mean |x_t - x_(t-1)| of the pixels of a patch, of values from 0 to 1, for t = 1, 2, ..."""


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
    found: Attention | Magnitudes
    notes: tuple[str, ...]
    """What a reader has to know: other versions, other features than the stored ones, damage."""

    @property
    def title(self) -> list[str]:
        """Lines above every sheet of pictures."""
        predicted = ", ".join(f"{name} {percent(p)}" for name, p in self.predictions)
        truth = f"Ground truth: {self.truth}" if self.truth else "Ground truth: not known"
        return [self.video_id, truth, f"Prediction: {predicted}"]

    @property
    def headers(self) -> list[str]:
        """Which frame each one of the clip is."""
        return frame_headers(self.frame_index)


def frame_headers(frame_index: Sequence[int]) -> list[str]:
    """Words over frames of a clip, of which these are the numbers in the video."""
    return [f"{t}  (video frame {number})" for t, number in enumerate(frame_index)]


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
