"""What a head is to predict of each video: one class, or each of several."""

import numpy as np
import torch
from jaxtyping import Float, Int
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
