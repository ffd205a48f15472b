"""The filter over frames against Conv1d."""

import pytest
import torch

from vcache.heads.temporal_conv import TemporalConvolution, filter_adjoint, filter_frames, taps_gradient


@pytest.mark.parametrize("num_frames", [1, 2, 4])
@pytest.mark.parametrize("shifted", [True, False])
def test_filter_equals_conv1d_plus_residual_in_outputs_and_gradients(num_frames, shifted):
    torch.manual_seed(0)
    B, T, N, D = 2, num_frames, 3, 5
    conv = TemporalConvolution(D).double()
    x, grad = torch.randn(2, B, T, N, D, dtype=torch.float64)
    shift = torch.randn(T, D, dtype=torch.float64) if shifted else torch.zeros(T, D, dtype=torch.float64)
    assert conv.bias is not None
    taps = conv.taps()

    expected = conv(x.requires_grad_(), shift)
    torch.testing.assert_close(filter_frames(x, taps, shift + conv.bias), expected)
    d_x, d_weight = torch.autograd.grad(expected, [x, conv.weight], grad)
    torch.testing.assert_close(filter_adjoint(grad, taps), d_x)
    got = torch.autograd.grad(taps, conv.weight, taps_gradient(x.detach(), grad))[0]
    torch.testing.assert_close(got, d_weight)


def test_without_shift_the_filter_is_linear_and_without_terms_x_itself():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    taps = TemporalConvolution(5).taps()
    torch.testing.assert_close(filter_frames(x, taps, None), filter_frames(x, taps, torch.zeros(3, 5)))
    assert filter_frames(x, None, None) is x


def test_sums_over_tokens_of_half_precision_are_in_float32():
    x = torch.full((1, 2, 5000, 3), 1.0, dtype=torch.bfloat16)  # a running sum in bfloat16 would stop at 256
    torch.testing.assert_close(taps_gradient(x, x), torch.tensor([[5000.0] * 3, [10000.0] * 3, [5000.0] * 3]))
