"""Augmentation recipes by name: what each paper's training code does to a clip, and a plain one.

Frames are chosen by the sampling of the store (`--frames`, `--stride`, `--tsn`), not here. Everywhere one antialiased uint8
resize takes the place of upstream's interpolation of floats.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vcache.extract.augment import Augmentation
from vcache.extract.randaugment import ColourJitter, RandAugment

DEFAULT_RECIPE = "crop-flip"

RECIPES = {
    # Inception's crop and a flip: what Text4Vis and AIM do, less what is theirs alone.
    "crop-flip": Augmentation(),
    # Lin et al. 2022, code at b282e8b: RandAugment on the frames as they are. The paper's appendix A names a flip besides; the
    # code takes a `mirror` and never uses it, so the official numbers are without. "evl-flip" is the paper's words.
    "evl": Augmentation(interpolation="bilinear", flip=0.0, randaugment=RandAugment()),
    "evl-flip": Augmentation(interpolation="bilinear", randaugment=RandAugment()),
    # Qing et al. 2023, code at 4b3a09b. On SSv2 it flips and swaps labels; see `recipe`.
    "dist": Augmentation(interpolation="bilinear", scale=(0.4, 1.0), ratio=(0.75, 1.333)),
    # Wu et al. 2023, code at d61b34d.
    "text4vis": Augmentation(resize_short=256, interpolation="bicubic", grey=0.2),
    # Wang et al. 2021, code at 31c34df: RandAugment(2, 9) of pytorch-randaugment and jitter, both drawn frame by frame.
    "actionclip": Augmentation(
        interpolation="bilinear",
        crop="multiscale",
        randaugment=RandAugment(
            num_ops=2,
            magnitude=9.0,
            magnitude_std=0.0,
            max_magnitude=30.0,
            probability=1.0,
            operations="absolute",
            per_frame=True,
            fill=(0, 0, 0),
        ),
        jitter=ColourJitter(per_frame=True),
        grey=0.2,
    ),
    # Yang et al. 2023, code at b3580d2. ViT-L on Kinetics-400 has colour noise along principal components besides, which is left
    # out. On SSv2 RandAugment is imgaug's: four operations of magnitude 7 of 30, each done for certain. Its own flip is left out,
    # and so are blur, smoothing and small squares; here it comes before the crop, there after it.
    "aim": Augmentation(resize_short=256, interpolation="bilinear"),
    "aim-ssv2": Augmentation(
        resize_short=256,
        interpolation="bilinear",
        flip=0.0,
        randaugment=RandAugment(magnitude_std=0.0, max_magnitude=30.0, probability=1.0),
        erasing=0.25,
    ),
    # Pan et al. 2022, code at b914b38: a square from a short side of 1 to 1.15 times the model's, here one of four sizes at fixed
    # places. On SSv2 EVL's code with bicubic interpolation.
    "st-adapter": Augmentation(interpolation="bicubic", crop="multiscale", scales=(1.0, 0.95, 0.91, 0.87)),
    "st-adapter-ssv2": Augmentation(interpolation="bicubic", flip=0.0, randaugment=RandAugment()),
}

# In these datasets left and right are part of the class.
_DIRECTED = ("ssv2", "sthv2", "something")


class UnknownRecipe(ValueError):
    """No recipe has this name."""


def recipe(name: str, dataset: str) -> Augmentation:
    """The recipe for a dataset; "NAME-ssv2" is taken for Something-Something where there is one.

    Something-Something is never flipped, whatever the recipe: a flip swaps classes ("pushing from left to right"), and a
    stored label is of the video, not of the view.

    Raises:
        UnknownRecipe: the message names the nearest and all others.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UnknownRecipe(f"there is no recipe {name!r}. {hint}There are: {', '.join(RECIPES)}.")
    if not any(word in dataset.lower() for word in _DIRECTED):
        return RECIPES[name]
    return replace(RECIPES.get(f"{name}-ssv2", RECIPES[name]), flip=0.0)


def recipe_name(augmentation: Mapping[str, Any], dataset: str) -> str | None:
    """The recipe that gives a recorded augmentation for this dataset, the plain one first; None if none does any more."""
    return next((name for name in RECIPES if recipe(name, dataset).to_dict() == augmentation), None)
