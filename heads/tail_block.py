"""One block of a CLIP image tower in parts, which adapters are put between: it is the backbone's own, run on cached tokens.

    x = x + attend(ln_1(x));  x = x + mlp(ln_2(x))        extract/backbone.py runs the same block whole

Written apart from the extractor on purpose: that both agree is what a cached tail is tested by. Weights have CLIP's names.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.frozen_linear import cast_linear
from vcache.heads.quick_gelu import QuickGELU

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the weights of a block do not tell."""

    width: int
    num_heads: int
    mlp_dim: int
    activation: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    layer_scale: bool = False
    """Whether what a part adds is multiplied by a gain for each channel."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width ({self.width}) must be a multiple of num_heads ({self.num_heads})")
        if self.activation not in (choices := get_args(Activation)):
            raise ValueError(f"activation ({self.activation!r}) must be one of {', '.join(map(repr, choices))}")


class TowerBlock(nn.Module):
    """A pre-norm transformer block. Products are in the dtype of what comes in, whatever its weights are kept in."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        D, eps = shape.width, shape.layer_norm_eps
        self.ln_1, self.ln_2 = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        self.attn = SelfAttention(D, shape.num_heads)
        act = QuickGELU() if shape.activation == "quick_gelu" else nn.GELU()
        fc, proj = CastLinear(D, shape.mlp_dim), CastLinear(shape.mlp_dim, D)
        self.mlp = nn.Sequential(OrderedDict(c_fc=fc, gelu=act, c_proj=proj))
        self.ls_1 = LayerScale(D) if shape.layer_scale else nn.Identity()
        self.ls_2 = LayerScale(D) if shape.layer_scale else nn.Identity()

    def forward(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        """The backbone's own block, each frame for itself."""
        x = x + self.attend(self.ln_1(x))
        return x + self.feed_forward(self.ln_2(x))

    def attend(self, h: Float[Tensor, "*batch S D"]) -> Float[Tensor, "*batch S D"]:
        """Self-attention of the tokens of each sequence: h of frames is spatial attention."""
        return self.ls_1(self.attn(h))

    def attend_over_time(self, h: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        """The same attention with the same weights among the T frames of each token."""
        return self.ls_1(self.attn.over_time(h))

    def feed_forward(self, h: Float[Tensor, "*batch S D"]) -> Float[Tensor, "*batch S D"]:
        return self.ls_2(self.mlp(h))


class CastLinear(nn.Linear):
    """A linear layer whose weights may be kept in another dtype than it computes in: frozen ones take half the memory."""

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return cast_linear(x, self.weight, self.bias)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x * self.gamma.to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of torch's MultiheadAttention, of frames or over time."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = CastLinear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, h: Float[Tensor, "*batch S D"]) -> Float[Tensor, "*batch S D"]:
        q, k, v = (part.transpose(-2, -3) for part in self._project(h))  # (*batch, H, S, d)
        # With one batch axis: of more than one torch keeps the weights of all pairs.
        q, k, v = (part.reshape(-1, *part.shape[-3:]) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out_proj(mixed.reshape(h.shape))

    def over_time(self, h: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        # Tokens beside heads, not beside clips: a GPU's kernels take no more than 65535 entries of a batch.
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in self._project(h))  # (B, N*H, T, d)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out_proj(mixed.reshape(h.shape))

    def _project(self, h: Float[Tensor, "*batch D"]) -> Sequence[Float[Tensor, "*batch H d"]]:
        """Queries, keys and values."""
        qkv = cast_linear(h, self.in_proj_weight, self.in_proj_bias)
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(dim=-3)
