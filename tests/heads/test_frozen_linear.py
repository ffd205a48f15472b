"""Frozen weights in half precision: the products of converted weights, and no converted weight is kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vcache.heads.frozen_linear import cast_linear
from vcache.heads.quick_gelu import QuickGELU

WIDTH_IN, WIDTH_OUT = 7, 5


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept_by(make: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = make()
    return y, saved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_outputs_and_gradients_are_those_of_the_converted_weight(dtype):
    x, weight, bias = (
        draw(2, 3, WIDTH_IN).requires_grad_(),
        draw(WIDTH_OUT, WIDTH_IN, seed=1, dtype=dtype),
        draw(WIDTH_OUT, seed=2, dtype=dtype),
    )
    got, expected = cast_linear(x, weight, bias), F.linear(x, weight.float(), bias.float())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    d_y = draw(2, 3, WIDTH_OUT, seed=3)
    ours, torchs = (torch.autograd.grad(y, x, d_y)[0] for y in (got, expected))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("bias", [draw(WIDTH_OUT, dtype=torch.float16), None], ids=["bias", "no bias"])
def test_the_frozen_weight_is_kept_as_it_is_stored(bias):
    weight = draw(WIDTH_OUT, WIDTH_IN, dtype=torch.float16)
    _, saved = kept_by(lambda: cast_linear(draw(3, WIDTH_IN).requires_grad_(), weight, bias))
    assert [x.data_ptr() for x in saved] == [weight.data_ptr()]


def test_under_autocast_no_converted_weight_is_kept_either():
    x, weight = draw(3, WIDTH_IN).requires_grad_(), draw(WIDTH_OUT, WIDTH_IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, saved = kept_by(lambda: cast_linear(x, weight, None))
        expected = F.linear(x, weight)
    assert [s.data_ptr() for s in saved] == [weight.data_ptr()]
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (ours,), (torchs,) = (torch.autograd.grad(each.float().square().sum(), x) for each in (y, expected))
    torch.testing.assert_close(ours, torchs, rtol=1e-2, atol=1e-2)


def test_a_trained_weight_of_another_dtype_gets_its_gradient():
    x, weight = draw(3, WIDTH_IN, dtype=torch.bfloat16), draw(WIDTH_OUT, WIDTH_IN, seed=1).requires_grad_()
    cast_linear(x, weight, None).float().sum().backward()
    torch.testing.assert_close(weight.grad, x.float().sum(dim=0).expand(WIDTH_OUT, WIDTH_IN), rtol=1e-2, atol=1e-2)


def test_quick_gelu_is_its_formula_with_the_gradients_of_autograd():
    x = draw(3, 11).double().requires_grad_()
    y, saved = kept_by(lambda: QuickGELU()(x))
    assert [s.data_ptr() for s in saved] == [x.data_ptr()]
    torch.testing.assert_close(y, x * torch.sigmoid(1.702 * x), rtol=0, atol=0)
    assert torch.autograd.gradcheck(QuickGELU(), x)
