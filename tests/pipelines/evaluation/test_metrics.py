"""Metrics against scikit-learn on random scores, with ties, absent classes and fewer than five classes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, recall_score, top_k_accuracy_score
from torch import Tensor

from vcache.pipelines.evaluation.average_precision import average_precisions
from vcache.pipelines.evaluation.metrics import Metrics, ScoresError, compute_metrics, target_ranks


@st.composite
def single_label(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores of M videos and K classes, half of the time with many ties, and classes of which some may be absent."""
    num_videos, num_classes = draw(st.integers(1, 30)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.normal(size=(num_videos, num_classes))
    if draw(st.booleans()):
        scores = np.round(scores)
    targets = rng.integers(0, draw(st.integers(1, num_classes)), num_videos)
    return torch.from_numpy(scores), torch.from_numpy(targets)


@st.composite
def multi_label(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """The same with any number of classes per video, at least one in all."""
    scores, _ = draw(single_label())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    targets = (rng.random(scores.shape) < rng.random(scores.shape[1]) ** 2).astype(np.float32)
    targets[0, 0] = 1
    return scores, torch.from_numpy(targets)


@settings(max_examples=60, deadline=None)
@given(single_label())
def test_accuracies_and_loss_are_those_of_scikit_learn(drawn: tuple[Tensor, Tensor]) -> None:
    scores, targets = drawn
    num_classes = scores.shape[1]
    metrics, predicted = compute_metrics(scores, targets), scores.numpy().argmax(axis=1)
    assert metrics.num_videos == len(targets)
    assert metrics.top1 == pytest.approx(accuracy_score(targets, predicted))
    occurring = np.unique(targets)
    recall = recall_score(targets, predicted, labels=occurring, average="macro", zero_division=0)
    assert metrics.mean_class_accuracy == pytest.approx(recall)
    # It breaks ties towards the last class, so it is given the classes in reverse.
    turned = (num_classes - 1 - targets.numpy(), scores.numpy()[:, ::-1])
    expected = top_k_accuracy_score(*turned, k=5, labels=range(num_classes)) if num_classes > 5 else 1.0
    assert metrics.top5 == pytest.approx(expected)
    assert metrics.loss == pytest.approx(log_loss(targets, scores.softmax(dim=1), labels=range(num_classes)))
    assert (metrics.mean_average_precision, metrics.monitored, metrics.monitored_name) == (None, metrics.top1, "top-1")


@settings(max_examples=60, deadline=None)
@given(multi_label())
def test_average_precision_is_that_of_scikit_learn(drawn: tuple[Tensor, Tensor]) -> None:
    scores, targets = drawn
    metrics, occurring = compute_metrics(scores, targets), targets.any(dim=0).numpy()
    expected = [
        average_precision_score(targets[:, k], scores[:, k]) if occurs else np.nan for k, occurs in enumerate(occurring)
    ]
    np.testing.assert_allclose(average_precisions(scores.numpy(), targets.numpy() > 0), expected, rtol=1e-12)
    assert metrics.mean_average_precision == pytest.approx(np.nanmean(expected))
    probabilities = 1 / (1 + np.exp(-scores.numpy()))
    terms = np.where(targets.numpy() > 0, np.log(probabilities), np.log1p(-probabilities))
    assert metrics.loss == pytest.approx(-terms.mean())
    assert (metrics.top1, metrics.top5, metrics.mean_class_accuracy) == (None, None, None)
    assert (metrics.monitored, metrics.monitored_name) == (metrics.mean_average_precision, "mAP")


def test_of_equal_scores_the_first_class_is_ahead() -> None:
    assert target_ranks(torch.zeros(3, 3), torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    scores = torch.zeros(7, 3)
    scores[4, 1] = scores[6, 2] = bad
    for targets in (torch.zeros(7, dtype=torch.int64), torch.ones(7, 3)):
        with pytest.raises(ScoresError, match="scores of 2 of 7 videos are not finite numbers, the first of video 4 "):
            compute_metrics(scores, targets)


def test_a_class_that_is_excluded_outright_is_no_error() -> None:
    scores = torch.tensor([[-np.inf, 1.0, 0.0]])
    assert compute_metrics(scores, torch.tensor([1])).top1 == 1.0
    with pytest.raises(ScoresError, match="not finite"):
        compute_metrics(scores[:, :1], torch.tensor([0]))


def test_videos_without_truth_are_refused() -> None:
    with pytest.raises(ScoresError, match="2 of 4 videos have none of the 3 classes, the first is video 1 .* label -1"):
        compute_metrics(torch.zeros(4, 3), torch.tensor([0, -1, 2, 3]))
    with pytest.raises(ScoresError, match="none of 4 videos has a class"):
        compute_metrics(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ScoresError, match="nothing to measure: 0 videos, 3 classes"):
        compute_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_several_classes_are_told_by_the_shape_of_the_targets() -> None:
    several: Metrics = compute_metrics(torch.eye(3), torch.eye(3))
    assert (several.mean_average_precision, several.top1) == (1.0, None)
    assert compute_metrics(torch.eye(3), torch.arange(3)).top1 == 1.0
