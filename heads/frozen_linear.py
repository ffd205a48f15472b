"""Linear layers whose weights are kept in another dtype than they compute in, as frozen ones are to take half the memory.

Autograd would keep the converted weight until the backward pass: of a float16 block all of it once more, as float32. Of a frozen
weight the stored one is kept, which is there anyway, and converted again for the gradient of the input.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vcache.heads.modulated_pooling import compute_dtype, without_autocast


def cast_linear(
    x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*batch o"]:
    """F.linear in the dtype of x; under autocast in that of autocast."""
    dtype = compute_dtype(x)
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if frozen and weight.dtype != dtype and x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _FrozenLinear.apply(x, weight, bias, dtype)
        return y
    if dtype == x.dtype:  # otherwise autocast converts, and keeps a trained weight for the next use
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.input_dtype, ctx.dtype = x.dtype, dtype
        with without_autocast(x.device.type):
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        with without_autocast(d_y.device.type):
            return (d_y @ weight.to(ctx.dtype)).to(ctx.input_dtype), None, None, None
