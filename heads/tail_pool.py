"""How a backbone without a class token makes its embedding: one query attends to all patches (SigLIP, arXiv 2303.15343)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.tail_block import BlockShape, CastLinear, block_mlp


class AttentionPool(nn.Module):
    """x = out_proj(softmax(query k' / sqrt(d)) v);  x + mlp(ln(x)), with as many heads as the blocks have."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        D = shape.width
        self.num_heads = shape.num_heads
        self.query = nn.Parameter(torch.empty(1, D))
        self.kv, self.out_proj = CastLinear(D, 2 * D), CastLinear(D, D)
        self.ln = nn.LayerNorm(D, eps=shape.layer_norm_eps)
        self.mlp = block_mlp(shape)

    def forward(self, x: Float[Tensor, "*batch P D"]) -> Float[Tensor, "*batch D"]:
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).transpose(-2, -4).unbind(dim=-3)  # (*batch, H, P, d)
        q = self.query.to(x.dtype).unflatten(-1, (self.num_heads, -1)).transpose(0, 1).expand(*k.shape[:-2], 1, -1)
        pooled: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).flatten(-3))
        return pooled + self.mlp(self.ln(pooled))
