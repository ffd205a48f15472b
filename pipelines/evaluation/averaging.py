"""How the views of a video become one answer. The papers differ:

    softmax      mean of the probabilities. EVL and AIM; DiST sums them, which ranks the same
    logits       mean of what the softmax is taken of
    embeddings   mean of the vectors that the classifier gets, then the classifier once. Text4Vis, of vectors not normalised

Where a video may have several classes, "softmax" is the mean of the sigmoids.
"""

import math
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Average = Literal["softmax", "logits", "embeddings"]


class AverageError(ValueError):
    """A way to average that there is not, or that the head does not have."""


def choose_average(asked: str | None, head: Any, name: str) -> Average:
    """What was asked for, else what the head names as its paper's choice (`view_average`), else "softmax".

    Raises:
        AverageError: there is no such way, or the head says nothing of its embedding.
    """
    ways = [way for way in get_args(Average) if way != "embeddings" or has_embedding(head)]
    wanted = asked or getattr(head, "view_average", "softmax")
    if wanted not in get_args(Average):
        raise AverageError(f"--average {wanted!r} is not there; head {name!r} has {', '.join(ways)}.")
    if wanted not in ways:
        raise AverageError(
            f"--average {wanted}: head {name!r} does not say what its embedding of a clip is; it has {', '.join(ways)}."
        )
    return cast(Average, wanted)


def has_embedding(head: Any) -> bool:
    """Whether the head says what its embedding of a clip is, and classifies it."""
    return hasattr(head, "embed") and hasattr(head, "classify_embedding")


class ScoreMean:
    """The mean over views in float64, a view at a time. Probabilities are kept as logarithms, in which one that float32 would
    round to 0 still has its rank."""

    def __init__(self, average: Average, *, multi_label: bool) -> None:
        self.multi_label = multi_label
        self.num_views = 0
        self._of_probabilities = average == "softmax"
        self._totals: list[Tensor] = []

    def add(self, outputs: Float[Tensor, "M K"]) -> None:
        """The outputs of one more view, of the same videos in the same order."""
        terms = self._terms(outputs.double())
        sum_of = torch.logaddexp if self._of_probabilities else torch.add
        self._totals = [sum_of(*pair) for pair in zip(self._totals, terms, strict=True)] if self._totals else terms
        self.num_views += 1

    def result(self) -> Float[Tensor, "M K"]:
        """Scores of which softmax, or of several classes per video sigmoid, makes the mean probability; else the mean outputs."""
        if not self._of_probabilities:
            return self._totals[0] / self.num_views
        if self.multi_label:
            with_class, without = self._totals
            return with_class - without
        return self._totals[0] - math.log(self.num_views)

    def _terms(self, outputs: Tensor) -> list[Tensor]:
        if not self._of_probabilities:
            return [outputs]
        if self.multi_label:
            return [torch.nn.functional.logsigmoid(outputs), torch.nn.functional.logsigmoid(-outputs)]
        return [outputs.log_softmax(dim=1)]
