"""The drawn pictures: seeded, the same in any company, each shape itself, and captions that say what is there."""

import math

import numpy as np
import pytest
import torch

from vcache.pipelines.demo.shapes import BACKGROUNDS, COLOUR_NAMES, COLOURS, SHAPES, Scene, Sprite, draw
from vcache.pipelines.demo.stills import (
    COMBINATIONS,
    HELD_OUT,
    SEEN,
    Difficulty,
    combination_name,
    draw_stills,
    random_still,
)


def one_of_each_shape(*, angle: float = 0.0, alpha: float = 1.0) -> Scene:
    N = len(SHAPES)
    sprite = Sprite(
        shape=torch.arange(N),
        rgb=torch.ones(N, 3),
        centre_x=torch.zeros(N),
        centre_y=torch.zeros(N),
        size=torch.full((N,), 0.7),
        angle=torch.full((N,), angle),
        alpha=torch.full((N,), alpha),
    )
    return Scene(
        background=torch.zeros(N, dtype=torch.int64),
        background_numbers=torch.zeros(N, 10),
        sprites=(sprite,),
        shake=torch.zeros(N, 2),
        gain=torch.ones(N),
        noise=torch.zeros(N),
    )


def bright(scene: Scene) -> torch.Tensor:
    return (draw(scene, height=41, width=53, noise_seed=0).amin(-1) > 150).float()


def test_every_shape_has_an_outline_of_its_own_and_about_the_same_area() -> None:
    masks = bright(one_of_each_shape())
    areas = masks.sum((1, 2))
    assert 0.3 * areas.max() < areas.min()
    overlap = torch.einsum("nhw,mhw->nm", masks, masks) / (areas[:, None] + areas)
    assert (2 * overlap).fill_diagonal_(0).max() < 0.92  # Dice; 1 would be the same outline


def test_shapes_are_upright_and_turn_clockwise_with_the_angle() -> None:
    upright, turned = bright(one_of_each_shape()), bright(one_of_each_shape(angle=math.pi / 2))
    square, triangle, moon = (SHAPES.index(name) for name in ("square", "triangle", "moon"))
    assert upright[triangle, :20].sum() < upright[triangle, 21:].sum()  # the point is above
    assert turned[triangle, :, 27:].sum() < turned[triangle, :, :26].sum()  # and then on the right
    assert upright[moon, :, :26].sum() > upright[moon, :, 27:].sum()  # the bite is on the right
    torch.testing.assert_close(turned[square], upright[square])


def test_a_transparent_sprite_leaves_the_background() -> None:
    assert bright(one_of_each_shape(alpha=0.0)).sum() == 0


def test_a_picture_does_not_depend_on_the_pictures_beside_it_or_on_the_threads() -> None:
    rng = np.random.default_rng(3)
    stills = [random_still(rng, COMBINATIONS) for _ in range(40)]
    assert {still.background for still in stills} == set(range(len(BACKGROUNDS)))
    assert {len(still.objects) for still in stills} == {1, 2}
    first = draw_stills(stills, noise_seed=1)
    torch.set_num_threads(2)  # the conftest sets one again
    again = draw_stills(stills, noise_seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_stills(stills, noise_seed=2))
    assert torch.equal(first[:1], draw_stills(stills[:1], noise_seed=1))


def test_the_named_colour_is_in_the_middle_of_the_first_object() -> None:
    rng = np.random.default_rng(0)
    easy = Difficulty(two_objects=0.0, smallest=0.45, spread=0.0, full_caption=False)
    solid = [pair for pair in COMBINATIONS if SHAPES[pair[0]] in ("circle", "square", "star")]
    stills = [random_still(rng, [pair], easy) for pair in solid]
    middle = draw_stills(stills)[:, 30:34, 30:34].float().mean((1, 2))
    colours = torch.tensor(list(COLOURS.values())).float()
    # Angles between colours, since the brightness of a picture varies.
    nearest = (middle / middle.norm(dim=1, keepdim=True)) @ (colours / colours.norm(dim=1, keepdim=True)).T
    assert nearest.argmax(1).tolist() == [colour for _, colour in solid]


def test_captions_name_the_objects_and_never_a_held_out_one_in_training() -> None:
    rng = np.random.default_rng(5)
    held_out = {combination_name(pair).split(" ", 1)[1] for pair in HELD_OUT}
    captions = []
    for index in range(300):
        still = random_still(rng, [SEEN[index % len(SEEN)]])
        captions.append(still.caption)
        for thing in still.objects:
            assert f"{COLOUR_NAMES[thing.colour]} {SHAPES[thing.shape]}" in still.caption
    assert not [caption for caption in captions if any(name in caption for name in held_out)]
    text = "\n".join(captions)
    for words in (
        "left of",
        "above",
        "and a",
        "small",
        "big",
        "in the middle",
        "at the top left",
        "striped background",
    ):
        assert words in text
    assert "  " not in text


def test_each_shape_and_each_colour_has_two_held_out_combinations() -> None:
    assert len(SEEN) == 48
    assert not set(SEEN) & set(HELD_OUT)
    for axis in (0, 1):
        assert sorted(pair[axis] for pair in HELD_OUT) == sorted([*range(8), *range(8)])


@pytest.mark.parametrize(("combination", "name"), [((7, 1), "an orange moon"), ((0, 0), "a red circle")])
def test_names_have_the_right_article(combination: tuple[int, int], name: str) -> None:
    assert combination_name(combination) == name
