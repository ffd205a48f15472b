"""Average precision, as scikit-learn defines it: sum over the thresholds of (gain in recall) x precision, not interpolated."""

import numpy as np
from jaxtyping import Bool, Float, Int


def average_precisions(scores: Float[np.ndarray, "M K"], relevant: Bool[np.ndarray, "M K"]) -> Float[np.ndarray, " K"]:
    """Of each class; NaN for one that no video has."""
    return resampled_average_precisions(scores, relevant, np.ones((1, len(scores)), dtype=np.int64))[0]


def resampled_average_precisions(
    scores: Float[np.ndarray, "M K"], relevant: Bool[np.ndarray, "M K"], counts: Int[np.ndarray, "R M"]
) -> Float[np.ndarray, "R K"]:
    """The same where resample r has video m `counts[r, m]` times."""
    columns = [_of_one_class(scores[:, k], relevant[:, k], counts) for k in range(scores.shape[1])]
    return np.stack(columns, axis=1)


def _of_one_class(
    scores: Float[np.ndarray, " M"], relevant: Bool[np.ndarray, " M"], counts: Int[np.ndarray, "R M"]
) -> Float[np.ndarray, " R"]:
    if not relevant.any():
        return np.full(len(counts), np.nan)
    order = np.argsort(-scores, kind="stable")
    falling, places = -scores[order], np.flatnonzero(relevant[order])
    # Videos of equal score cross a threshold together: precision is that after the last of them.
    ends = np.searchsorted(falling, falling[places], side="right") - 1
    own = counts[:, order[places]]  # (R, relevant videos)
    found = np.cumsum(own, axis=1)[:, np.searchsorted(places, ends, side="right") - 1]
    seen = np.cumsum(counts[:, order], axis=1)[:, ends]
    precision = found / np.maximum(seen, 1)
    total = own.sum(axis=1)
    return np.divide((own * precision).sum(axis=1), total, out=np.full(len(counts), np.nan), where=total > 0)
