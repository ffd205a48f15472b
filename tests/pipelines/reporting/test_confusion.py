"""Confusions, intervals and examples against other implementations and against what they promise."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.reporting.class_sections import wilson_interval
from vcache.pipelines.reporting.confusion import Confusion, confusion_of
from vcache.pipelines.reporting.examples import choose_examples

Make = Callable[..., Predictions]


@pytest.mark.parametrize(("num_videos", "num_classes"), [(40, 3), (200, 11)])
def test_the_matrix_is_that_of_scikit_learn(made_predictions: Make, num_videos: int, num_classes: int) -> None:
    predictions = made_predictions(num_videos, num_classes)
    confusion = confusion_of(predictions, predictions.class_names or ())
    expected = confusion_matrix(predictions.targets, predictions.scores.argmax(axis=1), labels=range(num_classes))
    np.testing.assert_array_equal(confusion.counts, expected)


def test_pairs_are_the_mistakes_the_most_frequent_first(made_predictions: Make) -> None:
    predictions = made_predictions(300, 7)
    confusion = confusion_of(predictions, predictions.class_names or ())
    pairs = confusion.pairs(1000)
    assert sum(number for *_, number in pairs) == (predictions.scores.argmax(axis=1) != predictions.targets).sum()
    assert [number for *_, number in pairs] == sorted((number for *_, number in pairs), reverse=True)
    assert all(confusion.counts[row, column] == number and row != column for row, column, number in pairs)
    assert confusion.pairs(3) == pairs[:3]


def test_the_block_holds_the_classes_that_are_confused_with_each_other() -> None:
    counts = np.diag(np.full(9, 5))
    for row, column, number in ((2, 7, 4), (7, 2, 1), (5, 2, 2), (0, 8, 3)):
        counts[row, column] = number
    confusion = Confusion(counts, tuple("abcdefghi"))
    assert confusion.block(2) == [2, 7]
    assert confusion.block(3) == [2, 5, 7]
    assert confusion.block(5) == [0, 2, 5, 7, 8]
    assert confusion.block(9) == [0, 2, 5, 7, 8]  # nobody takes the others for anything
    assert confusion.part([2, 5, 7]).counts.tolist() == [[5, 0, 4], [2, 5, 0], [1, 0, 5]]
    assert Confusion(np.diag(np.full(4, 5)), tuple("abcd")).block(3) == []


@pytest.mark.parametrize(("hits", "number"), [(0, 4), (4, 4), (7, 20), (1, 1), (350, 1000)])
def test_the_interval_is_that_of_scipy(hits: int, number: int) -> None:
    expected = binomtest(hits, number).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / number, number) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_examples_are_the_surest_and_differ_in_their_classes(made_predictions: Make, several: bool) -> None:
    predictions = made_predictions(400, 6, several=several)
    right, wrong = choose_examples(predictions, 5)
    assert predictions.targets is not None and predictions.class_names is not None and predictions.video_ids is not None
    best = predictions.scores.argmax(axis=1)
    hit = predictions.targets[range(400), best] > 0 if several else best == predictions.targets
    probabilities = predictions.probabilities().numpy()
    for examples, of in ((right, hit), (wrong, ~hit)):
        assert [one.probability for one in examples] == sorted((one.probability for one in examples), reverse=True)
        rows = [predictions.video_ids.index(one.video_id) for one in examples]
        assert of[rows].all() and len(rows) == len(set(rows)) == 5
        assert [one.predicted for one in examples] == [predictions.class_names[best[row]] for row in rows]
        assert examples[0].probability == pytest.approx(probabilities[of].max(axis=1).max())
    assert len({one.predicted for one in right}) == 5
    assert all(one.predicted not in one.labels and one.of_label <= one.probability for one in wrong)
    assert choose_examples(predictions, 0) == ([], [])
