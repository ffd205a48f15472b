"""Accuracy of the verb and the noun of an action, from one head that tells actions apart.

EPIC-KITCHENS' own models have an output for each verb and one for each noun. Here there is one action head, marginalised: the
probability of a verb is the sum of those of the actions with that verb, which also counts an action that differs in its noun.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vcache.pipelines.evaluation.metrics import target_ranks
from vcache.pipelines.targets import among_classes, is_multi_label
from vcache.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelKind:
    """One kind of label beside the class, as "verb"."""

    name: str
    value_names: tuple[str, ...]
    of_class: Int[np.ndarray, " K"]
    """The value of each class; -1 where no stored video has the class, and so none says it."""
    targets: Int[np.ndarray, " M"]
    """The value of each video."""


@dataclass(frozen=True, kw_only=True)
class KindMetrics:
    """Accuracies in 0..1 over the videos that have a value of this kind."""

    kind: str
    num_videos: int
    top1: float
    top5: float


def label_kinds(
    store: FeatureStore,
    split: str,
    rows: np.ndarray,
    on_note: Callable[[str], None] = lambda note: None,
    *,
    classes: Sequence[int] | None = None,
) -> tuple[LabelKind, ...]:
    """The kinds of labels of these rows; `on_note` hears of one that is left out because its classes have several values.

    `classes` are those of the store that are told apart, in their order; default: all.
    """
    if is_multi_label(store.manifest):
        return ()
    told = np.arange(len(store.manifest.class_names)) if classes is None else np.array(classes, dtype=np.int64)
    found = []
    for name, values in sorted(store.manifest.facts.get("label_names", {}).items()):
        pairs, targets = _pairs(store, name, told), store.videos(split).columns[name][rows]
        if not len(pairs) or (targets < 0).all():
            continue
        own, times = np.unique(pairs[:, 0], return_counts=True)
        if (times > 1).any():
            several = store.manifest.class_names[told[own[times > 1][0]]]
            on_note(f"{name} accuracy is left out: the videos of class {several!r} have more than one {name}.")
            continue
        of_class = np.full(len(told), -1)
        of_class[pairs[:, 0]] = pairs[:, 1]
        found.append(LabelKind(name=name, value_names=tuple(values), of_class=of_class, targets=targets))
    return tuple(found)


def kind_metrics(scores: Float[Tensor, "M K"], kind: LabelKind) -> KindMetrics:
    """Top-1 and top-5 of one kind, from logits or log-probabilities of the classes."""
    known, targets = np.flatnonzero(kind.targets >= 0), torch.from_numpy(kind.targets)
    parts = torch.from_numpy(known).split(1024)  # a part at a time, for memory
    ranks = torch.cat([target_ranks(marginalised(scores[part], kind), targets[part]) for part in parts])
    return KindMetrics(
        kind=kind.name,
        num_videos=len(ranks),
        top1=(ranks == 0).double().mean().item(),
        top5=(ranks < 5).double().mean().item(),
    )


def marginalised(scores: Float[Tensor, "M K"], kind: LabelKind) -> Float[Tensor, "M V"]:
    """Log-probabilities of the V values: of each, the sum over the classes that have it. Minus infinity where none has."""
    logs = scores.double().log_softmax(dim=1).numpy(force=True)
    order = np.argsort(kind.of_class, kind="stable")
    order = order[kind.of_class[order] >= 0]
    values, starts = np.unique(kind.of_class[order], return_index=True)
    logs = np.maximum(logs[:, order], np.finfo(np.float64).min)  # classes of one value are neighbours
    # Shifted by the largest of each value, so that a sum of tiny probabilities keeps its rank.
    largest = np.maximum.reduceat(logs, starts, axis=1)
    shifted = np.exp(logs - np.repeat(largest, np.diff([*starts, len(order)]), axis=1))
    marginals = np.full((len(logs), len(kind.value_names)), -np.inf)
    marginals[:, values] = largest + np.log(np.add.reduceat(shifted, starts, axis=1))
    return torch.from_numpy(marginals)


def _pairs(store: FeatureStore, name: str, classes: Int[np.ndarray, " K"]) -> Int[np.ndarray, "pairs 2"]:
    """(place among the classes, value) as they occur in any split, each once."""
    pairs = [np.stack([videos.labels, videos.columns[name]], axis=1) for videos in map(store.videos, store.splits)]
    together = np.concatenate(pairs)
    labels = torch.from_numpy(np.ascontiguousarray(together[:, 0]))
    together[:, 0] = among_classes(labels, classes.tolist())[0].numpy()
    return np.unique(together[(together >= 0).all(axis=1)], axis=0)
