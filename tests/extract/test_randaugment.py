"""What is drawn: timm's operations at timm's strengths, as often as the recipe says, the same for all frames or not."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from timm.data import auto_augment as timm_augment

from vcache.extract.operations import CODES
from vcache.extract.randaugment import ColourJitter, RandAugment, draw_erasing, draw_grey

T, H, W = 3, 90, 130
NAMES = {code: name for name, code in CODES.items()}
# timm's name with and without "increasing".
TIMM = {
    "rotate": "Rotate", "posterize": "Posterize", "solarize": "Solarize", "solarize_add": "SolarizeAdd",
    "colour": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness",
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip


def timm_arguments(name: str, magnitude: float, increasing: bool) -> set[float]:
    """Everything that timm's operation may be done with at this magnitude; translations in pixels."""
    level_fn = timm_augment.LEVEL_TO_ARG.get(
        TIMM[name] + "Increasing" if increasing else TIMM[name], timm_augment.LEVEL_TO_ARG[TIMM[name]]
    )
    if level_fn is None:
        return {0.0}
    size = {"translate_x": W, "translate_y": H}.get(name, 1)
    values = [level_fn(magnitude, {}) for _ in range(40)]
    return {round(size * (value[0] if isinstance(value, tuple) else value), 3) for value in values}


@pytest.mark.parametrize("operations", ["plain", "increasing"])
@pytest.mark.parametrize("magnitude", [0.0, 3.4, 7.0, 10.0])
def test_operations_and_strengths_are_timms(operations: str, magnitude: float) -> None:
    recipe = RandAugment(num_ops=400, magnitude=magnitude, magnitude_std=0.0, probability=1.0, operations=operations)
    found: dict[str, set[float]] = defaultdict(set)
    for code, argument, *spare in recipe.draw(random.Random(4), num_frames=1, height=H, width=W)[0]:
        found[NAMES[int(code)]].add(round(float(argument), 3))
        assert not any(spare)
    names = timm_augment.rand_augment_choices("", increasing=operations == "increasing")
    assert {TIMM[name] for name in found} == {name.removesuffix("Increasing") for name in names}
    for name, arguments in found.items():
        expected = timm_arguments(name, magnitude, operations == "increasing")
        assert sorted(arguments) == pytest.approx(sorted(expected), abs=2e-3), name


def test_each_operation_is_done_half_of_the_time_and_drawn_evenly() -> None:
    codes = RandAugment(num_ops=6000).draw(random.Random(5), num_frames=1, height=H, width=W)[0, :, 0]
    counts = Counter(NAMES[int(code)] for code in codes)
    assert counts.pop("none") == pytest.approx(3000, rel=0.06)
    assert len(counts) == 15 and all(count == pytest.approx(200, rel=0.3) for count in counts.values())


def test_magnitudes_spread_around_theirs_and_are_cut() -> None:
    def degrees(**fields: float) -> np.ndarray:
        rows = RandAugment(num_ops=6000, probability=1.0, **fields).draw(
            random.Random(6), num_frames=1, height=H, width=W
        )
        return np.abs(rows[0, rows[0, :, 0] == CODES["rotate"], 1])

    assert degrees(magnitude=7.0).mean() == pytest.approx(21, abs=0.3)
    assert degrees(magnitude=7.0).std() == pytest.approx(1.5, abs=0.2)
    assert degrees(magnitude=9.8, magnitude_std=2.0).max() == 30


def test_absolute_operations_are_those_of_pytorch_randaugment() -> None:
    recipe = RandAugment(
        num_ops=600, magnitude=9.0, max_magnitude=30.0, magnitude_std=0.0, probability=1.0, operations="absolute"
    )
    found: dict[str, set[float]] = defaultdict(set)
    for code, argument, *_ in recipe.draw(random.Random(7), num_frames=1, height=H, width=W)[0]:
        found[NAMES[int(code)]].add(round(float(argument), 3))
    fills = found.pop("fill")
    assert len(found) == 15 and len(fills) > 10
    # val = 9 / 30 * (max - min) + min of its table; translations in pixels.
    table = {"translate_x": {-30, 30}, "solarize": {76}, "posterize": {1}, "colour": {0.64}, "shear_y": {-0.09, 0.09}}
    assert {name: found[name] for name in table} == table


def test_a_filled_square_lies_in_the_frame() -> None:
    recipe = RandAugment(num_ops=900, magnitude=10.0, magnitude_std=0.0, probability=1.0, operations="absolute")
    rows = recipe.draw(random.Random(8), num_frames=1, height=H, width=W)[0]
    fills = rows[rows[:, 0] == CODES["fill"], 1:]
    assert (fills >= 0).all() and (fills[:, 2:] > 0).all() and fills[:, 2:].max() == 40
    assert (fills[:, 0] + fills[:, 2] <= H).all() and (fills[:, 1] + fills[:, 3] <= W).all()


def test_frames_share_their_operations_unless_each_has_its_own() -> None:
    shared = RandAugment().draw(random.Random(9), num_frames=T, height=H, width=W)
    own = RandAugment(per_frame=True, probability=1.0).draw(random.Random(9), num_frames=T, height=H, width=W)
    assert shared.shape == own.shape == (T, 4, 5)
    assert (shared == shared[0]).all()
    assert len({tuple(map(tuple, frame)) for frame in own}) == T


def test_jitter_is_four_operations_in_any_order_within_their_range() -> None:
    drawn = [ColourJitter(per_frame=True).draw(random.Random(seed), num_frames=T) for seed in range(300)]
    done = [rows for rows in drawn if rows.any()]
    assert len(done) == pytest.approx(0.8 * 300, rel=0.1)
    frames = np.concatenate(done)
    assert {tuple(sorted(codes)) for codes in frames[:, :, 0]} == {(8.0, 9.0, 10.0, 16.0)}
    assert len({tuple(codes) for codes in frames[:, :, 0]}) == 24
    for name, low, high in [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("colour", 0.8, 1.2), ("hue", -0.1, 0.1)]:
        values = frames[frames[..., 0] == CODES[name]][:, 1]
        assert low <= values.min() < low + 0.02 and high - 0.02 < values.max() <= high
    same = ColourJitter(probability=1.0).draw(random.Random(1), num_frames=T)
    assert (same == same[0]).all()


def test_grey_and_erasing_are_as_frequent_and_as_large_as_said() -> None:
    assert sum(draw_grey(random.Random(i), 0.2, num_frames=T).any() for i in range(400)) == pytest.approx(80, rel=0.2)
    boxes = [draw_erasing(random.Random(i), 0.25, num_frames=T, image_size=64) for i in range(800)]
    erased = np.array([rows[0, 0, 1:] for rows in boxes if rows.any()])
    assert len(erased) == pytest.approx(200, rel=0.2)
    assert (erased[:, :2] >= 0).all() and (erased[:, :2] + erased[:, 2:] <= 64).all()
    areas = erased[:, 2] * erased[:, 3] / 64**2
    assert areas.min() > 0.015 and areas.max() < 0.34


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="operations 'all' are not known; choose from: plain, increasing, absolute"):
        RandAugment(operations="all")
    with pytest.raises(ValueError, match=r"num_ops \(0\) must be at least 1, magnitude \(7\) from 0 to 10"):
        RandAugment(num_ops=0)
