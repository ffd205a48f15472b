"""Products of what is cheap to compute again: the same gradients as autograd's, and only the inputs kept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vcache.heads.recomputed import Convolution, Linear, recomputed


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def normalised(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, bias)


def assert_same_gradients(got: list[Tensor], expected: list[Tensor], inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected)
    weights = [torch.randn_like(y) for y in got]
    sums = [sum((y * w).sum() for y, w in zip(ys, weights, strict=True)) for ys in (got, expected)]
    ours, torchs = (torch.autograd.grad(total, inputs) for total in sums)
    torch.testing.assert_close(ours, torchs)


def test_two_linear_layers_of_one_norm():
    x, gain, bias, W_1, b_1, W_2 = (
        draw(2, 3, 5),
        draw(5, seed=1),
        draw(5, seed=2),
        draw(4, 5),
        draw(4),
        draw(6, 5, seed=3),
    )
    got = recomputed(normalised, (x, gain, bias), (Linear(), W_1, b_1), (Linear(), W_2, None))
    n = normalised(x, gain, bias)
    assert_same_gradients(list(got), [F.linear(n, W_1, b_1), F.linear(n, W_2)], [x, gain, bias, W_1, b_1, W_2])


@pytest.mark.parametrize(("padding", "stride"), [((1, 1), (1, 1)), ((1, 0), (1, 1)), ((0, 0), (2, 1))])
def test_a_convolution_of_an_activation(padding, stride):
    x, bias = draw(2, 4, 5, 3), draw(6)
    weight = draw(6, 3, stride[0] + 1 if padding[0] == 0 else 3, 3 if padding[1] else 1, seed=1)
    (got,) = recomputed(F.silu, (x,), (Convolution(padding=padding, stride=stride), weight, bias))
    assert got.is_contiguous()
    torchs = F.conv2d(F.silu(x).permute(0, 3, 1, 2), weight, bias, stride=stride, padding=padding).permute(0, 2, 3, 1)
    assert_same_gradients([got], [torchs], [x, weight, bias])


def test_inputs_that_need_no_gradient_get_none():
    x, weight = draw(2, 3).detach(), draw(4, 3)
    (y,) = recomputed(F.silu, (x,), (Linear(), weight, None))
    y.sum().backward()
    assert x.grad is None and weight.grad is not None


def test_what_the_function_gives_is_not_kept():
    x, weight, saved = draw(50, 7), draw(4, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        recomputed(F.silu, (x,), (Linear(), weight, None))
    assert {t.untyped_storage().data_ptr() for t in saved} == {t.untyped_storage().data_ptr() for t in (x, weight)}
