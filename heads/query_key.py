"""Queries and keys of a frozen transformer block, recomputed from the tokens that enter it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vcache.heads.cross_frame import cross_frame_maps

# Clips whose queries and keys are in memory at once: 20 MB each for 8 frames of ViT-B/16.
_CLIPS_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class QueryKeyProjection:
    """The frozen weights of one block of a CLIP ViT that make q and k of its input: ln_1, and the first two thirds of in_proj."""

    ln_weight: Float[Tensor, " D"]
    ln_bias: Float[Tensor, " D"]
    weight: Float[Tensor, "2*D D"]
    """Queries first, then keys."""
    bias: Float[Tensor, " 2*D"]
    num_heads: int
    ln_eps: float

    def __call__(self, x: Float[Tensor, "B T N D"]) -> tuple[Float[Tensor, "B T H N d"], Float[Tensor, "B T H N d"]]:
        """Biased projections of ln_1(x), before 1/sqrt(d), as the backbone's own taps; computed in the weights' dtype."""
        h = F.layer_norm(x.to(self.weight.dtype), x.shape[-1:], self.ln_weight, self.ln_bias, self.ln_eps)
        q, k = F.linear(h, self.weight, self.bias).unflatten(-1, (2, self.num_heads, -1)).unbind(dim=-3)
        return q.transpose(2, 3), k.transpose(2, 3)

    def maps(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T-1 2 N-1 N-1"]:
        """`cross_frame_maps` of the queries and keys, which are held for a few clips at a time."""
        return torch.cat([cross_frame_maps(*self(clips)) for clips in x.split(_CLIPS_AT_ONCE)])
