"""Windows along a long video, each predicted as a segment of it is: decoded by a seek, its frames by the sampling of the run.

window 4, stride 2, a video of 11 s      |----|              the last one ends with the video
                                           |----|
                                             |----|
                                               |----|
                                                |----|
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from vcache.extract.datasets.base import Video
from vcache.extract.video import Segment, VideoError
from vcache.pipelines.decoding import Decoder
from vcache.pipelines.prediction.stream import VideoScores
from vcache.pipelines.prediction.video_model import VideoModel

SEEKABLE = (".mp4", ".mov", ".m4v", ".mkv", ".webm")
"""Files that usually are decoded from a key frame; of others each window costs decoding from the first frame."""

_ROUNDING = 1e-6


NO_WINDOWS = "no_windows"
"""Kind of the VideoError of a file that has no windows; the other kinds are those of extract/video.py."""


class WindowError(ValueError):
    """Windows that cannot be cut of what was named."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """What a head says along a video: W windows, K classes."""

    video: Video
    class_names: tuple[str, ...]
    starts: Float[np.ndarray, " W"]
    stops: Float[np.ndarray, " W"]
    """Seconds from the first frame, half-open."""
    probabilities: Float[np.ndarray, "W K"]
    """NaN of a window that could not be decoded."""
    failures: tuple[VideoError | None, ...]
    """Of each window."""

    def best(self, window: int) -> int | None:
        """The most probable class; None of a window that could not be decoded."""
        return None if self.failures[window] else int(self.probabilities[window].argmax())

    @property
    def stretches(self) -> list[tuple[int, int, int | None]]:
        """Windows in a row with the same most probable class: first, last (inclusive), class."""
        found: list[tuple[int, int, int | None]] = []
        for window in range(len(self.starts)):
            best = self.best(window)
            if found and found[-1][2] == best:
                found[-1] = (found[-1][0], window, best)
            else:
                found.append((window, window, best))
        return found

    @classmethod
    def of(cls, model: VideoModel, video: Video, windows: Sequence[VideoScores]) -> "Timeline":
        """Of the scores of its windows, in order."""
        segments = [one.video.segment for one in windows]
        probabilities = np.full((len(windows), len(model.class_names)), np.nan)
        for row, one in enumerate(windows):
            if one.scores is not None:
                probabilities[row] = model.probabilities(one.scores.double().unsqueeze(0))[0].numpy()
        return cls(
            video=video,
            class_names=model.class_names,
            starts=np.array([segment.start for segment in segments if segment], dtype=np.float64),
            stops=np.array([segment.stop for segment in segments if segment], dtype=np.float64),
            probabilities=probabilities,
            failures=tuple(one.failure for one in windows),
        )


def window_bounds(duration: float, window: float, stride: float) -> list[tuple[float, float]]:
    """(start, stop) in seconds: every `stride` while they lie within the video, and at last one that ends with it.

    A video not longer than a window is one window.
    """
    if duration <= window + _ROUNDING:
        return [(0.0, window)]
    num_whole = math.floor((duration - window) / stride + _ROUNDING) + 1
    starts = [number * stride for number in range(num_whole)]
    if starts[-1] + window < duration - _ROUNDING:
        starts.append(duration - window)
    return [(start, start + window) for start in starts]


def cut_windows(model: VideoModel, decoder: Decoder, video: Video, window: float, stride: float) -> tuple[Video, ...]:
    """The windows of a video, as videos of their own.

    Raises:
        VideoError: the video cannot be used, or (NO_WINDOWS) nothing says how long a frame of it is shown.
        WindowError: it is a segment already, or windows begin more often than frames.
    """
    if video.segment is not None:
        raise WindowError(f"{video.video_id} is a segment of a file. Name the file to predict windows of all of it.")
    (view, *_) = model.views()
    begin = replace(video, segment=Segment(0.0, _ROUNDING, "seconds"))  # the first frame, and what is told of all
    decoded = decoder.decode(
        model.extractor.request(begin, (view.clip_rule(model.extractor.sampling, video.video_id),))
    )
    if not decoded.fps:
        raise VideoError(
            NO_WINDOWS, "the file does not say how many frames are shown in a second: predict it without --window"
        )
    if stride * decoded.fps < 1 - _ROUNDING:
        raise WindowError(
            f"{video.video_id} has {decoded.fps:g} frames in a second, and --stride {stride:g} would begin several windows with "
            f"each. Say at least --stride {math.ceil(1000 / decoded.fps) / 1000:g}."
        )
    bounds = window_bounds(decoded.num_video_frames / decoded.fps, window, stride)
    return tuple(
        replace(video, video_id=f"{video.video_id} {start:g}-{stop:g} s", segment=Segment(start, stop, "seconds"))
        for start, stop in bounds
    )
