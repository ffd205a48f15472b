"""Ten motions as five pairs, each motion its partner played backwards, so that only the order of the frames tells.

The exactness is by construction: a clip of the second motion of a pair is drawn as one of the first, shake, flicker and
grain included, and its frames are then reversed. Whatever ignores the order cannot be right more than half of the time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vcache.pipelines.demo.shapes import BACKGROUNDS, NUM_BACKGROUND_NUMBERS, Scene, Sprite, draw, vary_colour
from vcache.pipelines.demo.stills import COMBINATIONS, Combination

Track = Float[np.ndarray, " T"]


class UnknownName(LookupError):
    """No motion or level is called so."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """What else moves or lies about in a clip."""

    distractor: float  # how often a second, small shape lies still behind the first
    largest_shake: float  # of the camera, in half heights of the picture


LEVELS = {"easy": Level(distractor=0.0, largest_shake=0.02), "hard": Level(distractor=0.5, largest_shake=0.05)}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip that can be drawn: frame t is row t of the scene, or row T-1-t if it runs backwards."""

    motion: str
    combination: Combination
    scene: Scene
    backwards: bool
    noise_seed: int


def random_clip(
    rng: np.random.Generator, motion: str, combination: Combination, *, level: str = "easy", num_frames: int = 24
) -> Clip:
    """One clip of `motion`; from equal generators, the two motions of a pair give the same clip in the two directions.

    Raises:
        UnknownName: no such motion (MOTIONS) or level (LEVELS).
    """
    check_level(level)
    pair = _pair_of(motion)
    time = np.linspace(0, 1, num_frames)
    sprites = [_sprite(rng, combination, pair.tracks(rng, _resting(rng, time), _progress(rng, time)))]
    if rng.random() < LEVELS[level].distractor:
        sprites.insert(0, _distractor(rng, combination, time))
    scene = Scene(
        background=torch.full((num_frames,), int(rng.integers(len(BACKGROUNDS)))),
        background_numbers=_tensor(rng.random(NUM_BACKGROUND_NUMBERS)).expand(num_frames, -1),
        sprites=tuple(sprites),
        shake=_tensor(_shake(rng, time, LEVELS[level].largest_shake)),
        gain=_tensor(rng.uniform(0.8, 1.1) + rng.choice([0, 1]) * rng.uniform(-0.2, 0.2) * (time - 0.5)),
        noise=torch.full((num_frames,), rng.uniform(0, 0.05)),
    )
    return Clip(
        motion=motion,
        combination=combination,
        scene=scene,
        backwards=motion == pair.backwards,
        noise_seed=int(rng.integers(2**31)),
    )


def check_level(level: str) -> None:
    """Raise UnknownName for a level that LEVELS lacks."""
    if level not in LEVELS:
        raise UnknownName(f"no level {level!r}; the levels are {', '.join(LEVELS)}")


def draw_clip(clip: Clip, *, height: int = 72, width: int = 96) -> UInt8[Tensor, "T height width 3"]:
    """The RGB frames of a clip."""
    frames = draw(clip.scene, height=height, width=width, noise_seed=clip.noise_seed)
    return frames.flip(0) if clip.backwards else frames


# ---------------------------------------------------------------------------------------------------------------------
# The five motions; each gets a shape at rest and a progress that rises from 0 to 1, evenly or slower at both ends.


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """Where the shape is and how it looks, frame by frame; the fields as in `Sprite`."""

    centre_x: Track
    centre_y: Track
    size: Track
    angle: Track
    alpha: Track


def _moves_right(rng: np.random.Generator, rest: Tracks, progress: Track) -> Tracks:
    return replace(rest, centre_x=_way(rng, progress), centre_y=rest.centre_y + _wobble(rng, progress))


def _moves_down(rng: np.random.Generator, rest: Tracks, progress: Track) -> Tracks:
    return replace(rest, centre_y=_way(rng, progress), centre_x=rest.centre_x + _wobble(rng, progress))


def _grows(rng: np.random.Generator, rest: Tracks, progress: Track) -> Tracks:
    smallest = rng.uniform(0.15, 0.24)
    largest = smallest * rng.uniform(1.9, 2.8)
    size = smallest + (largest - smallest) * progress
    return replace(rest, size=size, centre_x=rest.centre_x + _wobble(rng, progress))


def _circles_clockwise(rng: np.random.Generator, rest: Tracks, progress: Track) -> Tracks:
    """About one turn, at a constant speed whatever the progress, round a point near the middle."""
    time = np.linspace(0, 1, len(progress))
    angle = rng.uniform(0, 2 * math.pi) + rng.uniform(0.7, 1.3) * 2 * math.pi * time  # grows clockwise, as y goes down
    radius = rng.uniform(0.38, 0.55)
    return replace(
        rest,
        centre_x=rng.uniform(-0.12, 0.12) + radius * np.cos(angle),
        centre_y=rng.uniform(-0.12, 0.12) + radius * np.sin(angle),
        size=np.full_like(time, rng.uniform(0.2, 0.32)),
    )


def _appears(rng: np.random.Generator, rest: Tracks, progress: Track) -> Tracks:
    """Between 30% and 70% of the clip, at once or within a sixth of it."""
    time = np.linspace(0, 1, len(progress))
    alpha = np.clip((time - rng.uniform(0.3, 0.7)) / rng.choice([0.02, 0.15]) + 0.5, 0, 1)
    return replace(rest, alpha=alpha, centre_x=rest.centre_x + _wobble(rng, progress))


@dataclass(frozen=True)
class _Pair:
    forwards: str
    backwards: str
    tracks: Callable[[np.random.Generator, Tracks, Track], Tracks]


_PAIRS = (
    _Pair("moves right", "moves left", _moves_right),
    _Pair("moves down", "moves up", _moves_down),
    _Pair("grows", "shrinks", _grows),
    _Pair("circles clockwise", "circles anticlockwise", _circles_clockwise),
    _Pair("appears", "vanishes", _appears),
)
# The classes; 2i and 2i + 1 are a pair.
MOTIONS = tuple(motion for pair in _PAIRS for motion in (pair.forwards, pair.backwards))


def _pair_of(motion: str) -> _Pair:
    for pair in _PAIRS:
        if motion in (pair.forwards, pair.backwards):
            return pair
    raise UnknownName(f"no motion {motion!r}; the motions are {', '.join(MOTIONS)}")


def _resting(rng: np.random.Generator, time: Track) -> Tracks:
    def everywhere(value: float) -> Track:
        return np.full_like(time, value)

    return Tracks(
        centre_x=everywhere(rng.uniform(-0.3, 0.3)),
        centre_y=everywhere(rng.uniform(-0.3, 0.3)),
        size=everywhere(rng.uniform(0.26, 0.44)),
        angle=everywhere(rng.uniform(-0.3, 0.3)),
        alpha=everywhere(1.0),
    )


def _progress(rng: np.random.Generator, time: Track) -> Track:
    return time if rng.random() < 0.5 else time * time * (3 - 2 * time)


def _way(rng: np.random.Generator, progress: Track) -> Track:
    """At least a third of the picture, and within the square that a centre crop leaves of it."""
    length = rng.uniform(0.7, 1.2)
    return rng.uniform(-0.62, 0.62 - length) + length * progress


def _wobble(rng: np.random.Generator, progress: Track) -> Track:
    """A little to and fro, so that nothing else stands perfectly still."""
    phase = rng.uniform(0, 2 * math.pi)
    return rng.uniform(-0.04, 0.04) * np.sin(2 * math.pi * rng.uniform(0.5, 1.5) * progress + phase)


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the clip.


def _sprite(rng: np.random.Generator, combination: Combination, tracks: Tracks) -> Sprite:
    shape, colour = combination
    num_frames = len(tracks.alpha)
    return Sprite(
        shape=torch.full((num_frames,), shape),
        rgb=_tensor(vary_colour(rng, colour)).expand(num_frames, -1),
        centre_x=_tensor(tracks.centre_x),
        centre_y=_tensor(tracks.centre_y),
        size=_tensor(tracks.size),
        angle=_tensor(tracks.angle),
        alpha=_tensor(tracks.alpha),
    )


def _distractor(rng: np.random.Generator, combination: Combination, time: Track) -> Sprite:
    """Something small of another shape and another colour that lies still."""
    shape, colour = combination
    others = [(s, c) for s, c in COMBINATIONS if s != shape and c != colour]
    tracks = replace(
        _resting(rng, time),
        centre_x=np.full_like(time, rng.uniform(-0.8, 0.8)),
        centre_y=np.full_like(time, rng.uniform(-0.8, 0.8)),
        size=np.full_like(time, rng.uniform(0.1, 0.17)),
    )
    return _sprite(rng, others[int(rng.integers(len(others)))], tracks)


def _shake(rng: np.random.Generator, time: Track, largest: float) -> Float[np.ndarray, "T 2"]:
    """A swaying hand, or a tripod in a third of the clips."""
    strength = rng.choice([0, 0.02, largest])
    sways = [np.sin(2 * math.pi * (rng.uniform(0.5, 2.5) * time + rng.random())) for _ in range(2)]
    jumps = rng.standard_normal((len(time), 2))
    return strength * (np.stack(sways, 1) + 0.4 * jumps)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()
