"""Linear CKA added up batch by batch is that of the full matrices, and has the invariances that it is used for."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.pipelines.cka import Scatter


def draw(num: int, width: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def scattered(*features: torch.Tensor, batch: int = 1000) -> Scatter:
    scatter = Scatter()
    for parts in zip(*(x.split(batch) for x in features), strict=True):
        scatter.add(list(parts))
    return scatter


def direct(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of the n x n kernels, with the centring matrix: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), eq. 3 of the paper."""
    a, b = x.double().numpy(), y.double().numpy()
    centring = np.eye(len(a)) - 1 / len(a)
    k, m = (centring @ (z @ z.T) @ centring for z in (a, b))
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(3, 40), p=st.integers(1, 7), q=st.integers(1, 6), batch=st.integers(1, 11), seed=st.integers(0, 99)
)
def test_any_batches_give_what_the_full_kernels_give(num: int, p: int, q: int, batch: int, seed: int) -> None:
    x, z = draw(num, p, seed, mean=3.0), draw(num, 5, seed + 500)
    y = x @ draw(p, q, seed + 100) + draw(num, q, seed + 200, mean=-4.0)
    got = scattered(x, y, z, batch=batch)
    assert got.num_examples == num
    for (a, one), (b, other) in itertools.product(enumerate((x, y, z)), repeat=2):
        assert got.cka(a, b) == pytest.approx(direct(one, other), abs=1e-9)


def test_a_large_mean_costs_no_digits() -> None:
    x, y = draw(300, 6, 0), draw(300, 4, 1)
    y = y + x[:, :4]
    plain = scattered(x, y, batch=7).cka(0, 1)
    assert scattered(x + 1e6, y - 1e5, batch=7).cka(0, 1) == pytest.approx(plain, rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3), width=st.integers(1, 8))
def test_rotation_and_scaling_of_one_change_nothing_and_give_1_against_itself(
    seed: int, scale: float, width: int
) -> None:
    x, y = draw(50, width, seed), draw(50, 3, seed + 1)
    rotation, _ = torch.linalg.qr(draw(width, width, seed + 2))
    turned = scale * (x @ rotation) + 5
    scatter = scattered(x, y, turned, batch=9)
    assert scatter.cka(0, 0) == pytest.approx(1) == scatter.cka(0, 2)
    assert scatter.cka(2, 1) == pytest.approx(scatter.cka(0, 1), rel=1e-6) == pytest.approx(scatter.cka(1, 0))


def test_stretching_one_axis_is_no_invariance() -> None:
    x = draw(200, 5, 0)
    stretched = x * torch.tensor([100.0, 1, 1, 1, 1])
    assert scattered(x, stretched).cka(0, 1) < 0.6


def test_unrelated_features_are_near_0_where_examples_are_many_and_near_chance_where_they_are_few() -> None:
    many = scattered(draw(20_000, 12, 0), draw(20_000, 7, 1), batch=512)
    assert many.cka(0, 1) < 0.002
    few = scattered(draw(30, 12, 0), draw(30, 20, 1))
    assert few.cka(0, 1) > 0.25 and few.cka_by_chance(0, 1) == pytest.approx(few.cka(0, 1), abs=0.12)


def test_chance_is_the_mean_over_all_pairings() -> None:
    x, y = draw(5, 3, 0, mean=2.0), draw(5, 2, 1)
    mean = np.mean([scattered(x, y[list(order)]).cka(0, 1) for order in itertools.permutations(range(5))])
    assert scattered(x, y).cka_by_chance(0, 1) == pytest.approx(float(mean))


def test_features_that_never_change_have_no_similarity() -> None:
    assert np.isnan(scattered(torch.full((8, 3), 2.0), draw(8, 2, 0)).cka(0, 1))


def test_other_widths_in_a_later_batch_are_refused() -> None:
    scatter = scattered(draw(4, 3, 0), draw(4, 2, 1))
    with pytest.raises(ValueError, match=r"end at the channels \[3, 6\], those before at \[3, 5\]"):
        scatter.add([draw(4, 3, 0), draw(4, 3, 1)])
