"""Stores of named videos in three views with two sets of templates, and what CLIP itself says of them, in NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from named import EMBED, E, named_store
from viewed import value

from vcache.pipelines.class_text import text_constant
from vcache.store.constants import Constant, write_constants
from vcache.store.reader import FeatureStore

CLASSES = tuple(["jump", "run", "clap", "wave", "spin", "bow", "kick", "throw", "catch", "push", "pull", "nod", "sit"])
VIEWS = (3, 4, 5)
"""3x1, which is what a split with all of them is evaluated in."""
NUM_TEMPLATES = {"label": 1, "five": 5}


def worded_store(
    path: Path, classes: tuple[str, ...] = CLASSES, *, num_videos: int = 40, several: bool = False, **options: Any
) -> Path:
    """`num_videos` to evaluate on and 12 to train on; every class has some, or with `several` a video has two."""
    videos = {
        split: [
            (f"{split}{i}", {one, two} if several else one) for i, (one, two) in enumerate(_labels(classes, number))
        ]
        for split, number in (("train", 12), ("val", num_videos))
    }
    views = {"train": (0, 1, 2), "val": (0, *VIEWS)}
    named_store(path, classes, videos, text=text_of(classes, "label"), views=views, **options)
    with FeatureStore.open(path) as store:
        dims = ("class", "template", "channel")
        write_constants(store, {text_constant("five"): Constant(dims, text_of(classes, "five").astype(np.float32))})
    return path


def text_of(classes: tuple[str, ...], templates: str) -> Float[np.ndarray, "K M E"]:
    """The same of a name wherever it is; near each other, so that probabilities are spread over several classes."""
    drawn = [np.random.default_rng([*f"{templates} {name}".encode()]).normal(size=(9, E)) for name in classes]
    return 1 + 0.15 * np.stack(drawn)[:, : NUM_TEMPLATES[templates]]


def labels_of(path: Path) -> Int[np.ndarray, " M"]:
    with FeatureStore.open(path) as store:
        return store.videos("val").labels


def embeddings(num_videos: int = 40, views: tuple[int, ...] = VIEWS) -> Float[np.ndarray, "V M E"]:
    """Means over the frames."""
    rows = [
        [value(EMBED, "val", view, f"val{i}").astype(float).mean(axis=0) for i in range(num_videos)] for view in views
    ]
    return np.array(rows)


def cosines_100(videos: Float[np.ndarray, "... E"], texts: Float[np.ndarray, "K E"]) -> Float[np.ndarray, "... K"]:
    return 100 * unit(videos) @ unit(texts).T


def clip_scores(
    x: Float[np.ndarray, "V M E"], text: Float[np.ndarray, "K M2 E"], ensemble: str
) -> Float[np.ndarray, "M K"]:
    """Logits, or probabilities."""
    if ensemble == "embeddings":
        return cosines_100(x.mean(axis=0), unit(text).mean(axis=1))
    of_views = [softmax(cosines_100(view, text[:, m])) for view in x for m in range(text.shape[1])]
    return np.mean(of_views, axis=0)


def unit(x: Float[np.ndarray, "... E"]) -> Float[np.ndarray, "... E"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... K"]:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _labels(classes: tuple[str, ...], number: int) -> list[tuple[str, str]]:
    return [(classes[i % len(classes)], classes[(i * i + 1) % len(classes)]) for i in range(number)]
