"""CLIP's activation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

QUICK_GELU_SCALE = 1.702
"""s of x * sigmoid(s x), which is silu(s x) / s."""


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * torch.sigmoid(QUICK_GELU_SCALE * x)
