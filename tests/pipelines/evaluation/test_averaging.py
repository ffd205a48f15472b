"""Means over views against NumPy, and heads that cannot be averaged in a way."""

import numpy as np
import pytest
import torch
from torch import nn

from vcache.heads.evl import EVL
from vcache.heads.linear import LinearHead
from vcache.pipelines.evaluation.averaging import Average, AverageError, ScoreMean, choose_average

VIEWS = np.random.default_rng(0).normal(size=(3, 7, 4), scale=5)
"""Outputs of 3 views of 7 videos, 4 classes."""


def mean(average: Average, views: np.ndarray = VIEWS, *, multi_label: bool = False) -> np.ndarray:
    collected = ScoreMean(average, multi_label=multi_label)
    for view in views:
        collected.add(torch.from_numpy(view))
    return collected.result().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_softmax_of_the_scores_is_the_mean_softmax() -> None:
    np.testing.assert_allclose(softmax(mean("softmax")), softmax(VIEWS).mean(axis=0), rtol=1e-12)


def test_sigmoid_of_the_scores_is_the_mean_sigmoid() -> None:
    np.testing.assert_allclose(sigmoid(mean("softmax", multi_label=True)), sigmoid(VIEWS).mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("average", ["logits", "embeddings"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_logits_and_embeddings_are_averaged_as_they_are(average: Average, multi_label: bool) -> None:
    np.testing.assert_allclose(mean(average, multi_label=multi_label), VIEWS.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_head_that_is_sure_keeps_its_ranks(multi_label: bool) -> None:
    views = VIEWS[:1] * np.array([1000, 2000, 500])[:, None, None]
    scores = mean("softmax", views, multi_label=multi_label)
    assert np.isfinite(scores).all()
    assert (scores.argsort(axis=1) == VIEWS[0].argsort(axis=1)).all()
    assert (softmax(VIEWS[0] * 100) == 0).any()  # probabilities themselves would have lost them


def test_a_head_is_averaged_as_it_says_and_else_by_softmax() -> None:
    head = LinearHead(LinearHead.Config(num_classes=3, width=5))
    assert choose_average(None, head, "linear") == "softmax"
    head.view_average = "embeddings"
    assert choose_average(None, head, "linear") == "embeddings"
    assert choose_average("logits", head, "linear") == "logits"


def test_ways_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(
        AverageError, match="--average 'median' is not there; head 'linear' has softmax, logits, embedd"
    ):
        choose_average("median", LinearHead(LinearHead.Config(num_classes=3, width=5)), "linear")
    with pytest.raises(
        AverageError, match="head 'evl' does not say what its embedding of a clip is; it has softmax, logits."
    ):
        choose_average("embeddings", EVL, "evl")
    assert choose_average(None, nn.Linear(2, 2), "bare") == "softmax"
