"""What is asked of a video and what comes back: the words that decoders, decode processes and the pipeline share.

No decoder is loaded here: what a request and an answer are does not depend on who decodes.
"""

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
)
"""What can be wrong with a video, for `VideoError.kind`."""

_MAX_REASON_CHARS = 200


class VideoError(Exception):
    """A video that cannot be used: `.kind` is one of KINDS, `.reason` one line of at most 200 characters."""

    def __init__(self, kind: str, reason: str) -> None:
        lines = reason.strip().splitlines() or [""]
        self.kind, self.reason = kind, lines[0][:_MAX_REASON_CHARS]
        super().__init__(f"{kind}: {self.reason}")

    def __reduce__(self) -> tuple[type["VideoError"], tuple[str, str]]:
        return type(self), (self.kind, self.reason)


@dataclass(frozen=True)
class Segment:
    """A stretch of a video, from `start` up to and not including `stop`, in frames of the video (0-based) or in seconds."""

    start: float
    stop: float
    unit: Literal["frames", "seconds"]

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"segment {self.start:g} to {self.stop:g}: must begin at 0 or later and end after that")


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """The frames that are wanted of one video. Every clip comes from the same pass over the file."""

    path: Path
    clips: tuple[FrameRule, ...]
    decoder: str = "pyav"
    """One of `list_decoders()`."""


@dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """The distinct frames of all clips that were asked for, upright."""

    frames: UInt8[np.ndarray, "F H W 3"]
    """RGB, C-contiguous, rotation applied, each frame once, ascending; pixel aspect ratio is ignored, as usual for Kinetics."""
    numbers: tuple[int, ...]
    """Which frame of the video each of them is, in display order, 0-based."""
    clips: tuple[tuple[int, ...], ...]
    """Of each clip the frames of the video that it takes, ascending, repeats allowed; all are among `numbers`."""
    num_video_frames: int
    """Frames that the whole video shows; those hidden by an edit list are not counted."""
    fps: float | None
    """Frames per second on average by the header; None if it does not say."""

    def clip(self, number: int) -> UInt8[np.ndarray, "T H W 3"]:
        """The frames of one clip, C-contiguous; the memory of `frames` itself if the clip is all of them."""
        return self.pick(self.clips[number])

    def pick(self, numbers: Sequence[int]) -> UInt8[np.ndarray, "T H W 3"]:
        """These frames of the video, which have to be among `numbers`."""
        if tuple(numbers) == self.numbers:
            return self.frames
        place = {frame: i for i, frame in enumerate(self.numbers)}
        return self.frames[[place[frame] for frame in numbers]]
