"""Which videos a report shows: those that a head is most sure of, where it is right and where it is wrong."""

from dataclasses import dataclass

import numpy as np

from vcache.pipelines.evaluation.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class Example:
    """One video and what the head says of it."""

    video_id: str
    path: str
    labels: tuple[str, ...]
    predicted: str
    """The class that is meant: of a right video the best of its own, of a wrong one the best that is none of its own."""
    probability: float
    """Of that class."""
    of_label: float
    """Of its label; where it has several, of the best of them."""
    right: bool


def choose_examples(predictions: Predictions, most: int) -> tuple[list[Example], list[Example]]:
    """(right, wrong): up to `most` of each, the surest first. Of right ones one of each class, of wrong ones one of each pair of
    class and mistake, so that one class does not take all places.

    Raises:
        PredictionsError: the predictions come without targets.
    """
    several = predictions.target_tensor().ndim == 2
    targets, probabilities = predictions.targets, predictions.probabilities().numpy()
    assert targets is not None
    relevant = targets > 0 if several else np.eye(probabilities.shape[1], dtype=np.bool_)[targets]
    # Ties go to the class that comes first, as in the metrics: argmax of the scores, which are not rounded.
    own = np.where(relevant, predictions.scores, -np.inf).argmax(axis=1)
    other = np.where(relevant, -np.inf, predictions.scores).argmax(axis=1)
    best = predictions.scores.argmax(axis=1)
    right = relevant[np.arange(len(best)), best]
    chosen = ([], [])  # type: tuple[list[Example], list[Example]]
    for is_right, said in ((True, own), (False, other)):
        rows = np.flatnonzero((right == is_right) & relevant.any(axis=1))
        sure = probabilities[rows, said[rows]]
        seen: set[tuple[int, int]] = set()
        for row in rows[np.argsort(-sure, kind="stable")]:
            pair = (int(own[row]), int(said[row]))
            if pair in seen or len(seen) == most:
                continue
            seen.add(pair)
            chosen[0 if is_right else 1].append(
                _example(predictions, probabilities, relevant, int(row), int(said[row]), int(own[row]), is_right)
            )
    return chosen


def _example(
    predictions: Predictions,
    probabilities: np.ndarray,
    relevant: np.ndarray,
    row: int,
    said: int,
    own: int,
    right: bool,
) -> Example:
    names = predictions.class_names or tuple(map(str, range(probabilities.shape[1])))
    return Example(
        video_id=predictions.video_ids[row] if predictions.video_ids else str(row),
        path=predictions.paths[row] if predictions.paths else "",
        labels=tuple(names[k] for k in np.flatnonzero(relevant[row])),
        predicted=names[said],
        probability=float(probabilities[row, said]),
        of_label=float(probabilities[row, own]),
        right=right,
    )
