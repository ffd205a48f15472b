"""Frame count -> frame indices. Integers only, no video is opened.

Two rules, as the papers' code has them; all indices are 0-based and ascending, repeats are allowed, and a video of one
frame works. With T frames taken from a video of n:

    StridedSampling(num_frames=3, stride_frames=2), n = 9    . . x . x . x . .     the window is centred
                                                    n = 3    x . x(x)              the last frame is repeated
    TSNSampling(num_frames=3),                      n = 9    . x . . x . . x .     the middle of each third
                                                    n = 2    x(x)x

A head may want more frames as pixels than as features (DiST). With two pixel frames for each frame of the clip, the x are
also pixel frames, and the o are the others, halfway to the next one, rounded down:

    StridedSampling(num_frames=3, stride_frames=2), n = 9    . . x o x o x o .
                                                    n = 3    x o x(o x o)
    TSNSampling(num_frames=3),                      n = 9    . x o . x o . x o
"""

import random
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StridedSampling:
    """One window of `num_frames` frames that lie `stride_frames` apart: dense sampling.

    EVL's rule (Lin et al. 2022; its video dataset at b282e8b), which trains on 8 x 16, 16 x 16 and 32 x 8.
    """

    num_frames: int = 8
    stride_frames: int = 16

    def __post_init__(self) -> None:
        _check_positive(num_frames=self.num_frames, stride_frames=self.stride_frames)

    def indices(self, num_video_frames: int, *, view: int = 0, num_views: int = 1) -> tuple[int, ...]:
        """The evaluation rule: one view is the window in the middle, several begin evenly from first to last position.

        A video shorter than the window is padded with its last frame. 300 frames, 8 x 16, three views: the windows
        begin at 0, 94 and 187.

        Raises:
            ValueError: no frames, or no such view.
        """
        _check_view(num_video_frames, view, num_views)
        window = (self.num_frames - 1) * self.stride_frames + 1
        slack = max(num_video_frames - window, 0)
        # round() takes halves to the even neighbour, as upstream does: 93.5 is 94.
        start = slack // 2 if num_views == 1 else round(slack / (num_views - 1) * view)
        return tuple(min(start + self.stride_frames * i, num_video_frames - 1) for i in range(self.num_frames))

    def random_indices(self, num_video_frames: int, *, seed: int) -> tuple[int, ...]:
        """The training rule: a window that begins anywhere it fits.

        In a video too short for a choice it begins at 0, and the frames beyond the end repeat the last one that lies on
        the stride (the evaluation rule repeats the last of the video).
        """
        _check_positive(num_video_frames=num_video_frames)
        num_starts = num_video_frames - self.stride_frames * (self.num_frames - 1)
        if num_starts > 1:
            start = random.Random(seed).randrange(num_starts)
            return tuple(start + self.stride_frames * i for i in range(self.num_frames))
        last = (num_video_frames - 1) // self.stride_frames
        return tuple(self.stride_frames * min(i, last) for i in range(self.num_frames))

    def spacing(self, num_video_frames: int) -> Fraction:
        """Frames of the video from one of the clip to the next."""
        return Fraction(self.stride_frames)

    def to_dict(self) -> dict[str, Any]:
        """Everything that `sampling_from_dict` needs to make an equal object."""
        return {"rule": "strided", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class TSNSampling:
    """`num_frames` equal segments over the whole video, one frame of each: sparse sampling (TSN, Wang et al. 2016)."""

    num_frames: int = 8

    def __post_init__(self) -> None:
        _check_positive(num_frames=self.num_frames)

    def indices(self, num_video_frames: int, *, view: int = 0, num_views: int = 1) -> tuple[int, ...]:
        """The evaluation rule: one view takes the centre of each segment (ActionCLIP's validation, 31c34df).

        Several views move from the beginning of the segments to their end (Text4Vis' test, d61b34d), so that the middle
        one of three is the single view.

        Raises:
            ValueError: no frames, or no such view.
        """
        _check_view(num_video_frames, view, num_views)
        segment = num_video_frames / self.num_frames
        offset = (segment - 1) / 2 if num_views == 1 else (segment - 1) * view / (num_views - 1)
        # In floats and cut towards zero, in the order of upstream: exact fractions differ from it at some odd lengths.
        # The offset is above -1, so that a video of fewer frames than segments begins at 0.
        return tuple(int(i * num_video_frames / self.num_frames + offset) for i in range(self.num_frames))

    def random_indices(self, num_video_frames: int, *, seed: int) -> tuple[int, ...]:
        """The training rule: one frame anywhere in each segment, both ends included (EVL and SlowFast)."""
        _check_positive(num_video_frames=num_video_frames)
        rng = random.Random(seed)
        segment = (num_video_frames - 1) / self.num_frames
        return tuple(rng.randint(round(segment * i), round(segment * (i + 1))) for i in range(self.num_frames))

    def spacing(self, num_video_frames: int) -> Fraction:
        """The length of a segment: frames of the video from one of the clip to the next, on average."""
        return Fraction(num_video_frames, self.num_frames)

    def to_dict(self) -> dict[str, Any]:
        """Everything that `sampling_from_dict` needs to make an equal object."""
        return {"rule": "tsn", **asdict(self)}


Sampling = StridedSampling | TSNSampling


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """Which frames of a video of any length make one clip: an evaluation view of a sampling, or a random one with a seed."""

    sampling: Sampling
    view: int = 0
    """Evaluation view `view` of `num_views`; not used with a seed."""
    num_views: int = 1
    seed: int | None = None
    """Of the training rule."""

    def indices(self, num_video_frames: int) -> tuple[int, ...]:
        """Frames of the video, 0-based and ascending, repeats allowed.

        Raises:
            ValueError: no frames, or no such view.
        """
        if self.seed is not None:
            return self.sampling.random_indices(num_video_frames, seed=self.seed)
        return self.sampling.indices(num_video_frames, view=self.view, num_views=self.num_views)


@dataclass(frozen=True, kw_only=True)
class PixelRule:
    """The frames of a clip and those between them: `pixels_per_frame` for each frame of the clip, which is the first of them."""

    clip: ClipRule
    pixels_per_frame: int

    def __post_init__(self) -> None:
        _check_positive(pixels_per_frame=self.pixels_per_frame)

    def indices(self, num_video_frames: int) -> tuple[int, ...]:
        """Frames of the video, ascending; every `pixels_per_frame`-th is a frame of the clip.

        They are spread evenly from one frame of the clip to the next, and after its last one by the spacing of the sampling,
        rounded down and kept inside the video.

        Raises:
            ValueError: no frames, or no such view.
        """
        clip = tuple(Fraction(frame) for frame in self.clip.indices(num_video_frames))
        after = clip[-1] + self.clip.sampling.spacing(num_video_frames)
        num = self.pixels_per_frame
        wanted = (
            start + (stop - start) * j / num
            for start, stop in zip(clip, (*clip[1:], after), strict=True)
            for j in range(num)
        )
        return tuple(min(int(frame), num_video_frames - 1) for frame in wanted)


FrameRule = ClipRule | PixelRule
"""Anything that says which frames of a video of any length are wanted, as `.indices(num_video_frames)`."""


def sampling_from_dict(values: dict[str, Any]) -> Sampling:
    """The inverse of `.to_dict()`.

    Raises:
        ValueError: the rule is unknown.
        TypeError: a field is unknown.
    """
    rules: dict[str, type[Sampling]] = {"strided": StridedSampling, "tsn": TSNSampling}
    fields = dict(values)
    rule = fields.pop("rule", None)
    if rule not in rules:
        raise ValueError(f"sampling rule {rule!r} is not known; there are: {', '.join(rules)}")
    return rules[rule](**fields)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


def _check_view(num_video_frames: int, view: int, num_views: int) -> None:
    _check_positive(num_video_frames=num_video_frames, num_views=num_views)
    if not 0 <= view < num_views:
        raise ValueError(f"view ({view}) must be at least 0 and below num_views ({num_views})")
