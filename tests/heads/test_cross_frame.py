"""Maps between adjacent frames and T-CA against explicit loops."""

import pytest
import torch
from torch import Tensor

from vcache.heads.cross_frame import (
    NEXT,
    PREV,
    TemporalCrossAttention,
    add_displacements,
    add_window_gradients,
    cross_frame_maps,
    displacement_windows,
    sum_windows,
)


def maps_by_loop(q: Tensor, k: Tensor) -> Tensor:
    B, T, H, N, d = q.shape
    maps = torch.zeros(B, T - 1, 2, N - 1, N - 1, dtype=q.dtype)
    for b in range(B):
        for pair in range(T - 1):
            for side, (query_frame, key_frame) in enumerate([(pair + 1, pair), (pair, pair + 1)]):
                for head in range(H):
                    for patch in range(1, N):
                        scores = k[b, key_frame, head, 1:] @ q[b, query_frame, head, patch] / d**0.5
                        maps[b, pair, side, patch - 1] += scores.softmax(dim=0) / H
    return maps


def tca_by_loop(tca: TemporalCrossAttention, maps: Tensor) -> Tensor:
    (h, w), (B, pairs) = tca.grid, maps.shape[:2]
    rows = []
    for frame in range(pairs + 1):
        out = torch.zeros(B, 1 + h * w, tca.w1.shape[1], dtype=maps.dtype)
        for q in range(h * w):
            for k in range(h * w):
                row, column = q // w - k // w + h - 1, q % w - k % w + w - 1
                index = row * (2 * w - 1) + column
                if frame > 0:
                    out[:, 1 + q] += maps[:, frame - 1, PREV, q, k, None] * tca.w1[index]
                if frame < pairs:
                    out[:, 1 + q] += maps[:, frame, NEXT, q, k, None] * tca.w2[index]
        rows.append(out)
    return tca.gain * torch.stack(rows, dim=1)


def test_maps_equal_an_explicit_loop():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 3, 7, 5, dtype=torch.float64)  # B=2, T=4, H=3, N=7, d=5
    torch.testing.assert_close(cross_frame_maps(q, k), maps_by_loop(q, k))


def test_maps_of_half_precision_are_computed_in_float32():
    q, k = torch.randn(2, 1, 3, 2, 5, 8, generator=torch.Generator().manual_seed(0)).half()
    maps = cross_frame_maps(q, k)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, cross_frame_maps(q.float(), k.float()), rtol=0, atol=0)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(1, 2, 2, 4))


def tca_and_maps(grid, pairs):
    """T-CA with drawn tables, as they start at zero, and maps of two clips."""
    torch.manual_seed(0)
    tca, P = TemporalCrossAttention(grid, width=4, gain=1.5).double(), grid[0] * grid[1]
    torch.nn.init.normal_(tca.w1)
    torch.nn.init.normal_(tca.w2)
    return tca, torch.rand(2, pairs, 2, P, P, dtype=torch.float64)


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (2, 9), (4, 4), (1, 1)])
@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_tca_equals_an_explicit_loop_in_output_and_gradients(grid, pairs):
    tca, maps = tca_and_maps(grid, pairs)
    y = torch.randn(2, pairs + 1, 1 + maps.shape[-1], 4, dtype=torch.float64, requires_grad=True)
    inputs = [y, tca.w1, tca.w2]

    expected = y + tca_by_loop(tca, maps) if pairs else y + 0 * (tca.w1.sum() + tca.w2.sum())
    got = tca(y.clone(), maps)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (2, 9), (1, 4), (1, 1)])
@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_tca_by_displacement_equals_the_table_in_output_and_gradients(grid, pairs):
    tca, maps = tca_and_maps(grid, pairs)
    y, grad = torch.randn(2, 2, pairs + 1, 1 + maps.shape[-1], 4, dtype=torch.float64)
    vectors = tca.vectors()
    windows = displacement_windows(vectors.detach(), grid)

    got = y.clone()
    add_displacements(got, maps, windows, grid)
    expected = tca(y, maps)
    torch.testing.assert_close(got, expected)
    d_windows = [torch.zeros_like(window) for window in windows]
    add_window_gradients(d_windows, grad, maps, grid)
    torch.testing.assert_close(
        torch.autograd.grad(vectors, [tca.w1, tca.w2], sum_windows(d_windows, grid)),
        torch.autograd.grad(expected, [tca.w1, tca.w2], grad),
    )


def test_tca_refuses_maps_that_want_a_gradient():
    tca = TemporalCrossAttention((1, 2), width=3)
    maps = torch.rand(1, 1, 2, 2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="maps must not require a gradient"):
        tca(torch.zeros(1, 2, 3, 3), maps)


def test_tca_accepts_maps_that_are_a_slice_of_a_larger_tensor():
    torch.manual_seed(0)
    tca = TemporalCrossAttention((2, 3), width=4)
    torch.nn.init.normal_(tca.w1)
    stored = torch.rand(2, 5, 2, 6, 6)
    every_second = stored[:, ::2]
    y = torch.zeros(2, 4, 7, 4)
    torch.testing.assert_close(tca(y.clone(), every_second), tca(y.clone(), every_second.contiguous()))
