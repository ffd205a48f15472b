"""What blocks of other backbones than CLIP have in them: a gated MLP, rotated queries and keys, no class token."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), in EVA-02 with a LayerNorm inside: c_proj(ln(silu(c_gate h) * c_fc h))."""

    def __init__(self, c_fc: nn.Linear, c_gate: nn.Linear, ln: nn.Module, c_proj: nn.Linear) -> None:
        super().__init__()
        self.c_fc, self.c_gate, self.ln, self.c_proj = c_fc, c_gate, ln, c_proj

    def forward(self, h: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        y: Tensor = self.c_proj(self.ln(F.silu(self.c_gate(h)) * self.c_fc(h)))
        return y


def rotated(x: Float[Tensor, "*batch N d"], table: Float[Tensor, "P both"]) -> Float[Tensor, "*batch N d"]:
    """Queries or keys turned by the place of their patch (RoPE, arXiv 2104.09864); the first N - P tokens, CLS, are left.

    The table has sines, then cosines; channels 2i and 2i+1 are turned together.
    """
    first = x.shape[-2] - len(table)
    sin, cos = table.chunk(2, dim=-1)
    patches = x[..., first:, :]
    even, odd = patches[..., 0::2], patches[..., 1::2]
    turned = patches * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
    return torch.cat([x[..., :first, :], turned.to(x.dtype)], dim=-2)


def of_patches(part: Callable[[Tensor], Tensor], h: Float[Tensor, "*batch N D"]) -> Float[Tensor, "*batch N D"]:
    """A part of a block of a tower without a class token: the mean of what the patches get is first, as in the store.

    The mean that comes in is not seen. Means add up, so that what leaves a plain block again has its mean first.
    """
    y = part(h[..., 1:, :])
    return torch.cat([y.mean(dim=-2, keepdim=True), y], dim=-2)
