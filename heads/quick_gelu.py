"""CLIP's activation."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

QUICK_GELU_SCALE = 1.702
"""s of x * sigmoid(s x), which is silu(s x) / s."""


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x). Its backward pass needs x alone, where autograd would keep the sigmoid as well."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        y: Tensor = _QuickGELU.apply(x)
        return y


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (QUICK_GELU_SCALE * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        z = QUICK_GELU_SCALE * x
        return torch.ops.aten.silu_backward.grad_input(d_y, z, grad_input=z)
