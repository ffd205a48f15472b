"""Fisher's linear discriminant analysis of several classes: a classifier computed from features, without a step of training.

    W_k = S_w^-1 (m_k - m)

of the means m_k of the classes, the mean m of all clips, and the covariance S_w within the classes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_EIGENVALUE = 1e-8
"""Of the correlation within classes: what is below is no variance but rounding. scikit-learn's tol = 1e-4, squared."""


def discriminants(
    features: Float[Tensor, "N E"], labels: Int[Tensor, " N"], num_classes: int, *, shrinkage: float = 0.0
) -> Float[Tensor, "K E"]:
    """The rows W_k, computed in float64 on the device of the features.

    They are scikit-learn's `LinearDiscriminantAnalysis.coef_` with solver "svd", also where the covariance is singular, as with
    fewer clips than channels: then its pseudo-inverse is taken, of channels scaled to the same deviation. With shrinkage s,
    (1 - s) S_w + s tr(S_w) / E * I is in place of S_w, as with solver "eigen", whose coef_ leave out m: they differ from these by
    one vector, the same for all classes.

    Raises:
        ValueError: a class has no clip, or no two clips of a class differ.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if missing := (counts == 0).nonzero()[:, 0].tolist():
        more = f" and {len(missing) - 1} more have" if len(missing) > 1 else " has"
        raise ValueError(f"discriminant analysis needs clips of every class, and class {missing[0]}{more} none")
    x = features.double()
    means = x.new_zeros(num_classes, x.shape[1]).index_add_(0, labels, x) / counts[:, None]
    within, between = x - means[labels], means - x.mean(dim=0)
    noise = 1e-9 * x.abs().amax(dim=0)
    deviations = within.square().mean(dim=0).sqrt()
    if not (deviations > noise).any():
        raise ValueError("discriminant analysis needs clips of a class that differ, as two of one class do")
    if shrinkage:
        return torch.linalg.solve(_shrunk(within.mT @ within / len(x), shrinkage), between.mT).mT
    # A channel that does not vary within the classes is left as it is, and has no part in the pseudo-inverse.
    scales = torch.where(deviations > noise, deviations, 1.0)
    return _by_pseudo_inverse(within / scales, between / scales) / scales


def _shrunk(covariance: Float[Tensor, "E E"], shrinkage: float) -> Float[Tensor, "E E"]:
    """Towards as much variance in every direction, and none of it shared."""
    evenly = torch.eye(len(covariance)).to(covariance) * covariance.trace() / len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * evenly


def _by_pseudo_inverse(within: Float[Tensor, "N E"], between: Float[Tensor, "K E"]) -> Float[Tensor, "K E"]:
    values, vectors = torch.linalg.eigh(within.mT @ within / len(within))
    kept = values > SMALLEST_EIGENVALUE
    return (between @ vectors[:, kept]) / values[kept] @ vectors[:, kept].mT
