"""Linear layers of cached features: constants, larger than what is learnt from them, and cheap to make again.

Autograd would keep a copy of X in the parameters' dtype for the gradient of each weight: of 12 layers of 8 ViT-B/16 frames
58 MB a clip. Here what is kept is how to have X again: the features hold it anyway, as float16 or int8. A few clips at a time
become numbers of the parameters' dtype, while they are multiplied, in the forward and in the backward pass. X gets no gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vcache.heads.modulated_pooling import compute_dtype, without_autocast

_CPU_CHUNK_ELEMENTS = 5 * 2**19
"""Elements of X (10 MB in float32) that are converted together on a CPU: of 8 frames at ViT-B/16 two clips, of 16 frames of
pixels one."""


def streamed_linear(
    make: Callable[[], Tensor],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None = None,
    as_rows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """as_rows(X) @ weight^T + bias; `make` gives X, clips first, the same each time, and is called once here and once for the
    gradient.

    Args:
        as_rows: makes of a few clips of X what is multiplied, (clips, ..., in), of any dtype; X itself unless given.

    Raises:
        ValueError: X requires a gradient.
        RuntimeError: in the backward pass, X was changed in place since the forward pass.
    """
    return _StreamedLinear.apply(make, as_rows or (lambda x: x), compute_dtype(weight), weight, bias)


class _StreamedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, make: Callable[[], Tensor], as_rows: Callable[[Tensor], Tensor], dtype: torch.dtype, weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.make, ctx.as_rows, ctx.dtype, ctx.of = make, as_rows, dtype, weight.dtype
        x, low = make(), weight.to(dtype)
        if x.requires_grad:
            raise ValueError("the features require a gradient, and this formulation gives them none; use 'plain'")
        ctx.state = _state(x)
        low_bias, out = None if bias is None else bias.to(dtype), None
        with without_autocast(x.device.type):
            for clips in _chunks(x):
                y = F.linear(as_rows(x[clips]).to(dtype), low, low_bias)
                if len(y) == len(x):
                    return y
                out = y.new_empty(len(x), *y.shape[1:]) if out is None else out
                out[clips] = y
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, total = d_y.flatten(0, -2), torch.promote_types(ctx.dtype, torch.float32)
        d_bias = rows.sum(dim=0, dtype=total).to(ctx.of) if ctx.needs_input_grad[4] else None
        if not ctx.needs_input_grad[3]:
            return None, None, None, None, d_bias
        x, d_weight = ctx.make(), None
        if ctx.state is not None and ctx.state != (now := _state(x)) and now and now[0] == ctx.state[0]:
            raise RuntimeError(
                "the features were changed in place between the forward and the backward pass, which reads them again; "
                "change a copy of them"
            )
        with without_autocast(x.device.type):
            for clips in _chunks(x):
                left, right = (
                    t.flatten(0, -2) for t in (d_y[clips].to(ctx.dtype), ctx.as_rows(x[clips]).to(ctx.dtype))
                )
                if d_weight is None:
                    d_weight = (left.mT @ right).to(total)
                elif left.dtype == total:
                    d_weight.addmm_(left.mT, right)
                else:
                    d_weight += left.mT @ right
        assert d_weight is not None
        return None, None, None, d_weight.to(ctx.of), d_bias


def _state(x: Tensor) -> tuple[int, int] | None:
    """Where X lies, and how often it was changed in place, which autograd would check of a tensor that it keeps."""
    return None if x.is_inference() else (x.data_ptr(), x._version)


def _chunks(x: Tensor) -> Iterator[slice]:
    """The clips, a few at a time on a CPU, all at once on a GPU; of no clip, one empty slice."""
    size = max(1, len(x) if x.is_cuda else _CPU_CHUNK_ELEMENTS // max(1, x.shape[1:].numel()))
    for start in range(0, max(1, len(x)), size):
        yield slice(start, min(start + size, len(x)))
