"""A tiny store with several views, which heads can be trained on: values that tell view, split and row apart."""

import numpy as np

from vcache.store.key import cache_key
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure, ShardWriter, create_store, declare_arrays

T, N, D, K = 4, 5, 6, 3
CLS = ArraySpec(name="cls/2", dims=("frame", "channel"), shape=(T, D), chunk=(T, D), dtype="float32")
TOKENS = ArraySpec(
    name="tokens/2", dims=("frame", "token", "channel"), shape=(T, N, D), chunk=(1, N, D), dtype="float32"
)
ARRAYS = (CLS, TOKENS)


def evaluation(t, num_temporal, s=0, num_spatial=1):
    return {"kind": "evaluation", "temporal": [t, num_temporal], "spatial": [s, num_spatial]}


def training(view, seed=0):
    """Training view `view`, from 1, of that seed."""
    return {"kind": "training", "seed": seed, "view": view, "augmentation": {"scale": [0.5, 1.0], "flip": 0.5}}


DEFINITIONS = (evaluation(0, 1), training(1), training(2), *(evaluation(t, 3) for t in range(3)))
HELD = {"train": (0, 1, 2), "val": (0, 3, 4, 5)}
"""The views that each split has: three to train on, and 3x1 to evaluate with."""


def video_ids(num_rows, prefix="v"):
    return tuple(f"{prefix}{row}" for row in range(num_rows))


def value(spec, split, view, video_id):
    """The row that the tests expect: near 10 times the number of the view."""
    rng = np.random.default_rng([view, *f"{spec.name} {split} {video_id}".encode()])
    return (10 * view + rng.normal(size=spec.shape)).astype(spec.dtype)


def manifest(sizes, *, definitions=DEFINITIONS, rows_per_shard=5, request=None):
    spec = {"model": "tiny", "dtype": "float32"}
    backbone = {"model": "tiny", "num_layers": 3, "width": D, "num_heads": 2, "grid": [2, 2], "embed_dim": 7}
    words = {"dataset": "toy", "root": None, "split": None, "frames": T, "stride": 16, "tsn": False, "dtype": "float32"}
    words |= {
        "model": "tiny",
        "pretrained": "openai",
        "random_weights": False,
        "preprocess": "fast",
        "val_fraction": 0.2,
    }
    facts = {"backbone": backbone | {"num_tokens": N, "layer_norm_eps": 1e-5}, "request": words | (request or {})}
    return Manifest(
        key=cache_key(spec),
        spec=spec,
        dataset="toy",
        class_names=("a", "b", "c"),
        rows_per_shard=rows_per_shard,
        splits=sizes,
        facts=facts | ({"views": list(definitions)} if definitions else {}),
    )


def viewed_store(path, *, ids=None, held=None, failed=(), missing=(), arrays=None, columns=None, **options):
    """A store of 12 and 7 videos; `failed` are (split, view, row), `missing` (split, view, shard), `arrays` by view.

    `columns` are functions of the labels, by name.
    """
    ids = ids or {"train": video_ids(12), "val": video_ids(7, "w")}
    tables = {}
    for split, names in ids.items():
        labels = np.arange(len(names)) % K
        more = {name: column(labels) for name, column in (columns or {}).items()}
        tables[split] = VideoTable(names, tuple(f"{name}.mp4" for name in names), labels, more)
    create_store(path, manifest({split: len(names) for split, names in ids.items()}, **options), tables)
    store = FeatureStore.open(path, num_threads=2)
    for split, views in (held or HELD).items():
        for view in views:
            fill_view(store, split, view, (arrays or {}).get(view, ARRAYS), failed, missing)
    return store


def fill_view(store, part, view, arrays=ARRAYS, failed=(), missing=()):
    """Declare the arrays of a view and commit its shards, but the missing ones."""
    declare_arrays(store, part, arrays, view)
    ids = store.part_videos(part).ids
    for shard in range(store.num_shards(part)):
        if (part, view, shard) in missing:
            continue
        with ShardWriter(store, part, shard, arrays, view) as writer:
            for row in store.shard_rows(part, shard):
                if (part, view, row) in failed:
                    writer.fail(RowFailure(row, ids[row], f"{ids[row]}.mp4", "empty", "0 bytes"))
                else:
                    writer.write(row, {spec.name: value(spec, part, view, ids[row]) for spec in arrays})
