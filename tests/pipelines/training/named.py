"""Tiny stores of videos with named classes and their text, and a head that classifies by it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from viewed import CLS, DEFINITIONS, T, manifest, value

from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe
from vcache.heads.text import ClassText, TextClassifier
from vcache.pipelines.class_text import LOGIT_SCALE, text_constant
from vcache.store.constants import Constant, write_constants
from vcache.store.key import cache_key
from vcache.store.layout import ArraySpec
from vcache.store.manifest import VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure, ShardWriter, create_store, declare_arrays

E = 7
EMBED = ArraySpec(name="embed", dims=("frame", "channel"), shape=(T, E), chunk=(T, E), dtype="float32")
Videos = Mapping[str, Sequence[tuple[str, Any]]]
"""By split the id of each video and its class, or the set of its classes, or None where that is not known."""


def named_store(
    path: Path,
    class_names: Sequence[str],
    videos: Videos,
    *,
    embed: Callable[[str], np.ndarray] | None = None,
    text: Float[np.ndarray, "K M E"] | None = None,
    logit_scale: float = 2.0,
    views: Mapping[str, Sequence[int]] | None = None,
    columns: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda labels: {},
    failed: Sequence[str] = (),
    dataset: str = "toy",
    facts: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> Path:
    """`cls/2` and `embed` of every video, drawn by split, view and id, or `embed` as given; what is `failed` has none.

    `columns` are made of the labels of a split. The text is one template of one-hot embeddings unless given.
    """
    several = isinstance(next(iter(videos.values()))[0][1], set)
    made = manifest({split: len(rows) for split, rows in videos.items()}, definitions=DEFINITIONS if views else ())
    known = {**made.facts, "multi_label": several, **(facts or {})}
    made = replace(made, class_names=tuple(class_names), dataset=dataset, facts=known)
    made = made if spec is None else replace(made, spec=dict(spec), key=cache_key(dict(spec)))
    tables = {split: _table(rows, class_names, several, columns) for split, rows in videos.items()}
    create_store(path, made, tables)
    with FeatureStore.open(path, num_threads=1) as store:
        for split in videos:
            for view in (views or {}).get(split, (0,)):
                _fill(store, split, view, embed, failed)
        text = np.eye(E)[: len(class_names), None] if text is None else text
        write_constants(
            store,
            {
                text_constant("label"): Constant(("class", "template", "channel"), text.astype(np.float32)),
                LOGIT_SCALE: Constant(("scale",), np.array([logit_scale], dtype=np.float32)),
            },
        )
    return path


def _table(
    rows: Sequence[tuple[str, Any]], class_names: Sequence[str], several: bool, columns: Callable[..., Any]
) -> VideoTable:
    names, places = tuple(video for video, _ in rows), {name: k for k, name in enumerate(class_names)}
    first = [min((places[c] for c in label), default=-1) if several else places.get(label, -1) for _, label in rows]
    labels = np.array(first, dtype=np.int64)
    hot = {"multi_hot": np.array([[name in label for name in class_names] for _, label in rows], dtype=np.uint8)}
    return VideoTable(names, tuple(f"{name}.mp4" for name in names), labels, (hot if several else {}) | columns(labels))


def _fill(
    store: FeatureStore, split: str, view: int, embed: Callable[[str], np.ndarray] | None, failed: Sequence[str]
) -> None:
    declare_arrays(store, split, (CLS, EMBED), view)
    ids = store.part_videos(split).ids
    for shard in range(store.num_shards(split)):
        with ShardWriter(store, split, shard, (CLS, EMBED), view) as writer:
            for row in store.shard_rows(split, shard):
                if ids[row] in failed:
                    writer.fail(RowFailure(row, ids[row], f"{ids[row]}.mp4", "empty", "0 bytes"))
                    continue
                given = value(EMBED, split, view, ids[row]) if embed is None else embed(ids[row])
                array = np.broadcast_to(given, (T, E)).astype(np.float32)
                writer.write(row, {CLS.name: value(CLS, split, view, ids[row]), EMBED.name: array})


class NamedHead(nn.Module):
    """The mean of the embeddings, turned by a matrix that begins as the identity, and compared with text."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        embed_dim: int = 512
        templates: str = "label"

    summary = "of the tests"
    recipe = Recipe(lr=1e-2, weight_decay=0.0, epochs=2, batch_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.turn = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        nn.init.eye_(self.turn.weight)
        self.text = TextClassifier(config.num_classes, config.embed_dim)

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        return HeadRequirements(embed=True, text=config.templates)

    def set_text(self, text: ClassText) -> None:
        self.text.set(text)

    def forward(self, features: ClipFeatures) -> Tensor:
        assert features.embed is not None
        return self.text(self.turn(features.embed.to(torch.float32).mean(dim=1)))
