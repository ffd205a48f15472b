"""Spearman's rank correlation, in numpy."""

import numpy as np
from jaxtyping import Float


def rank_correlation(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> float | None:
    """Spearman's, ties at their mean rank; None where one of both is the same everywhere, or there is nothing."""
    if a.size == 0:
        return None
    ranks = [_ranks(x.ravel()) for x in (a, b)]
    x, y = (rank - rank.mean() for rank in ranks)
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else None


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """0, 1, 2, ... in ascending order; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]
