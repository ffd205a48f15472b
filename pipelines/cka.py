"""Linear CKA of features that are never all in memory: exact, in one pass, in float64.

Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", eq. 3 with linear kernels: of centred features X
(n, p) and Y (n, q) of the same n examples,

    CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|)          Frobenius norms

1 where one is a rotation and scaling of the other, 0 where no channel of one is correlated with any of the other.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Scatter:
    """X^T X, X^T Y and Y^T Y of several features X, Y, ... of the same examples, centred, added up batch by batch.

    Batches are centred on their own means and put together with those of the means (Chan et al. 1982): raw sums of squares would
    lose the digits of features whose mean is large beside their deviation, as some channels of CLIP have. Memory is a matrix of
    all channels squared, whatever the number of examples.
    """

    def __init__(self) -> None:
        self.num_examples = 0
        self._ends: list[int] = []
        self._mean: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, features: list[Float[Tensor, "n _"]]) -> None:
        """More examples: of each of the features a matrix, always in the same order and of the same widths."""
        batch, ends = _joined(features)
        num, mean = len(batch), batch.mean(dim=0)
        centred = batch - mean
        products = centred.mT @ centred
        if self._mean is None or self._products is None:
            self.num_examples, self._ends, self._mean, self._products = num, ends, mean, products
            return
        if ends != self._ends:
            raise ValueError(f"features end at the channels {ends}, those before at {self._ends}")
        total, shift = self.num_examples + num, mean - self._mean
        self._products += products + (self.num_examples * num / total) * shift.outer(shift)
        self._mean += (num / total) * shift
        self.num_examples = total

    def cka(self, a: int, b: int) -> float:
        """Of two of the features, by their places in the lists; NaN where one of them is the same in all examples."""
        cross, own_a, own_b = self._between(a, b), self._between(a, a), self._between(b, b)
        return float(cross.square().sum() / (own_a.norm() * own_b.norm()))

    def cka_by_chance(self, a: int, b: int) -> float:
        """What CKA is on average over all ways to pair the examples of one with those of the other.

        It tells how far few examples alone raise it: about sqrt(pq) / n of p and q channels without correlations.
        """
        own_a, own_b = self._between(a, a), self._between(b, b)
        by_chance = own_a.trace() * own_b.trace() / max(1, self.num_examples - 1)
        return float(by_chance / (own_a.norm() * own_b.norm()))

    def _between(self, a: int, b: int) -> Float[Tensor, "p q"]:
        assert self._products is not None, "no examples were added"
        starts = [0, *self._ends]
        return self._products[starts[a] : self._ends[a], starts[b] : self._ends[b]]


def _joined(features: list[Float[Tensor, "n _"]]) -> tuple[Float[Tensor, "n channels"], list[int]]:
    """All channels side by side in float64, and where each of the features ends."""
    ends, at = [], 0
    for one in features:
        at += one.shape[1]
        ends.append(at)
    return torch.cat([one.double() for one in features], dim=1), ends
