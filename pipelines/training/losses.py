"""What a head is trained to make small, and how many clips it gets right.

Targets are Int (B,), one class a clip, or Float (B, K), 1 for each class that a clip has. Mixing makes Float (B, K) of both.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

ClipTargets = Int[Tensor, " B"] | Float[Tensor, "B K"]


def clip_losses(
    logits: Float[Tensor, "B K"], targets: ClipTargets, *, label_smoothing: float, multi_label: bool
) -> Float[Tensor, " B"]:
    """The loss of each clip.

    One class a clip: cross-entropy; with label smoothing e the target is (1 - e) of itself and e / K of every class.
    Several: the mean over the K classes of the binary cross-entropies, as mmaction2's BCELossWithLogits; smoothing moves the
    target of each class towards 1/2, as each is a choice between two (timm; mmaction2 moves it towards 1 / K).
    """
    if not multi_label:
        return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    smoothed = targets * (1 - label_smoothing) + 0.5 * label_smoothing
    return functional.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(dim=1)


def count_hits(logits: Float[Tensor, "B K"], targets: ClipTargets, *, multi_label: bool) -> Int[Tensor, ""]:
    """Clips whose largest logit is at their class, at the larger one of a mixed clip, or at one of several."""
    best = logits.argmax(dim=1)
    if multi_label:
        return (targets.gather(1, best[:, None]) > 0).sum()
    return (best == (targets.argmax(dim=1) if targets.is_floating_point() else targets)).sum()


def as_shares(targets: ClipTargets, num_classes: int) -> Float[Tensor, "B K"]:
    """One-hot of class indices; what has a column for each class stays as it is."""
    if targets.is_floating_point():
        return targets
    return torch.zeros(len(targets), num_classes, device=targets.device).scatter_(1, targets[:, None].long(), 1.0)
