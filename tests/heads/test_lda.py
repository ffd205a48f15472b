"""Discriminant analysis against scikit-learn's, and where there is nothing to analyse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from vcache.heads.lda import discriminants

SIZES = st.lists(st.integers(1, 9), min_size=3, max_size=6)
"""Clips of each class: with two classes scikit-learn gives one row."""


def draw(sizes: list[int], channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips of classes apart from one another, in any order, of channels of different sizes, far from the origin."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres, mixing = rng.normal(size=(len(sizes), channels)), rng.normal(size=(channels, channels))
    features = 3 * centres[labels] + rng.normal(size=(len(labels), channels)) @ mixing
    features = (features + 20) * rng.uniform(0.1, 10, size=channels)
    return torch.from_numpy(features), torch.from_numpy(labels)


def up_to_a_factor(rows: Tensor) -> Tensor:
    """Releases of scikit-learn differ in whether the covariance is over N or N - K."""
    return rows / rows.norm()


@given(sizes=SIZES, channels=st.integers(2, 8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_rows_are_the_coefficients_of_scikit_learn(sizes: list[int], channels: int, seed: int) -> None:
    """Classes of any sizes; more channels than clips, too, where the covariance is singular."""
    sizes = [sizes[0] + 1, *sizes[1:]]  # two of one class there must be
    features, labels = draw(sizes, channels, seed)
    found = discriminants(features, labels, len(sizes))
    expected = torch.from_numpy(LinearDiscriminantAnalysis().fit(features.numpy(), labels.numpy()).coef_)
    torch.testing.assert_close(up_to_a_factor(found), up_to_a_factor(expected), rtol=1e-5, atol=1e-6)


@given(sizes=SIZES, channels=st.integers(2, 8), seed=st.integers(0, 2**32 - 1), shrinkage=st.floats(0.01, 1.0))
@settings(max_examples=40, deadline=None)
def test_with_shrinkage_they_are_so_once_the_mean_is_taken_out(
    sizes: list[int], channels: int, seed: int, shrinkage: float
) -> None:
    features, labels = draw([size + 1 for size in sizes], channels, seed)
    found = discriminants(features, labels, len(sizes), shrinkage=shrinkage)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(other.coef_ - other.priors_ @ other.coef_)
    torch.testing.assert_close(up_to_a_factor(found), up_to_a_factor(expected), rtol=1e-5, atol=1e-6)


def test_shrinkage_is_that_of_the_solver_eigen() -> None:
    features, labels = draw([4, 9, 6], 5, seed=3)
    other = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.3).fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(other.coef_ - other.priors_ @ other.coef_)
    torch.testing.assert_close(discriminants(features, labels, 3, shrinkage=0.3), expected, rtol=1e-8, atol=1e-10)


def test_a_channel_that_is_constant_within_classes_has_no_part() -> None:
    features, labels = draw([5, 4, 7], 4, seed=1)
    features[:, 2] = torch.tensor(0.1).double()  # the mean of which is not 0.1 to the last bit
    rows = discriminants(features, labels, 3)
    others = torch.tensor([0, 1, 3])
    assert rows[:, 2].tolist() == [0, 0, 0]
    torch.testing.assert_close(rows[:, others], discriminants(features[:, others], labels, 3))


def test_the_rows_tell_classes_apart_that_differ_where_others_vary_most() -> None:
    """The means differ in a channel of small variance; what varies most says nothing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 4, generator=generator) * torch.tensor([0.1, 30.0, 30.0, 0.1])
    features[:, 0] += labels
    features[:, 3] -= labels.square()
    rows = discriminants(features, labels, 3)
    scores = (features.double() - features.double().mean(dim=0)) @ rows.mT
    offsets = 0.5 * torch.stack(
        [(features[labels == k].double().mean(dim=0) - features.mean(dim=0)) @ rows[k] for k in range(3)]
    )
    assert ((scores - offsets).argmax(dim=1) == labels).float().mean() > 0.98


def test_too_few_clips_are_refused() -> None:
    features, labels = draw([3, 2, 2], 4, seed=0)
    with pytest.raises(ValueError, match="clips of every class, and class 3 has none"):
        discriminants(features, labels, 4)
    with pytest.raises(ValueError, match="class 3 and 2 more have none"):
        discriminants(features, labels, 6)
    with pytest.raises(ValueError, match="as two of one class do"):
        discriminants(*draw([1, 1, 1], 4, seed=0), 3)
