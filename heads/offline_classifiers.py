"""Rows of a classifier that no training made, and text of another encoder brought to the width of the videos' embeddings."""

import torch
from jaxtyping import Float
from torch import Tensor


def random_rows(num_classes: int, width: int) -> Float[Tensor, "K E"]:
    """Of a standard normal distribution (Text4Vis, eq. 4)."""
    return torch.randn(num_classes, width)


def orthogonal_rows(num_classes: int, width: int) -> Float[Tensor, "K E"]:
    """The first rows of the orthogonal factor of a random square matrix (Text4Vis, eq. 5)."""
    return torch.linalg.qr(torch.randn(width, width))[0][:num_classes]


def span_projection(rows: Float[Tensor, "K W"], width: int) -> Float[Tensor, "W E"]:
    """A matrix that brings texts of W channels to E, and keeps the inner products of `rows` where there are at most E of them.

    Its columns are the right singular vectors of the rows, the largest first: they span the rows, and then what is orthogonal to
    them, of which other texts may have a part. Where W <= E all inner products are kept, and the last columns are 0. Of more
    than E rows the best approximation of rank E stays.
    """
    vectors = torch.linalg.svd(rows.double().cpu(), full_matrices=True).Vh.mT[:, :width]
    return torch.nn.functional.pad(vectors, (0, width - vectors.shape[1])).to(rows)
