"""What a head is to predict of each video: one class, or each of several."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

MULTI_HOT = "multi_hot"
"""The column of the video table that holds the classes of each video where it may have several."""


def is_multi_label(manifest: Manifest) -> bool:
    """Whether a video may have several classes, or none."""
    return bool(manifest.facts.get("multi_label"))


def targets_of(store: FeatureStore, split: str) -> Int[Tensor, " M"] | Float[Tensor, "M K"]:
    """By row of the split: the index of the class, or with several classes 1 for each of them, else 0."""
    videos = store.videos(split)
    if is_multi_label(store.manifest):
        return torch.from_numpy(videos.columns[MULTI_HOT].astype(np.float32))
    return torch.from_numpy(videos.labels)


def among_classes(
    targets: Int[Tensor, " M"] | Float[Tensor, "M K"], classes: Sequence[int], *, any_of: bool = False
) -> tuple[Int[Tensor, " M"] | Float[Tensor, "M k"], Bool[np.ndarray, " M"]]:
    """The targets among some classes alone, numbered in their order, and which videos are of them.

    Of them are videos that have no other class, also those that have none; with `any_of` those that have any of them. The
    target of another video says nothing.

        targets 2 0 1 -1, classes (2, 1)    0 -1 1 -1, and True False True True; with any_of True False True False

    Raises:
        ValueError: a class is named twice.
    """
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes ({tuple(classes)}) must name each class once")
    if targets.ndim == 2:
        own = targets[:, list(classes)]
        kept = own.any(dim=1) if any_of else own.sum(dim=1) == targets.sum(dim=1)
        return own, kept.numpy()
    known = targets.clamp(min=-1) + 1  # 0: no class
    places = torch.full((int(max([-1, *targets.tolist(), *classes])) + 2,), -1)
    places[torch.tensor(classes, dtype=torch.int64) + 1] = torch.arange(len(classes))
    own = places[known]
    return own, ((own >= 0) if any_of else (own >= 0) | (known == 0)).numpy()
