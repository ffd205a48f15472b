"""A motion is its partner played backwards, bit by bit; and each does what its name says."""

import numpy as np
import pytest
import torch

from vcache.pipelines.demo.motions import LEVELS, MOTIONS, Clip, UnknownName, draw_clip, random_clip
from vcache.pipelines.demo.stills import COMBINATIONS

PAIRS = tuple(zip(MOTIONS[::2], MOTIONS[1::2], strict=True))


def make(motion: str, seed: int, *, level: str = "easy", num_frames: int = 24) -> Clip:
    rng = np.random.default_rng(seed)
    combination = COMBINATIONS[int(rng.integers(len(COMBINATIONS)))]
    return random_clip(rng, motion, combination, level=level, num_frames=num_frames)


def track(clip: Clip, name: str) -> torch.Tensor:
    values = getattr(clip.scene.sprites[-1], name)
    return values.flip(0) if clip.backwards else values


def test_there_are_five_pairs_of_motions() -> None:
    assert len(set(MOTIONS)) == 10


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_the_partner_shows_the_same_frames_in_reverse(pair: tuple[str, str], level: str) -> None:
    """The law of the frames of a clip is thus the same in a pair, but for the order: noise, shake and all."""
    for seed in range(6):
        forwards, backwards = (
            draw_clip(make(motion, seed, level=level, num_frames=7), height=18, width=26) for motion in pair
        )
        assert forwards.shape == (7, 18, 26, 3)
        assert torch.equal(forwards, backwards.flip(0))
        assert not torch.equal(forwards, backwards)


@pytest.mark.parametrize("seed", range(12))
def test_each_motion_does_what_it_is_called(seed: int) -> None:
    def change(motion: str, name: str) -> float:
        values = track(make(motion, seed), name)
        return (values[-1] - values[0]).item()

    assert change("moves right", "centre_x") >= 0.7 - 1e-6
    assert change("moves left", "centre_x") <= -0.7 + 1e-6
    assert change("moves down", "centre_y") >= 0.7 - 1e-6  # y goes down
    assert change("moves up", "centre_y") <= -0.7 + 1e-6
    assert change("grows", "size") > 0.1
    assert change("shrinks", "size") < -0.1
    assert change("appears", "alpha") == 1
    assert change("vanishes", "alpha") == -1


@pytest.mark.parametrize(("motion", "sign"), [("circles clockwise", 1), ("circles anticlockwise", -1)])
def test_circles_turn_the_way_they_are_called(motion: str, sign: int) -> None:
    for seed in range(8):
        clip = make(motion, seed, num_frames=48)
        x, y = track(clip, "centre_x"), track(clip, "centre_y")
        velocity_x, velocity_y = x.diff(), y.diff()
        turn = velocity_x[:-1] * velocity_y[1:] - velocity_y[:-1] * velocity_x[1:]
        assert (turn.sign() == sign).all()  # right, then down: positive, and clockwise as y goes down


def test_the_shape_stays_where_a_centre_crop_keeps_it() -> None:
    for motion in MOTIONS:
        for seed in range(20):
            for name in ("centre_x", "centre_y"):
                assert track(make(motion, seed), name).abs().max() < 0.7


def test_only_the_hard_level_has_distractors_and_they_differ_in_shape() -> None:
    assert all(len(make(motion, 1).scene.sprites) == 1 for motion in MOTIONS)
    hard = [make("grows", seed, level="hard") for seed in range(60)]
    both = [clip.scene.sprites for clip in hard if len(clip.scene.sprites) == 2]
    assert 15 < len(both) < 45
    assert all((behind.shape != front.shape).all() for behind, front in both)
    assert all(behind.size.max() < front.size.max() for behind, front in both)


def test_equal_generators_make_equal_clips() -> None:
    first, again, other = (draw_clip(make("grows", seed, num_frames=5)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"no motion 'spins'; the motions are moves right, moves left,"):
        make("spins", 0)
    with pytest.raises(UnknownName, match=r"no level 'harder'; the levels are easy, hard"):
        make("grows", 0, level="harder")
