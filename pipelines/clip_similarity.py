"""`vcache cka`: how similar what a head makes of the patches is to what CLIP makes of them, layer by layer.

Qing et al. 2023 (DiST), figure 5a: EVL's features are close to CLIP's, DiST's integrated ones less so, its temporal ones least.
The paper does not say what its examples are. Here they are patches of frames unless asked otherwise: the features are maps, of
which position by position the one is compared with the other; and a validation split has thousands of times as many patches as
clips, where fewer examples than channels raise CKA towards 1 whatever the features are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vcache.extract.layers import absolute_layer
from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import InnerFeatures
from vcache.pipelines.cka import Scatter
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.evaluate import open_run_store, validation_split
from vcache.pipelines.imported_runs import notes_on_store
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.runs import Run
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore

Level = Literal["patch", "frame", "clip"]
"""What an example is: a patch of a frame of the clip, the mean of its patches, or the mean of the clip's."""

_CLIPS = 2
"""At a time: the features of all layers are in memory, 0.1 GB a clip of DiST on ViT-B/16 with 8 frames."""
_HIGH_BY_CHANCE = 0.05


class CkaError(ValueError):
    """A comparison that cannot be made as asked: head, split, level or number of videos."""


@dataclass(frozen=True, kw_only=True)
class LayerSimilarity:
    """CKA with what CLIP gives at a layer; None where the head has no such features."""

    layer: int
    """Of the backbone, absolute."""
    integrated: float | None
    temporal: float | None
    integrated_by_chance: float | None
    """If the examples of both were paired at random (`Scatter.cka_by_chance`)."""
    temporal_by_chance: float | None


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Of all layers that a head reads, in the order in which it reads them."""

    run: str
    head: str
    store: str
    split: str
    level: Level
    num_videos: int
    num_examples: int
    layers: tuple[LayerSimilarity, ...]
    notes: tuple[str, ...]
    """What a reader has to know."""


def clip_similarity(
    path: Path,
    *,
    store: StorePath | None = None,
    split: str | None = None,
    videos: int = 128,
    level: str = "patch",
    device: str = "auto",
    on_clips: Callable[[int, int], None] = lambda done, total: None,
) -> Similarity:
    """Compare the features of a run's head with CLIP's, on so many videos spread over a split (default: the validation split).

    Temporal features are taken at the frames that CLIP sees. `on_clips` hears how many clips of how many are done.

    Raises:
        CkaError: the head does not show its features, or there is no such level, split or readable video.
        RunError, StoreKeyMismatch, HeadStoreMismatch: as for an evaluation.
    """
    run, on = Run.open(path), select_device(device)
    examples_are = _checked_level(run, level, videos)
    head = run.load_head().to(on)
    requirements = get_head(run.head).requires(head.config)
    if not requirements.tokens:
        raise CkaError(f"the head of {path} reads no patches, so there is nothing to compare with CLIP's.")
    with open_run_store(run, store) as opened:
        chosen = _chosen_split(opened, split)
        plan = match(run.head, requirements, opened, [chosen], frame_step=run.config.get("frame_step", 1))
        loader = ClipLoader(opened, chosen, plan, batch_size=_CLIPS, device=on, allow_incomplete=True)
        loader.rows = spread(loader.rows, videos)
        if not len(loader):
            raise CkaError(
                f"split {chosen!r} of {opened.path.name} has no readable video. Choose another with --split."
            )
        scatters = _scatters(head, loader, level, on_clips)
        num_layers = opened.manifest.facts["backbone"]["num_layers"]
        layers = tuple(_layer(absolute_layer(asked, num_layers), names, one) for asked, names, one in scatters)
        notes = (*notes_on_store(run, opened), *_chance_notes(layers, scatters[0][2].num_examples, examples_are))
        return Similarity(
            run=str(path),
            head=type(head).__name__,
            store=str(opened.path),
            split=chosen,
            level=examples_are,
            num_videos=len(loader.rows),
            num_examples=scatters[0][2].num_examples,
            layers=layers,
            notes=notes,
        )


def spread(rows: np.ndarray, num: int) -> np.ndarray:
    """So many of the rows at even distances, or all: splits are often in the order of their classes."""
    return rows if num >= len(rows) else rows[np.linspace(0, len(rows) - 1, num).round().astype(np.int64)]


def examples(features: Float[Tensor, "B T P c"], level: str) -> Float[Tensor, "n c"]:
    """One row for each example."""
    if level == "patch":
        return features.flatten(0, 2)
    frames = features.double().mean(dim=2)
    return frames.flatten(0, 1) if level == "frame" else frames.mean(dim=1)


def _checked_level(run: Run, level: str, videos: int) -> Level:
    if not hasattr(get_head(run.head), "inner_features"):
        can = ", ".join(name for name, head in list_heads().items() if hasattr(head, "inner_features"))
        raise CkaError(
            f"head {run.head!r} of {run.path} makes no features of the patches that could be compared with CLIP's. Runs of these "
            f"heads can be compared: {can}."
        )
    if level not in get_args(Level):
        raise CkaError(f"--level {level}: say one of {', '.join(get_args(Level))}.")
    if videos < 1:
        raise CkaError(f"--videos {videos}: say at least 1.")
    return cast(Level, level)


def _chosen_split(store: FeatureStore, split: str | None) -> str:
    chosen = split or validation_split(store.splits)
    if chosen not in store.splits:
        what = f"split {split!r}" if split else "validation split"
        raise CkaError(f"{store.path.name} has no {what}; it has: {', '.join(store.splits)}. Choose one with --split.")
    return str(chosen)


def _scatters(
    head: torch.nn.Module, loader: ClipLoader, level: str, on_clips: Callable[[int, int], None]
) -> list[tuple[int, list[str], Scatter]]:
    """Of each layer that is read: its number as asked, the names of what is compared with CLIP, and the sums, CLIP's first."""
    found: list[tuple[int, list[str], Scatter]] = []
    done = 0
    for batch in loader.in_order():
        for i, inner in enumerate(head.inner_features(batch.features())):  # type: ignore[operator]
            compared = _compared(inner)
            if i == len(found):
                found.append((inner.layer, list(compared), Scatter()))
            found[i][2].add([examples(x, level) for x in (inner.spatial, *compared.values())])
        done += len(batch)
        on_clips(done, len(loader.rows))
    return found


def _compared(inner: InnerFeatures) -> dict[str, Float[Tensor, "B T P _"]]:
    """What the head has beside the frozen features, at the frames of the clip."""
    features = {} if inner.integrated is None else {"integrated": inner.integrated}
    if inner.temporal is not None:
        features["temporal"] = inner.temporal[:, :: inner.temporal.shape[1] // inner.spatial.shape[1]]
    return features


def _layer(layer: int, names: list[str], scatter: Scatter) -> LayerSimilarity:
    values: dict[str, float | None] = dict.fromkeys(
        ("integrated", "temporal", "integrated_by_chance", "temporal_by_chance")
    )
    for place, name in enumerate(names, start=1):
        values[name] = _number(scatter.cka(0, place))
        values[f"{name}_by_chance"] = _number(scatter.cka_by_chance(0, place))
    return LayerSimilarity(layer=layer, **values)


def _number(value: float) -> float | None:
    """None of features that are the same everywhere."""
    return value if np.isfinite(value) else None


def _chance_notes(layers: tuple[LayerSimilarity, ...], num_examples: int, level: Level) -> list[str]:
    values = [value for one in layers for value in (one.integrated_by_chance, one.temporal_by_chance)]
    highest = max((value for value in values if value is not None), default=0.0)
    if highest <= _HIGH_BY_CHANCE:
        return []
    more = "Take more --videos" + ("." if level == "patch" else ", or --level patch.")
    return [
        f"of {num_examples} examples even features that are paired at random have a CKA of up to {highest:.2f}. {more}"
    ]
