"""Every operation against Pillow's, and whole clips against frame by frame."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as pil_functional

from vcache.extract.operations import BOX_COLOUR, CODES, apply_operations, row

T, H, W = 3, 41, 58
FILL = (20, 130, 250)


def make_images(seed: int = 0, height: int = H, width: int = W) -> torch.Tensor:
    """Blocks with hard edges and some noise, over a part of the range, so that autocontrast has something to do."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(30, 220, (T, 3, height // 6 + 1, width // 6 + 1)).repeat(6, axis=2).repeat(6, axis=3)
    noise = rng.integers(-9, 10, (T, 3, height, width))
    return torch.from_numpy((blocks[:, :, :height, :width] + noise).astype(np.uint8))


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def solarize_add(image: Image.Image, added: int) -> Image.Image:
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


def hue(image: Image.Image, turns: float) -> Image.Image:
    return pil_functional.adjust_hue(image, turns)


PILLOW: dict[str, Callable[..., Image.Image]] = {
    "none": lambda image: image,
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "rotate": lambda image, degrees: image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=FILL),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": ImageOps.solarize,
    "solarize_add": solarize_add,
    "colour": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, factor: affine(image, 1, factor, 0, 0, 1, 0),
    "shear_y": lambda image, factor: affine(image, 1, 0, 0, factor, 1, 0),
    "translate_x": lambda image, pixels: affine(image, 1, 0, pixels, 0, 1, 0),
    "translate_y": lambda image, pixels: affine(image, 1, 0, 0, 0, 1, pixels),
    "hue": hue,
    "grey": lambda image: image.convert("L").convert("RGB"),
}
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "rotate": (21.0, -7.5, 0.0),
    "posterize": (1, 3, 8),  # Pillow has no 0
    "solarize": (0, 77, 256),
    "solarize_add": (0, 77, 110),
    **dict.fromkeys(("colour", "contrast", "brightness", "sharpness"), (0.1, 0.37, 1.0, 1.63, 1.9)),
    "shear_x": (0.21, -0.3),
    "shear_y": (0.21, -0.3),
    "translate_x": (17.3, -30.0),
    "translate_y": (17.3, -30.0),
    "hue": (0.1, -0.1),
}
NEAR = {"autocontrast", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def test_every_operation_but_fill_has_an_oracle() -> None:
    assert set(CODES) == {*PILLOW, "fill"}


@pytest.mark.parametrize("name", sorted(PILLOW))
def test_operation_is_pillows(name: str) -> None:
    images = make_images()
    for arguments in [(argument,) for argument in ARGUMENTS.get(name, ())] or [()]:
        operations = np.tile(np.array(row(name, *arguments), np.float32), (T, 1, 1))
        ours = apply_operations(images, operations, FILL).permute(0, 2, 3, 1).numpy()
        for frame, image in zip(ours, images.permute(0, 2, 3, 1).numpy(), strict=True):
            expected = np.asarray(PILLOW[name](Image.fromarray(image), *arguments)).astype(int)
            difference = np.abs(frame.astype(int) - expected)
            if name == "hue":  # Pillow's has 256 steps
                assert difference.mean() < 1 and difference.max() <= 11
            else:
                assert difference.max() <= (name in NEAR), arguments
                assert difference.mean() < 0.1, arguments


def test_fill_paints_the_box_and_nothing_else() -> None:
    images = make_images()
    painted = apply_operations(images, np.tile(np.array(row("fill", 5, 7, 11, 13), np.float32), (T, 1, 1)))
    inside = torch.zeros(H, W, dtype=torch.bool)
    inside[5:16, 7:20] = True
    assert (painted[:, :, inside] == torch.tensor(BOX_COLOUR)[:, None]).all()
    assert torch.equal(painted[:, :, ~inside], images[:, :, ~inside])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(sorted(ARGUMENTS)), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_a_clip_at_once_is_frame_by_frame_and_leaves_its_input_alone(names: list[str], seed: int, same: bool) -> None:
    images = make_images(seed)
    before = images.clone()
    rows = [[row(name, ARGUMENTS[name][0 if same else i % 2]) for name in names] for i in range(T)]
    operations = np.array(rows, np.float32)
    at_once = apply_operations(images, operations)
    one_by_one = [apply_operations(images[i : i + 1], operations[i : i + 1]) for i in range(T)]
    assert torch.equal(at_once, torch.cat(one_by_one)) and torch.equal(images, before)


def test_codes_are_those_that_stores_hold() -> None:
    assert (CODES["none"], CODES["rotate"], CODES["brightness"], CODES["fill"]) == (0, 4, 10, 18)
    assert row("fill", 1, 2, 3, 4) == (18, 1, 2, 3, 4) and row("rotate", -9.5) == (4, -9.5, 0, 0, 0)
