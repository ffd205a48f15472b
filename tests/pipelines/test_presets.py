"""Recipes: they do what the papers' code does, and replay from their records."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.operations import CODES, apply_operations
from vcache.extract.preprocess import Preprocessing, as_images, resize
from vcache.extract.sampling import TSNSampling
from vcache.extract.video import DecodedVideo
from vcache.extract.views import TrainingView, View, view_from_dict
from vcache.pipelines.presets import DEFAULT_RECIPE, RECIPES, UnknownRecipe, recipe, recipe_name

PREPROCESSING = Preprocessing(image_size=32, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
SAMPLING = TSNSampling(num_frames=3)


def decoded_for(view: View, height: int = 45, width: int = 61) -> DecodedVideo:
    rng = np.random.default_rng(height * 100 + width)
    coarse = rng.integers(0, 256, (11, height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    frames = np.ascontiguousarray(coarse.repeat(5, axis=1).repeat(5, axis=2)[:, :height, :width])
    clips = (view.clip_rule(SAMPLING, "a").indices(11),)
    return DecodedVideo(frames=frames, numbers=tuple(range(11)), clips=clips, num_video_frames=11, fps=None)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(RECIPES)),
    st.sampled_from(["fast", "exact"]),
    st.integers(0, 2**40),
    st.integers(33, 70),
    st.integers(33, 70),
)
def test_every_recipe_is_replayed_bit_for_bit_from_what_is_stored(
    name: str, mode: str, seed: int, height: int, width: int
) -> None:
    preprocessing = replace(PREPROCESSING, mode=mode)
    view = TrainingView(seed=seed, view=1, augmentation=RECIPES[name], pixels_per_frame=2)
    video = decoded_for(view, height, width)
    clip = view.prepare(video, 0, preprocessing, "a")
    # As a reader of the store has it: the definition from JSON, the record from bytes, no seed that matters.
    stored = view_from_dict(json.loads(json.dumps({**view.to_dict(), "seed": 0})))
    record = {
        key: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for key, array in clip.record.items()
    }
    images = stored.replay(video.frames[record["frame_index"]], record, preprocessing)
    assert torch.equal(images, clip.images)
    np.testing.assert_array_equal(record["pixels"][::2], images.permute(0, 2, 3, 1).numpy())


def test_an_operation_more_leaves_the_draws_of_the_others() -> None:
    plain = TrainingView(seed=3, view=1, augmentation=RECIPES["evl"])
    more = replace(plain, augmentation=replace(RECIPES["evl"], grey=1.0, erasing=1.0, flip=1.0))
    fewer = replace(plain, augmentation=replace(RECIPES["evl"], randaugment=None))
    first, second, third = (
        view.prepare(decoded_for(view), 0, PREPROCESSING, "a").record for view in (plain, more, fewer)
    )
    for record in (second, third):
        np.testing.assert_array_equal(first["frame_index"], record["frame_index"])
        np.testing.assert_array_equal(first["crop"], record["crop"])
    np.testing.assert_array_equal(second["augment"][:, :4], first["augment"])
    assert second["augment"][0, 4:, 0].tolist() == [CODES["grey"], CODES["fill"]]
    assert "augment" not in third


def test_randaugment_comes_before_the_crop_and_grey_after_it() -> None:
    """A whole view done by hand from its record, with other calls than the recipe's own."""
    augmentation = replace(RECIPES["evl"], grey=1.0, flip=1.0)
    view = TrainingView(seed=8, view=1, augmentation=augmentation)
    video = decoded_for(view)
    clip = view.prepare(video, 0, PREPROCESSING, "a")
    images = apply_operations(as_images(video.clip(0)), clip.record["augment"][:, :4])
    top, left, height, width = (round(value) for value in clip.record["crop"].tolist())
    images = resize(
        images[:, :, top : top + height, left : left + width], 32, 32, interpolation="bilinear", mode="fast"
    )
    red, green, blue = images.flip(-1).double().unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (clip.images.double() - grey[:, None]).abs().max() <= 0.51
    assert clip.record["augment"].any(axis=(0, 2)).sum() >= 2  # RandAugment did something to these frames


def test_something_something_is_never_flipped() -> None:
    for name in RECIPES:
        assert recipe(name, "ssv2").flip == recipe(name, "something-something-v2-small").flip == 0.0
    assert recipe("aim", "ssv2") == RECIPES["aim-ssv2"] and recipe("aim", "k400") == RECIPES["aim"]
    assert recipe(DEFAULT_RECIPE, "k400").flip == 0.5


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        UnknownRecipe, match="there is no recipe 'evll'. Did you mean 'evl'\\? There are: crop-flip, evl"
    ):
        recipe("evll", "k400")


def test_a_recorded_augmentation_tells_its_recipe() -> None:
    for dataset in ("k400", "ssv2"):
        for name in RECIPES:
            recorded = json.loads(json.dumps(recipe(name, dataset).to_dict()))
            found = recipe_name(recorded, dataset)
            assert found is not None and recipe(found, dataset) == recipe(name, dataset)
    assert recipe_name({**RECIPES["evl"].to_dict(), "flip": 0.25}, "k400") is None


def test_evl_flip_is_the_codes_recipe_with_the_papers_flip() -> None:
    assert RECIPES["evl-flip"] == replace(RECIPES["evl"], flip=0.5) and RECIPES["evl"].flip == 0.0
    assert recipe("evl-flip", "ssv2") == recipe("evl", "ssv2")  # Something-Something is never flipped
