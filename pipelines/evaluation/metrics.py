"""How good scores are: top-1, top-5, mean class accuracy and loss, or of several classes per video the mean average precision."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vcache.pipelines.evaluation.average_precision import average_precisions
from vcache.pipelines.stored_views import ONE_VIEW, grid_word


class ScoresError(ValueError):
    """Scores that cannot be ranked, or targets that are none of their classes."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Accuracies in 0..1. Where videos have several classes each, only the mean average precision and the loss are set."""

    num_videos: int
    top1: float | None = None
    top5: float | None = None
    """With fewer than five classes, top-K."""
    mean_class_accuracy: float | None = None
    """Mean over the classes that occur of their own top-1."""
    mean_average_precision: float | None = None
    """Mean over the classes that occur of the area under their precision-recall steps; None with one class per video."""
    loss: float
    """Mean over the videos of the cross-entropy; of several classes mean over videos and classes of the binary one."""
    views: str = grid_word(ONE_VIEW)
    """The views whose scores were averaged, TxS: so many along the video, times so many crops of each."""

    @property
    def monitored(self) -> float:
        """What "best" and early stopping compare, larger is better: top-1, or the mean average precision."""
        value = self.top1 if self.mean_average_precision is None else self.mean_average_precision
        assert value is not None
        return value

    @property
    def monitored_name(self) -> str:
        return "top-1" if self.mean_average_precision is None else "mAP"


def compute_metrics(
    scores: Float[Tensor, "M K"], targets: Int[Tensor, " M"] | Float[Tensor, "M K"], *, views: str = grid_word(ONE_VIEW)
) -> Metrics:
    """Metrics of M videos.

    Args:
        scores: logits or log-probabilities; of equal ones the class that comes first is taken to be ahead.
        targets: the index of the class, or of several classes per video 1 for each of them, else 0.

    Raises:
        ScoresError: there is no video, a score is not a number, or a target is no class.
    """
    check_scores(scores, targets)
    if targets.ndim == 2:
        precisions = average_precisions(scores.numpy(force=True), targets.numpy(force=True) > 0)
        return Metrics(
            num_videos=len(targets),
            mean_average_precision=float(np.nanmean(precisions)),  # NaN is a class that does not occur
            loss=nn.functional.binary_cross_entropy_with_logits(scores, targets.to(scores.dtype)).item(),
            views=views,
        )
    ranks = target_ranks(scores, targets)
    top1 = (ranks == 0).double()
    return Metrics(
        num_videos=len(targets),
        top1=top1.mean().item(),
        top5=(ranks < 5).double().mean().item(),
        mean_class_accuracy=torch.stack([top1[targets == target].mean() for target in targets.unique()]).mean().item(),
        loss=nn.functional.cross_entropy(scores, targets).item(),
        views=views,
    )


def target_ranks(scores: Float[Tensor, "M K"], targets: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
    """How many classes are ahead of the target: 0 is a hit of top-1, below 5 one of top-5. Ties go to the first class."""
    own = scores.gather(1, targets[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < targets[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)


def check_scores(scores: Float[Tensor, "M K"], targets: Int[Tensor, " M"] | Float[Tensor, "M K"]) -> None:
    """Raise ScoresError for what no metric can be made of."""
    if not scores.numel():
        raise ScoresError(f"there is nothing to measure: {len(scores)} videos, {scores.shape[1]} classes.")
    # The largest is NaN if any is, and minus infinity if all are.
    if len(bad := (~scores.max(dim=1).values.isfinite()).nonzero()):
        raise ScoresError(
            f"the scores of {len(bad)} of {len(scores)} videos are not finite numbers, the first of video {bad[0].item()} "
            "(from 0): the head is lost, or its features are. Evaluate other weights, or train with a smaller --lr."
        )
    if targets.ndim == 1 and len(bad := ((targets < 0) | (targets >= scores.shape[1])).nonzero()):
        first = int(bad[0])
        raise ScoresError(
            f"{len(bad)} of {len(targets)} videos have none of the {scores.shape[1]} classes, the first is video {first} "
            f"(from 0) with label {targets[first].item()}: there is no truth to compare with. Name a split that has labels."
        )
    if targets.ndim == 2 and not targets.any():
        raise ScoresError(f"none of {len(targets)} videos has a class: there is no truth to compare with.")
