"""What is said beside accuracies on classes that were never trained on: chance, and trained and left-out classes apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics
from vcache.pipelines.evaluation.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """Of the classes that were trained on, or of those left out, each told apart from all (generalised zero-shot)."""

    name: str
    """ "trained" or "left-out"."""
    num_classes: int
    metrics: Metrics
    """Of the videos of these classes; where videos have several, of all videos, and the average precisions of these classes."""


def chance(predictions: Predictions) -> dict[str, float]:
    """By metric, what scores that know nothing would give on average. Of average precision about the share of each class."""
    num_classes = predictions.scores.shape[1]
    targets = predictions.target_tensor()
    if targets.ndim == 2:
        shares = targets.double().mean(dim=0)
        return {"mean_average_precision": shares[shares > 0].mean().item()}
    return {
        "top1": 1 / num_classes,
        "top5": min(5, num_classes) / num_classes,
        "mean_class_accuracy": 1 / num_classes,
    }


def group_metrics(predictions: Predictions) -> tuple[GroupMetrics, ...]:
    """Trained and left-out classes apart, where the predictions are of both and both have videos; else nothing."""
    trained, targets = predictions.trained_on, predictions.target_tensor()
    if trained is None or trained.all() or not trained.any():
        return ()
    scores = torch.from_numpy(predictions.scores)
    groups = []
    for name, of_group in (("trained", trained), ("left-out", ~trained)):
        own = torch.from_numpy(of_group)
        if targets.ndim == 2:
            taken = scores[:, own], targets[:, own]
        else:
            rows = own[targets]
            taken = scores[rows], targets[rows]
        if not len(taken[0]) or (targets.ndim == 2 and not taken[1].any()):
            return ()
        metrics = compute_metrics(*taken, views=predictions.views)
        groups.append(GroupMetrics(name=name, num_classes=int(of_group.sum()), metrics=metrics))
    return tuple(groups)


def harmonic_mean(groups: Sequence[GroupMetrics]) -> float | None:
    """Of top-1, or of mAP, of the groups; None where there are none. It is high only where both are."""
    values = np.array([group.metrics.monitored for group in groups])
    if not len(values):
        return None
    return float(len(values) / (1 / values).sum()) if values.all() else 0.0
