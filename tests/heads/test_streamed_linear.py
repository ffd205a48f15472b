"""Linear layers of features that are made again: the same numbers as torch's, with nothing kept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vcache.heads import streamed_linear as module
from vcache.heads.streamed_linear import streamed_linear


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("clips_at_a_time", [1, 2, 9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_a_linear_layer_whatever_goes_together(monkeypatch, clips_at_a_time, with_bias):
    monkeypatch.setattr(module, "_CPU_CHUNK_ELEMENTS", clips_at_a_time * 3 * 4)
    x, weight = draw(5, 3, 4), draw(6, 4, seed=1).requires_grad_()
    bias = draw(6, seed=2).requires_grad_() if with_bias else None
    parameters = [weight] + ([] if bias is None else [bias])
    got, expected = streamed_linear(lambda: x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(got, expected)
    d_y = draw(5, 3, 6, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters, d_y), torch.autograd.grad(expected, parameters, d_y)
    )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_stored_numbers_become_those_of_the_weights_dtype(stored):
    x, weight = (3 * draw(2, 3, 4)).to(stored), draw(6, 4, dtype=torch.float32, seed=1).requires_grad_()
    got = streamed_linear(lambda: x, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.linear(x.float(), weight))


def test_a_part_is_made_of_a_few_clips_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK_ELEMENTS", 1)
    x, weight, seen = draw(3, 2, 8), draw(6, 4, seed=1).requires_grad_(), []

    def halves(some: Tensor) -> Tensor:
        seen.append(len(some))
        return some.unflatten(-1, (2, 4))

    got = streamed_linear(lambda: x, weight, as_rows=halves)
    torch.testing.assert_close(got, F.linear(x.unflatten(-1, (2, 4)), weight))
    got.sum().backward()
    assert seen == [1] * 6  # three clips, forward and backward


def test_the_features_are_asked_for_once_forward_and_once_backward():
    calls, x, weight = [], draw(2, 3, 4), draw(6, 4, seed=1).requires_grad_()

    def make() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x

    out = streamed_linear(make, weight)
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2


def test_a_frozen_weight_asks_for_no_features_again():
    calls, bias = [], draw(6).requires_grad_()
    streamed_linear(lambda: calls.append(1) or draw(2, 3, 4), draw(6, 4, seed=1), bias).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(bias.grad, torch.full((6,), 6.0, dtype=torch.float64))


def test_features_that_were_changed_in_place_give_no_gradient():  # which would be of other features than the output
    x, weight = draw(2, 3, 4), draw(6, 4, seed=1).requires_grad_()
    out = streamed_linear(lambda: x[:, 1:], weight)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between the forward and the backward pass"):
        out.sum().backward()


def test_of_no_clips_there_is_nothing_and_no_gradient():
    weight = draw(6, 4).requires_grad_()
    out = streamed_linear(lambda: draw(0, 3, 4), weight)
    assert out.shape == (0, 3, 6)
    out.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_products_are_in_its_dtype_and_gradients_in_the_weights(dtype):
    x, weight = draw(4, 3, 8, dtype=torch.float16), draw(6, 8, dtype=torch.float32, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        got, expected = streamed_linear(lambda: x, weight), F.linear(x, weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)
    got.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32
    (exact,) = torch.autograd.grad(F.linear(x.float(), weight).square().sum(), weight)
    torch.testing.assert_close(weight.grad, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


def test_under_autocast_gradients_are_summed_over_clips_in_float32(monkeypatch):  # bfloat16 counts to 256
    monkeypatch.setattr(module, "_CPU_CHUNK_ELEMENTS", 1)
    weight, bias = (torch.zeros(*shape, requires_grad=True) for shape in ((1, 1), (1,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = streamed_linear(lambda: torch.ones(301, 1, 1), weight, bias)
    out.float().sum().backward()
    assert (weight.grad.item(), bias.grad.item()) == (301, 301)
