"""Both modes against open_clip's own evaluation transform."""

from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from vcache.extract.preprocess import Preprocessing, from_open_clip_config

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = [(256, 340), (340, 256), (257, 341), (240, 320), (64, 64), (37, 91), (224, 301), (720, 405)]


def make_frames(height: int, width: int, num_frames: int = 3) -> np.ndarray:
    """Structure at several scales with hard edges: worse for a resizer than photographs."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.integers(0, 256, (num_frames, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    blocks = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    noise = rng.integers(-20, 21, blocks.shape)
    return np.ascontiguousarray(np.clip(blocks + noise, 0, 255).astype(np.uint8))


def upstream(frames: np.ndarray, **config: Any) -> torch.Tensor:
    transform = image_transform_v2(PreprocessCfg(mean=MEAN, std=STD, **config), is_train=False)
    return torch.stack([transform(Image.fromarray(frame)) for frame in frames])


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("config", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}])
def test_exact_mode_equals_open_clip_bit_for_bit(height: int, width: int, config: dict[str, str]) -> None:
    frames = make_frames(height, width)
    ours = Preprocessing(image_size=48, mean=MEAN, std=STD, mode="exact", **config)
    assert torch.equal(ours(frames), upstream(frames, size=48, **config))


@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize("height, width", SIZES)
def test_fast_mode_is_within_two_levels_of_open_clip(height: int, width: int, image_size: int) -> None:
    frames = make_frames(height, width)
    fast, exact = (
        Preprocessing(image_size=image_size, mean=MEAN, std=STD, mode=mode).pixels(frames).int()
        for mode in ("fast", "exact")
    )
    difference = (fast - exact).abs().float()
    assert difference.max() <= 2
    # Enlarged many times, hard edges differ by one level more often; videos are not that small.
    assert difference.mean() <= (0.005 if min(height, width) >= image_size else 0.01)


def test_fast_and_exact_mode_normalise_alike() -> None:
    frames = make_frames(40, 56)
    fast = Preprocessing(image_size=40, mean=MEAN, std=STD)
    expected = (fast.pixels(frames) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(fast(frames), expected)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_frames_are_left_alone_and_may_be_read_only(mode: str) -> None:
    frames = make_frames(30, 50)
    before = frames.copy()
    frames.setflags(write=False)
    images = Preprocessing(image_size=16, mean=MEAN, std=STD, mode=mode)(frames)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    np.testing.assert_array_equal(frames, before)


def test_crop_box_is_where_the_pixels_come_from() -> None:
    height, width = 60, 100
    top, left, box_height, box_width = Preprocessing(image_size=30, mean=MEAN, std=STD).crop_box(height, width)
    assert (top, left, box_height, box_width) == (0, 20, 60, 60)
    # A frame that is white inside the box and black outside gives a white image, away from the resizer's border.
    frame = np.zeros((1, height, width, 3), dtype=np.uint8)
    frame[:, :, int(left) : int(left + box_width)] = 255
    pixels = Preprocessing(image_size=30, mean=MEAN, std=STD).pixels(frame)
    assert pixels[..., 2:-2].min() == 255
    squash = Preprocessing(image_size=30, mean=MEAN, std=STD, resize_mode="squash")
    assert squash.crop_box(height, width) == (0, 0, height, width)


def test_crop_box_lies_inside_the_frame() -> None:
    for height, width in SIZES:
        top, left, box_height, box_width = Preprocessing(image_size=224, mean=MEAN, std=STD).crop_box(height, width)
        assert top >= 0 and left >= 0
        assert top + box_height <= height + 1e-9 and left + box_width <= width + 1e-9


def test_config_of_open_clip_is_taken_over() -> None:
    config = {
        "size": (224, 224),
        "mode": "RGB",
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    ours = from_open_clip_config(config, "exact")
    assert ours == Preprocessing(image_size=224, mean=MEAN, std=STD, mode="exact")
    assert ours.to_dict() == {
        "image_size": 224,
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "mode": "exact",
    }
    assert set(ours.versions()) == {"pillow"}


def test_unsupported_settings_are_refused_by_name() -> None:
    config = {"size": 224, "mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match="resize_mode 'longest' is not supported; choose from: shortest, squash"):
        from_open_clip_config({**config, "resize_mode": "longest"}, "fast")
    with pytest.raises(ValueError, match="interpolation 'nearest' is not supported"):
        from_open_clip_config({**config, "interpolation": "nearest"}, "fast")
    with pytest.raises(ValueError, match=r"\(224, 256\) pixels; only square"):
        from_open_clip_config({**config, "size": (224, 256)}, "fast")
    with pytest.raises(ValueError, match="mode 'quick' is not supported; choose from: fast, exact"):
        from_open_clip_config(config, "quick")
