"""Linear layers and convolutions of a cheap function of what is kept: its result is made again for the gradients.

Autograd would keep n = LayerNorm(x) for the weights of the linear layer behind it, and x for the LayerNorm. Of activations and
norms the result is as large as x and takes a few hundredths of the time of the products around it, so that x alone is kept (of
DiST at ViT-B/16, with the tokens of streamed_linear.py, 170 MB a clip in place of 430):

    y_i = op_i(f(x, ...))          one f, several ops of its result; backward makes f(x, ...) once more and drops it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vcache.heads.modulated_pooling import compute_dtype, without_autocast

Gradients = tuple[Tensor | None, Tensor, Tensor | None]
"""Of the input, the weight and the bias."""


@dataclass(frozen=True)
class Linear:
    """Of the last axis."""

    def __call__(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(h, weight, bias)

    def gradients(self, d_y: Tensor, h: Tensor, weight: Tensor, has_bias: bool, of_input: bool) -> Gradients:
        rows = d_y.flatten(0, -2)
        d_bias = rows.sum(dim=0, dtype=torch.promote_types(d_y.dtype, torch.float32)) if has_bias else None
        return d_y @ weight if of_input else None, rows.mT @ h.flatten(0, -2), d_bias


@dataclass(frozen=True)
class Convolution:
    """Over the two axes before the last, of (image, row, column, channel): channels_last memory, and no copy is made."""

    padding: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)

    def __call__(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(h.permute(0, 3, 1, 2), weight, bias, stride=self.stride, padding=self.padding)
        return y.permute(0, 2, 3, 1).contiguous()  # it is, unless the library chose otherwise

    def gradients(self, d_y: Tensor, h: Tensor, weight: Tensor, has_bias: bool, of_input: bool) -> Gradients:
        x, d_y = h.permute(0, 3, 1, 2), d_y.permute(0, 3, 1, 2)
        needed = [of_input, True, has_bias]
        d_x, d_weight, d_bias = torch.ops.aten.convolution_backward(
            d_y, x, weight, [len(weight)], self.stride, self.padding, [1, 1], False, [0, 0], 1, needed
        )
        return None if d_x is None else d_x.permute(0, 2, 3, 1), d_weight, d_bias


Operation = Linear | Convolution
Step = tuple[Operation, Tensor, Tensor | None]
"""An operation, its weight and its bias."""


def recomputed(function: Callable[..., Tensor], inputs: Sequence[Tensor], *steps: Step) -> tuple[Tensor, ...]:
    """op(function(*inputs), weight, bias) of each step; `function` gives the same whenever it is called.

    Under autocast the products are in its dtype, and so is what they give.
    """
    operations = tuple(operation for operation, _, _ in steps)
    parameters = [tensor for _, weight, bias in steps for tensor in (weight, bias)]
    return _Recomputed.apply(function, operations, compute_dtype(steps[0][1]), *parameters, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], operations: tuple[Operation, ...], dtype: torch.dtype,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.function, ctx.operations, ctx.dtype = function, operations, dtype
        ctx.save_for_backward(*tensors)
        parameters, inputs = tensors[: 2 * len(operations)], tensors[2 * len(operations) :]
        with without_autocast(inputs[0].device.type):  # every dtype is chosen by hand
            h = function(*inputs).to(dtype)
            low: list[Any] = [None if parameter is None else parameter.to(dtype) for parameter in parameters]
            return tuple(op(h, low[2 * i], low[2 * i + 1]) for i, op in enumerate(operations))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_ys: Tensor) -> tuple[Tensor | None, ...]:
        count = 2 * len(ctx.operations)
        parameters, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs = ctx.needs_input_grad[3 + count :]
        with without_autocast(kept[0].device.type):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_(need) for x, need in zip(kept, needs, strict=True)]
                made = ctx.function(*inputs)
            h, d_h, d_parameters = made.detach().to(ctx.dtype), torch.empty(0), list[Tensor | None]()
            for i, (operation, d_y) in enumerate(zip(ctx.operations, d_ys, strict=True)):
                weight, bias = parameters[2 * i : 2 * i + 2]
                d_x, *d_both = operation.gradients(d_y, h, weight.to(ctx.dtype), bias is not None, any(needs))
                if d_x is not None:
                    d_h = d_h.add_(d_x) if i else d_x
                d_parameters += [None if d is None else d.to(weight.dtype) for d in d_both]
            del h
            wanted = [x for x in inputs if x.requires_grad]
            d_wanted = iter(torch.autograd.grad(made, wanted, d_h.to(made.dtype)) if wanted else ())
        return None, None, None, *d_parameters, *(next(d_wanted) if need else None for need in needs)
