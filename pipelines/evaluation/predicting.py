"""What a head says of the videos of a split, put together from batches in any order, of one view or averaged over several."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.evaluation.averaging import Average, ScoreMean, has_embedding
from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics
from vcache.pipelines.loading.loader import Batch, ClipLoader

Targets = Int[Tensor, " M"] | Float[Tensor, "M _"]


class Predicted:
    """Collects outputs of a head on the CPU; several of them fill one each on one pass over the batches.

    predicted = [Predicted() for _ in heads]
    for batch in loader.in_order():
        for head, plan, collected in zip(heads, plans, predicted):
            collected.add(head(batch.features(plan)), batch.targets, batch.rows)
    """

    def __init__(self, num_outputs: int | None = None, *, multi_label: bool = False) -> None:
        """`num_outputs` and `multi_label` are for a rank that may get no batch: what it hands to the others has this shape."""
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._rows: list[Tensor] = []
        if num_outputs is not None:
            none = torch.zeros(0, num_outputs) if multi_label else torch.zeros(0, dtype=torch.int64)
            self.add(torch.zeros(0, num_outputs), none, np.zeros(0, dtype=np.int64))

    def add(
        self, outputs: Float[Tensor, "B K"], targets: Int[Tensor, " B"] | Float[Tensor, "B _"], rows: np.ndarray
    ) -> None:
        """Keep the outputs, as float32, for these rows of the split."""
        self._outputs.append(outputs.detach().float().cpu())
        self._targets.append(targets.cpu())
        self._rows.append(torch.from_numpy(rows))

    def gathered(self, gather: Callable[[Tensor], Tensor]) -> "Predicted":
        """The shares of all ranks; `gather` gives the rows of all of them, as `World.gather_rows` does."""
        joined = Predicted()
        outputs, targets, rows = (gather(torch.cat(parts)) for parts in (self._outputs, self._targets, self._rows))
        joined.add(outputs, targets, rows.cpu().numpy())
        return joined

    @property
    def rows(self) -> np.ndarray:
        """Rows of the split in ascending order, as the results are."""
        return torch.cat(self._rows).sort().values.numpy()

    def result(self, expected: np.ndarray | None = None) -> tuple[Float[Tensor, "M K"], Targets]:
        """Outputs and targets in the order of the rows; of `expected` rows, if given, neither more nor fewer.

        Raises:
            ValueError: a row was added twice, or not those that were expected: a mistake of whoever made the batches.
        """
        rows, order = torch.cat(self._rows).sort()
        if len(twice := rows[1:][rows[1:] == rows[:-1]]):
            raise ValueError(f"{len(twice)} rows were predicted twice, the first is {twice[0].item()}")
        if expected is not None and rows.tolist() != sorted(expected.tolist()):
            raise ValueError(f"{len(rows)} rows were predicted, and not the {len(expected)} that were expected")
        return torch.cat(self._outputs)[order], torch.cat(self._targets)[order]


@contextmanager
def evaluating(head: nn.Module) -> Iterator[nn.Module]:
    """The head without dropout and gradients; its training mode is given back as it was."""
    was_training = head.training
    head.eval()
    try:
        with torch.inference_mode():
            yield head
    finally:
        head.train(was_training)


def validate(head: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Metrics of a head on the videos of the batches, each once, in one view."""
    return compute_metrics(*predict_logits(head, batches))


def predict_logits(head: nn.Module, batches: Iterable[Batch]) -> tuple[Float[Tensor, "M K"], Targets]:
    """Logits and targets of all batches in the order of their rows, on the CPU."""
    return _predict(head, head, batches)


def predict_scores(
    head: nn.Module, loader: ClipLoader, average: Average = "softmax"
) -> tuple[Float[Tensor, "M K"], Targets]:
    """Scores and targets of the loader's videos: of one view the logits, of several what averaging.py makes of them."""
    if len(loader.views) == 1:
        return predict_logits(head, loader.in_order(loader.views[0]))
    mean, targets = None, None
    forward: Callable[[ClipFeatures], Tensor] = head.embed if average == "embeddings" else head  # type: ignore[assignment]
    for view in loader.views:
        outputs, targets = _predict(head, forward, loader.in_order(view))
        mean = mean or ScoreMean(average, multi_label=targets.ndim == 2)
        mean.add(outputs)
    assert mean is not None and targets is not None
    scores = mean.result()
    return (_classified(head, scores, loader) if average == "embeddings" else scores), targets


@dataclass(frozen=True)
class ClassesPart:
    """Some of the classes that a head tells apart by their text."""

    columns: tuple[int, ...] | None
    """Which of them; None: all."""
    give: Callable[[], None]
    """Has the head tell these apart, and no others."""


def predict_parts(
    head: nn.Module, loader: ClipLoader, average: Average, parts: Sequence[ClassesPart]
) -> tuple[list[Float[Tensor, "M _"]], Targets]:
    """Scores as of `predict_scores` for each part of the classes, and targets among all; a video goes through the head once.

    Where the head says what its embedding of a clip is, that is classified anew for each part: the probabilities of some classes
    are no part of those of all. Of another head no output depends on the other classes.
    """
    forward: Callable[[ClipFeatures], Tensor] = head.embed if has_embedding(head) else head  # type: ignore[assignment]
    views = (_predict(head, forward, loader.in_order(view)) for view in loader.views)
    outputs, targets = next(views)
    multi_label = targets.ndim == 2
    if average == "embeddings" and len(loader.views) > 1:
        mean = ScoreMean(average, multi_label=multi_label)
        for of_view in (outputs, *(x for x, _ in views)):
            mean.add(of_view)
        return [_of_part(head, mean.result(), loader, part) for part in parts], targets
    # Of one view the scores stay as they are.
    means = [ScoreMean(average if len(loader.views) > 1 else "logits", multi_label=multi_label) for _ in parts]
    for of_view in chain([outputs], (x for x, _ in views)):
        for part, of_part in zip(parts, means, strict=True):
            of_part.add(_of_part(head, of_view, loader, part))
    return [of_part.result() for of_part in means], targets


def _of_part(head: nn.Module, outputs: Tensor, loader: ClipLoader, part: ClassesPart) -> Float[Tensor, "M _"]:
    """What the head says of this part of the classes; `outputs` are embeddings if it says what these are."""
    if has_embedding(head):
        part.give()
        return _classified(head, outputs, loader)
    return outputs if part.columns is None else outputs[:, list(part.columns)]


def _predict(
    head: nn.Module, forward: Callable[[ClipFeatures], Tensor], batches: Iterable[Batch]
) -> tuple[Float[Tensor, "M K"], Targets]:
    predicted = Predicted()
    with evaluating(head):
        for batch in batches:
            predicted.add(forward(batch.features()), batch.targets, batch.rows)
    return predicted.result()


def _classified(head: nn.Module, embeddings: Float[Tensor, "M E"], loader: ClipLoader) -> Float[Tensor, "M K"]:
    """Logits of mean embeddings, a batch at a time on the device."""
    parts = embeddings.float().split(loader.batch_size)
    with evaluating(head):
        return torch.cat([head.classify_embedding(part.to(loader.device)).float().cpu() for part in parts])  # type: ignore[operator]
