"""The table of classes against scikit-learn's confusion matrix, and against the definition where videos have several classes."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix

from vcache.pipelines.evaluation.metrics import ScoresError
from vcache.pipelines.evaluation.per_class import ClassMetrics, class_metrics, worst_first

NAMES = ("a", "b", "c", "d", "e")
K = len(NAMES)


@pytest.mark.parametrize("seed", range(8))
def test_top1_and_confusions_are_those_of_the_confusion_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets, scores = rng.integers(0, K - 1, 30), rng.integers(0, 4, (30, K)).astype(np.float64)  # many ties, no "e"
    matrix = confusion_matrix(targets, scores.argmax(axis=1), labels=range(K))
    rows = class_metrics(torch.from_numpy(scores), torch.from_numpy(targets), NAMES)
    for k, row in enumerate(rows):
        size, wrong = matrix[k].sum(), np.where(np.arange(K) == k, 0, matrix[k])
        assert (row.name, row.num_videos, row.average_precision) == (NAMES[k], size, None)
        assert row.top1 == (pytest.approx(matrix[k, k] / size) if size else None)
        assert (row.confused_with, row.num_confused) == (NAMES[wrong.argmax()] if wrong.any() else None, wrong.max())


@pytest.mark.parametrize("seed", range(8))
def test_of_several_classes_a_wrong_one_counts_where_it_is_ahead_of_a_right_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets, scores = (rng.random((13, K)) < [0.5, 0.3, 0.2, 0.9, 0.0]).astype(np.float32), rng.normal(size=(13, K))
    targets[3] = 1  # a video of all classes
    counts = np.zeros((K, K), dtype=int)
    for row in range(13):
        wrong = [k for k in range(K) if not targets[row, k]]
        for k in np.flatnonzero(targets[row]):
            if wrong and scores[row, best := max(wrong, key=lambda j: scores[row, j])] > scores[row, k]:
                counts[k, best] += 1
    for k, row in enumerate(class_metrics(torch.from_numpy(scores), torch.from_numpy(targets), NAMES)):
        assert (row.num_videos, row.top1) == (targets[:, k].sum(), None)
        assert row.average_precision == pytest.approx(average_precision_score(targets[:, k], scores[:, k]))
        assert row.num_confused == counts[k].max()
        assert row.confused_with == (NAMES[counts[k].argmax()] if counts[k].any() else None)


def test_the_worst_class_is_first_and_those_without_a_video_are_left_out() -> None:
    rows = [
        ClassMetrics(name="good", num_videos=2, top1=1.0),
        ClassMetrics(name="absent", num_videos=0),
        ClassMetrics(name="small", num_videos=2, top1=0.5),
        ClassMetrics(name="large", num_videos=4, top1=0.5),
        ClassMetrics(name="bad", num_videos=1, top1=0.0),
    ]
    assert [row.name for row in worst_first(rows)] == ["bad", "large", "small", "good"]


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    with pytest.raises(ScoresError, match="not finite"):
        class_metrics(torch.full((2, K), torch.nan), torch.tensor([0, 1]), NAMES)
