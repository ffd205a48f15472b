"""What is asked of a video and what comes back: the words that decoders, decode processes and the pipeline share.

No decoder is loaded here: what a request and an answer are does not depend on who decodes.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from vcache.extract.sampling import FrameRule

KINDS = (
    "missing",  # no such file, or it may not be read
    "empty",  # zero bytes
    "not_video",  # no container that FFmpeg knows
    "no_video_stream",  # sound only, or a container without streams
    "no_frames",  # a video stream without a frame to show
    "decode_error",  # the decoder gave up
    "frame_count",  # far fewer frames than packets, without an error
    "corrupt_frames",  # decoded, but the decoder had to invent parts of the picture
    "truncated",  # the file ends before its container says
    "timeout",  # the decode process gave no answer in time
    "worker_crash",  # the decode process died
)
"""What can be wrong with a video, for `VideoError.kind`."""

_MAX_REASON_CHARS = 200
_TIME_ERROR = 1e-6
"""Seconds. Times are written in decimals, and kept in ticks: 0.1 s is the frame at 0.1000000001 s and not the next."""


class VideoError(Exception):
    """A video that cannot be used: `.kind` is one of KINDS, `.reason` one line of at most 200 characters."""

    def __init__(self, kind: str, reason: str) -> None:
        lines = reason.strip().splitlines() or [""]
        self.kind, self.reason = kind, lines[0][:_MAX_REASON_CHARS]
        super().__init__(f"{kind}: {self.reason}")

    def __reduce__(self) -> tuple[type["VideoError"], tuple[str, str]]:
        return type(self), (self.kind, self.reason)


class Damage:
    """What is found wrong with one video: the first finding is raised, or kept where a part of a video will do."""

    def __init__(self, *, allow_partial: bool) -> None:
        self._allow_partial = allow_partial
        self.first: VideoError | None = None

    def report(self, error: VideoError) -> None:
        """Raise the error, or remember it."""
        if not self._allow_partial:
            raise error
        self.first = self.first or error


@dataclass(frozen=True)
class Segment:
    """A stretch of a video, from `start` up to and not including `stop`, in frames of the video (0-based) or in seconds."""

    start: int | float
    stop: int | float
    unit: Literal["frames", "seconds"]

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"segment {self.start:g} to {self.stop:g}: must begin at 0 or later and end after that")

    def frames(self, times: Sequence[int | float] | np.ndarray) -> range:
        """Which frames of a video these are; at least one.

        In frames the segment must lie within the video. In seconds it takes the frames whose display begins within it; its
        end may lie beyond that of the video, as rounded annotations often do; its start may not.

        Args:
            times: when each frame of the video is shown, in seconds after the first, ascending.

        Raises:
            VideoError: "frame_count", the segment lies beyond the end.
        """
        if self.unit == "frames":
            first, stop = math.ceil(self.start), math.ceil(self.stop)
            if (last := max(stop, first + 1)) > len(times):
                raise VideoError(
                    "frame_count", f"the segment ends at frame {last}, and the video has {len(times)} frames"
                )
        else:
            first, stop = (bisect.bisect_left(times, second - _TIME_ERROR) for second in (self.start, self.stop))
            if self.start > (end := times[-1] + (times[-1] - times[-2] if len(times) > 1 else 0)) + _TIME_ERROR:
                raise VideoError(
                    "frame_count",
                    f"the segment begins at {self.start:.3f} s, and the last of {len(times)} frames ends at {end:.3f} s",
                )
            first = min(first, len(times) - 1)
        return range(first, max(stop, first + 1))


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """The frames that are wanted of one video. Every clip comes from the same pass over the file."""

    path: Path
    clips: tuple[FrameRule, ...]
    segment: Segment | None = None
    """The clips are of this stretch, as if it were the whole video; None is the whole video."""
    allow_partial: bool = False
    """Take a damaged video for what can be decoded of it, instead of refusing it."""
    decoder: str = "pyav"
    """One of `list_decoders()`; a folder of frames is read by "images" whatever is said here."""

    def resolve(
        self, num_frames: int, times: Sequence[int | float] | np.ndarray
    ) -> tuple[range, tuple[tuple[int, ...], ...]]:
        """The frames of the segment, and those of each clip, for a video of so many frames that are shown at these seconds.

        Raises:
            VideoError: "frame_count", the segment lies beyond the end.
        """
        segment = range(num_frames) if self.segment is None else self.segment.frames(times)
        return segment, tuple(tuple(segment[i] for i in rule.indices(len(segment))) for rule in self.clips)


@dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """The distinct frames of all clips that were asked for, upright."""

    frames: UInt8[np.ndarray, "F H W 3"]
    """RGB, C-contiguous, rotation applied, each frame once, ascending; pixel aspect ratio is ignored, as usual for Kinetics."""
    numbers: tuple[int, ...]
    """Which frame of the whole video each of them is, in display order, 0-based."""
    clips: tuple[tuple[int, ...], ...]
    """Of each clip the frames of the whole video that it takes, ascending, repeats allowed; all are among `numbers`."""
    num_video_frames: int
    """Frames that the whole video shows; those hidden by an edit list are not counted. Of a damaged one, those decoded."""
    fps: float | None
    """Frames per second on average by the header; None if it does not say."""
    first_frame: int = 0
    """Where the segment begins: frame i of the segment is frame `first_frame + i` of the whole video."""
    damage: VideoError | None = None
    """What is wrong with the video, of which this is a part; None if nothing is."""

    def clip(self, number: int) -> UInt8[np.ndarray, "T H W 3"]:
        """The frames of one clip, C-contiguous; the memory of `frames` itself if the clip is all of them."""
        return self.pick(self.clips[number])

    def pick(self, numbers: Sequence[int]) -> UInt8[np.ndarray, "T H W 3"]:
        """These frames of the video, which have to be among `numbers`."""
        if tuple(numbers) == self.numbers:
            return self.frames
        place = {frame: i for i, frame in enumerate(self.numbers)}
        return self.frames[[place[frame] for frame in numbers]]


def distinct_frames(clips: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The frames of all clips, each once, ascending."""
    return tuple(sorted({frame for clip in clips for frame in clip}))
