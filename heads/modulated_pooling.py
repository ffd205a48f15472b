"""From the cached tokens X to what each attention head pools of LayerNorm(Y), Y = X + temporal terms, as one autograd function.

Made for features that are constants and much larger than what is learnt from them. A few clips at a time go through all
steps while they are in the processor's cache, in the forward and in the backward pass, and only sums over tokens leave it:

    n = (Y - mean) / std                          LayerNorm without gain and bias, which belong to the query (attention.py)
    pooled_h = sum_s softmax_s(query_h . n_s) n_s
    dY = (d_scores^T query + weights^T d_pooled - m n) / std    m_s = (d_scores . scores + weights . d_pooled n)_s / D

dY exists for these clips only; the gradients of T-Conv, T-PE and T-CA are sums of it, and X gets one only where asked for.
Without T-CA, n is made again in the backward pass, in the time that storing it would take. With T-CA it is kept.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcache.heads.cross_frame import (
    TemporalCrossAttention,
    add_displacements,
    add_window_gradients,
    displacement_windows,
    refuse_gradient,
    sum_windows,
)
from vcache.heads.temporal_conv import TemporalConvolution, filter_adjoint, filter_frames, sum_in_float32, taps_gradient

Pooling = Literal["none", "cls", "spatial_mean", "temporal_mean"]

_CPU_CHUNK_ELEMENTS = 5 * 2**18
"""Token elements (5 MB in float32) that go through together on a CPU: one clip of 8 frames at ViT-B/16.
Two at a time took 1.2 times as long without T-CA, and 0.95 times with it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TemporalTerms:
    """What one decoder layer makes of X before it attends: Y = X + terms, pooled. A term that is off is None."""

    conv: TemporalConvolution | None = None
    positions: Float[Tensor, "T D"] | None = None
    cross_attention: TemporalCrossAttention | None = None
    pooling: Pooling = "none"


def modulated_pooling(
    query: Float[Tensor, "B H D"],
    x: Float[Tensor, "B T N D"],
    maps: Float[Tensor, "B T-1 2 N-1 N-1"] | None = None,
    terms: TemporalTerms = TemporalTerms(),  # noqa: B008  (frozen, so that it can be shared)
    eps: float = 1e-5,
) -> Float[Tensor, "B H D"]:
    """sum_s softmax_s(query . n_s) n_s per head, n being Y with mean 0 and variance 1 over D.

    Under autocast Y and the matrix products are in its dtype, statistics, softmax and sums over tokens in float32.

    Raises:
        ValueError: the maps require a gradient.
    """
    refuse_gradient(maps)
    taps, shift = (None, terms.positions) if terms.conv is None else _filter_of(terms.conv, terms.positions, x.shape[1])
    vectors, grid = None, (0, 0)
    if terms.cross_attention is not None:
        vectors, grid = terms.cross_attention.vectors(), terms.cross_attention.grid
    options = _Options(pooling=terms.pooling, grid=grid, eps=eps, dtype=compute_dtype(query))
    return _ModulatedPooling.apply(query, x, maps, taps, shift, vectors, options)


def _filter_of(conv: TemporalConvolution, positions: Tensor | None, num_frames: int) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    shift = conv.bias if positions is None else conv.bias + positions
    return conv.taps(), shift.expand(num_frames, -1)


def compute_dtype(query: Tensor) -> torch.dtype:
    """The parameters' dtype, or autocast's in place of float32."""
    kind = query.device.type
    if query.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return query.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Every dtype below is chosen by hand; autocast would choose again, and knows no meta device."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def pool(y: Tensor, pooling: Pooling) -> Tensor:
    """What the query attends to: the tokens (B, T, N, D) as they are ("none", "cls"), one a frame, or one clip's N."""
    if pooling == "spatial_mean":
        return y[:, :, 1:].mean(dim=2, keepdim=True)
    return y.mean(dim=1, keepdim=True) if pooling == "temporal_mean" else y


def _pool_adjoint(grad: Tensor, pooling: Pooling, shape: torch.Size) -> Tensor:
    """The gradient of y, of `shape`, from that of pool(y), whose tokens are flat: (b, S, D)."""
    if pooling == "spatial_mean":
        spread = grad.new_zeros(shape)
        spread[:, :, 1:] = (grad / (shape[2] - 1)).unsqueeze(2)
        return spread
    return (grad / shape[1]).unsqueeze(1).expand(shape) if pooling == "temporal_mean" else grad.view(shape)


@dataclass(frozen=True, kw_only=True)
class _Options:
    pooling: Pooling
    grid: tuple[int, int]
    eps: float
    dtype: torch.dtype
    """Of Y and of the matrix products."""


class _ModulatedPooling(torch.autograd.Function):
    """Keeps X, which the features hold anyway, a score per token and attention head, and n only with T-CA."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, x: Tensor, maps: Tensor | None, taps: Tensor | None, shift: Tensor | None,
        vectors: Tensor | None, options: _Options,
    ) -> Tensor:  # fmt: skip
        y = _Modulated(x, maps, taps, shift, vectors, options)
        centred = query - query.mean(dim=-1, keepdim=True)
        pooled, scores, kept = torch.empty_like(query), [], []
        with without_autocast(x.device.type):
            for clips in _chunks(x):
                n, rstd = y.normalised(clips)
                scores.append((centred[clips].to(n.dtype) @ n.mT).to(rstd.dtype))
                pooled[clips] = scores[-1].softmax(dim=-1).to(n.dtype) @ n
                kept += [n, rstd] if maps is not None else []
        ctx.options = options
        ctx.save_for_backward(centred, x, maps, taps, shift, vectors, torch.cat(scores), *kept)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_pooled: Tensor) -> tuple[Tensor | None, ...]:
        centred, x, maps, taps, shift, vectors, scores, *kept = ctx.saved_tensors
        y = _Modulated(x, maps, taps, shift, vectors, ctx.options)
        sums = _TermGradients(y, of_x=ctx.needs_input_grad[1])
        d_pooled = d_pooled - d_pooled.mean(dim=-1, keepdim=True)
        d_query = torch.empty_like(centred)
        with without_autocast(x.device.type):
            for i, clips in enumerate(_chunks(x)):
                n, rstd = kept[2 * i : 2 * i + 2] if kept else y.normalised(clips)
                q, g = centred[clips].to(n.dtype), d_pooled[clips].to(n.dtype)
                weights, reach = scores[clips].softmax(dim=-1), (g @ n.mT).to(rstd.dtype)
                d_scores = weights * (reach - (weights * reach).sum(dim=-1, keepdim=True))
                d_query[clips] = d_scores.to(n.dtype) @ n
                if not any(ctx.needs_input_grad[1:]):
                    continue
                m = (d_scores * scores[clips] + weights * reach).sum(dim=1, keepdim=True) / n.shape[-1]  # (b, 1, S)
                left = torch.cat([d_scores, weights], dim=1) * rstd.mT
                d_y = n * (-m.mT * rstd).to(n.dtype)
                sums.add(clips, d_y.baddbmm_(left.mT.to(n.dtype), torch.cat([q, g], dim=1)))
        return d_query - d_query.mean(dim=-1, keepdim=True), *sums.results(), None


class _Modulated:
    """Y of any of the clips, normalised."""

    def __init__(
        self, x: Tensor, maps: Tensor | None, taps: Tensor | None, shift: Tensor | None, vectors: Tensor | None,
        options: _Options,
    ) -> None:  # fmt: skip
        self.x, self.maps, self.options = x, maps, options
        self.taps, self.shift = (None if term is None else term.to(options.dtype) for term in (taps, shift))
        self.windows: list[Tensor] = []
        if vectors is not None:
            self.windows = displacement_windows(vectors.to(options.dtype), options.grid)

    def normalised(self, clips: slice) -> tuple[Tensor, Tensor]:
        """(b, S, D) and the factor 1/std (b, S, 1) that made it so."""
        x, options = self.x[clips].to(self.options.dtype), self.options
        y = filter_frames(x, self.taps, self.shift)
        if self.maps is not None:
            y = y.clone() if y is x else y  # T-CA adds in place
            add_displacements(y, self.maps[clips], self.windows, options.grid)
        y = pool(y, options.pooling).flatten(1, 2)
        n, _, rstd = torch.native_layer_norm(y, y.shape[-1:], None, None, options.eps)
        return n, rstd.to(torch.promote_types(rstd.dtype, torch.float32))


class _TermGradients:
    """Sums over all clips of what the gradients of Y give the terms, and the gradient of X if one is wanted."""

    def __init__(self, y: _Modulated, of_x: bool) -> None:
        self.y, self.x = y, torch.empty_like(y.x) if of_x else None
        dtype = torch.promote_types(y.options.dtype, torch.float32)
        self.taps, self.shift = (
            None if term is None else torch.zeros_like(term, dtype=dtype) for term in (y.taps, y.shift)
        )
        self.windows = [torch.zeros_like(window, dtype=dtype) for window in y.windows]

    def add(self, clips: slice, grad: Tensor) -> None:
        """`grad` is that of the normalised clips' tokens before they were normalised, (b, S, D)."""
        y, options = self.y, self.y.options
        x = y.x[clips].to(options.dtype)
        grad = _pool_adjoint(grad, options.pooling, x.shape)
        if self.taps is not None:
            self.taps += taps_gradient(x, grad)
        if self.shift is not None:
            self.shift += sum_in_float32(grad, (0, 2))
        if y.maps is not None:
            add_window_gradients(self.windows, grad, y.maps[clips], options.grid)
        if self.x is not None:
            self.x[clips] = filter_adjoint(grad, y.taps)

    def results(self) -> tuple[Tensor | None, ...]:
        """In the order of the inputs: x, maps, taps, shift, vectors."""
        vectors = sum_windows(self.windows, self.y.options.grid) if self.windows else None
        return self.x, None, self.taps, self.shift, vectors


def _chunks(x: Tensor) -> Iterator[slice]:
    """The clips, a few at a time on a CPU, all at once on a GPU; of no clip, one empty slice."""
    size = len(x) if x.is_cuda else _CPU_CHUNK_ELEMENTS // x.shape[1:].numel()
    size = max(1, size)
    for start in range(0, max(1, len(x)), size):
        yield slice(start, min(start + size, len(x)))
