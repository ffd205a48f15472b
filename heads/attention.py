"""Single-query attention with the key and value projections, and the LayerNorm before them, absorbed into the query.

One query per clip attends over S = T*N tokens n. Projecting each to a key and a value costs 2*S*D*D multiply-adds; but

    score_h = q_h . (W_k,h n + b_k,h) = (W_k,h^T q_h) . n + const             the constant cancels in the softmax
    out_h   = sum_s a_s (W_v,h n_s + b_v,h) = W_v,h (sum_s a_s n_s) + b_v,h   since the weights a sum to 1

needs 2*H*S*D: the query is folded into token space, the tokens are pooled there, and the pooled vector is unfolded.

With n = gain * (y - mean) / std + bias, the LayerNorm goes the same way. Gain and bias belong to the folded query and
to the pooled vector. So does the removal of the mean: it is a self-adjoint projection, and removing it from the query is
as good as removing it from every token. 1/std is one number per token. No normalised copy of the tokens is ever made.
"""

from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class SingleQueryAttention(nn.Module):
    """Multi-head attention of one query per clip over its tokens; equal to projecting all keys and values.

    Parameters are named as in EVL (Attention, vision_transformer.py at b282e8b) and start as there: weights
    Xavier-uniform, biases 0. There is no attention dropout.
    """

    def __init__(self, width: int, qkv_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, qkv_dim)
        self.k_proj = nn.Linear(width, qkv_dim)
        self.v_proj = nn.Linear(width, qkv_dim)
        self.out_proj = nn.Linear(qkv_dim, width)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Float[Tensor, "B D"], tokens: Float[Tensor, "B S D"], norm: nn.LayerNorm
    ) -> Float[Tensor, "B D"]:
        """Attend from `query`, which is used as it is, over `norm(tokens)`."""
        return self.unfold(normalised_pooling(self.fold(query, norm), tokens, norm.eps), norm)

    def weights(
        self, query: Float[Tensor, "B D"], tokens: Float[Tensor, "B S D"], norm: nn.LayerNorm
    ) -> Float[Tensor, "B H S"]:
        """What `forward` gives each token, per attention head; sums to 1. For looking at: it makes a normalised copy."""
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)  # the norm's gain is in the folded query
        return (self.fold(query, norm) @ normed.mT).softmax(dim=-1)

    def fold(self, query: Float[Tensor, "B D"], norm: nn.LayerNorm) -> Float[Tensor, "B H D"]:
        """The query in the space of the tokens before the gain of `norm`: one vector per attention head."""
        q = rearrange(self.q_proj(query), "B (H d) -> B H d", H=self.num_heads)
        W_k = rearrange(self.k_proj.weight, "(H d) D -> H d D", H=self.num_heads)
        folded = einsum(q * q.shape[-1] ** -0.5, W_k, "B H d, H d D -> B H D") * norm.weight
        # The key bias has no effect and a gradient of exactly 0. It stays in the graph: DDP waits for every parameter.
        return folded + 0.0 * self.k_proj.bias.sum()

    def unfold(self, pooled: Float[Tensor, "B H D"], norm: nn.LayerNorm) -> Float[Tensor, "B D"]:
        """The output of attention from the normalised tokens that each head has pooled."""
        W_v = rearrange(self.v_proj.weight, "(H d) D -> H d D", H=self.num_heads)
        values = einsum(pooled * norm.weight + norm.bias, W_v, "B H D, H d D -> B H d")
        return self.out_proj(rearrange(values, "B H d -> B (H d)") + self.v_proj.bias)


def normalised_pooling(
    query: Float[Tensor, "B H D"], tokens: Float[Tensor, "B S D"], eps: float
) -> Float[Tensor, "B H D"]:
    """sum_s softmax_s(query . n_s) n_s per head, where n is `tokens` with mean 0 and variance 1 over D."""
    return _NormalisedPooling.apply(query, tokens, eps)


class _NormalisedPooling(torch.autograd.Function):
    """Keeps the tokens and 2H numbers per token, and makes a gradient of the tokens only where one is wanted."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, tokens: Tensor, eps: float) -> Tensor:
        centred = query - query.mean(dim=-1, keepdim=True)
        # torch.var_mean would read the tokens once less and takes 20 times as long on a CPU.
        mean = tokens.mean(dim=-1)
        variance = torch.linalg.vector_norm(tokens - mean.unsqueeze(-1), dim=-1).square() / tokens.shape[-1]
        rstd = (variance + eps).rsqrt().unsqueeze(1)  # (B, 1, S)
        dots = centred @ tokens.mT  # (B, H, S)
        weights = (dots * rstd).softmax(dim=-1)
        pooled = (weights * rstd) @ tokens
        ctx.save_for_backward(centred, tokens, mean, rstd, dots, weights)
        return pooled - pooled.mean(dim=-1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        centred, tokens, mean, rstd, dots, weights = ctx.saved_tensors
        grad = grad - grad.mean(dim=-1, keepdim=True)
        reach = grad @ tokens.mT  # (B, H, S)
        d_weights = reach * rstd
        d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True))
        d_dots = d_scores * rstd
        d_query = d_dots @ tokens
        d_query = d_query - d_query.mean(dim=-1, keepdim=True)
        if not ctx.needs_input_grad[1]:
            return d_query, None, None
        d_rstd = (d_scores * dots + weights * reach).sum(dim=1)  # (B, S)
        slope = -d_rstd * rstd.squeeze(1).pow(3) / tokens.shape[-1]
        # d_tokens = d_dots^T centred + (weights rstd)^T grad + slope (tokens - mean): a rank 2H+1 product and a pass.
        ones = grad.new_ones(len(grad), 1, grad.shape[-1])
        left = torch.cat([d_dots, weights * rstd, -(slope * mean).unsqueeze(1)], dim=1)
        right = torch.cat([centred, grad, ones], dim=1)
        d_tokens = tokens * slope.unsqueeze(-1)
        return d_query, d_tokens.baddbmm_(left.mT, right), None
