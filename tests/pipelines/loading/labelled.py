"""Tiny stores of videos with given classes, one or several each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from viewed import CLS, fill_view, manifest

from vcache.store.manifest import VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import create_store


def labelled_store(
    path: Path, labels: Sequence[int] | Sequence[set[int]], *, ids: Sequence[str] | None = None, rows_per_shard: int = 5
) -> FeatureStore:
    """Split "train" with `cls/2` alone, in view 0; a set is the classes of a video that may have several."""
    names = tuple(ids or (f"v{row}" for row in range(len(labels))))
    several = isinstance(labels[0], set)
    classes = [label if isinstance(label, set) else {label} for label in labels]
    num_classes = 1 + max(max(found, default=0) for found in classes)
    first = np.array([min(found, default=-1) for found in classes], dtype=np.int64)
    columns = {"multi_hot": np.array([[c in found for c in range(num_classes)] for found in classes], dtype=np.uint8)}
    table = VideoTable(names, tuple(f"{name}.mp4" for name in names), first, columns if several else {})
    made = manifest({"train": len(names)}, definitions=(), rows_per_shard=rows_per_shard)
    made = replace(made, facts={**made.facts, "multi_label": several}, class_names=tuple(map(str, range(num_classes))))
    create_store(path, made, {"train": table})
    store = FeatureStore.open(path, num_threads=1)
    fill_view(store, "train", 0, (CLS,))
    return store
