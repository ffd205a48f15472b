"""One block of a CLIP image tower in parts, which adapters are put between: it is the backbone's own, run on cached tokens.

    x = x + attend(ln_1(x));  x = x + mlp(ln_2(x))        extract/backbone.py runs the same block whole

Written apart from the extractor on purpose: that both agree is what a cached tail is tested by. Weights have CLIP's names, also
those of EVA-CLIP and SigLIP. A block of a tower without a class token runs on the patches, and their mean goes first.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.frozen_linear import cast_linear
from vcache.heads.quick_gelu import QuickGELU
from vcache.heads.tail_kinds import GatedMlp, of_patches, rotated

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


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
    gated: bool = False
    """SwiGLU, as in EVA-02; the activation is then "silu"."""
    mlp_norm: bool = False
    """A LayerNorm of what is hidden in the MLP."""
    attention_norm: bool = False
    """A LayerNorm of the heads' outputs, before their projection."""
    post_norm: bool = False
    """LayerNorms of what attention and MLP give, not of what they read, as in EVA02-E: ln_1 and ln_2 do nothing then."""
    rope: int = 0
    """Patches of a frame whose queries and keys are rotated by their place, as in EVA-02; 0: none are."""
    class_token: bool = True
    """Whether the first token is the tower's own; else it is the mean of the patches, which the block makes again."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width ({self.width}) must be a multiple of num_heads ({self.num_heads})")
        if self.activation not in (choices := get_args(Activation)):
            raise ValueError(f"activation ({self.activation!r}) must be one of {', '.join(map(repr, choices))}")
        if self.gated != (self.activation == "silu"):
            raise ValueError(f"activation ({self.activation!r}) must be 'silu' of a gated MLP, and of no other")


class TowerBlock(nn.Module):
    """A pre-norm transformer block. Products are in the dtype of what comes in, whatever its weights are kept in."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        D, ln = shape.width, partial(nn.LayerNorm, eps=shape.layer_norm_eps)
        read, given = (nn.Identity, ln) if shape.post_norm else (ln, nn.Identity)
        self.ln_1, self.ln_2 = read(D), read(D)
        self.ln_attended, self.ln_fed = given(D), given(D)
        inner = ln(D) if shape.attention_norm else nn.Identity()
        self.attn = SelfAttention(D, shape.num_heads, ln_inner=inner, rope=shape.rope)
        self.mlp = block_mlp(shape)
        self.ls_1 = LayerScale(D) if shape.layer_scale else nn.Identity()
        self.ls_2 = LayerScale(D) if shape.layer_scale else nn.Identity()

    def forward(self, x: Float[Tensor, "B T N D"], wanted: int | None = None) -> Float[Tensor, "B T M D"]:
        """The backbone's own block, each frame for itself; M is N, or the first `wanted` tokens where no others are."""
        x = x[:, :, :wanted] + self.attend(self.ln_1(x), wanted)
        return x + self.feed_forward(self.ln_2(x))

    def attend(self, h: Float[Tensor, "*batch S D"], wanted: int | None = None) -> Float[Tensor, "*batch M D"]:
        """Self-attention of the tokens of each sequence: h of frames is spatial attention. With `wanted`, for towers with a class
        token, only the first so many ask.
        """
        return self._of_tokens(lambda x: self.ls_1(self.ln_attended(self.attn(x, wanted))), h)

    def attend_over_time(self, h: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        """The same attention with the same weights among the T frames of each token, which are at one place: none is rotated."""
        return self._of_tokens(lambda x: self.ls_1(self.ln_attended(self.attn.over_time(x))), h)

    def feed_forward(self, h: Float[Tensor, "*batch S D"]) -> Float[Tensor, "*batch S D"]:
        return self._of_tokens(lambda x: self.ls_2(self.ln_fed(self.mlp(x))), h)

    def _of_tokens(self, part: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        return part(h) if self.shape.class_token else of_patches(part, h)


def block_mlp(shape: BlockShape) -> nn.Module:
    """The MLP of a block, with random weights."""
    D, hidden = shape.width, shape.mlp_dim
    fc, proj = CastLinear(D, hidden), CastLinear(hidden, D)
    ln = nn.LayerNorm(hidden, eps=shape.layer_norm_eps) if shape.mlp_norm else nn.Identity()
    if shape.gated:
        return GatedMlp(fc, CastLinear(D, hidden), ln, proj)
    act = QuickGELU() if shape.activation == "quick_gelu" else nn.GELU(_APPROXIMATE[shape.activation])
    return nn.Sequential(OrderedDict(c_fc=fc, gelu=act, ln=ln, c_proj=proj))


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

    rope: Tensor | None

    def __init__(self, width: int, num_heads: int, *, ln_inner: nn.Module | None = None, rope: int = 0) -> None:
        """With a LayerNorm of the heads' outputs; `rope` is how many patches have their queries and keys rotated."""
        super().__init__()
        self.num_heads = num_heads
        self.ln_inner = ln_inner or nn.Identity()
        self.register_buffer("rope", torch.zeros(rope, 2 * width // num_heads) if rope else None)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = CastLinear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, h: Float[Tensor, "*batch S D"], wanted: int | None = None) -> Float[Tensor, "*batch M D"]:
        """Of all tokens, or of the first `wanted`, which are not among those that are rotated."""
        if wanted is None:
            q, k, v = self._project(h, 0, 3)
        else:
            (q,), (k, v) = self._project(h[..., :wanted, :], 0, 1), self._project(h, 1, 3)
        q, k, v = (part.transpose(-2, -3) for part in (q, k, v))  # (*batch, H, M or S, d)
        if self.rope is not None:
            q, k = q if wanted else rotated(q, self.rope), rotated(k, self.rope)
        # With one batch axis: of more than one torch keeps the weights of all pairs.
        q, k, v = (part.reshape(-1, *part.shape[-3:]) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out_proj(self.ln_inner(mixed.reshape(*h.shape[:-2], mixed.shape[1], h.shape[-1])))

    def over_time(self, h: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        # Tokens beside heads, not beside clips: a GPU's kernels take no more than 65535 entries of a batch.
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in self._project(h, 0, 3))  # (B, N*H, T, d)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out_proj(self.ln_inner(mixed.reshape(h.shape)))

    def _project(self, h: Float[Tensor, "*batch D"], first: int, end: int) -> Sequence[Float[Tensor, "*batch H d"]]:
        """Queries, keys and values, 0 to 2; those from `first` to before `end`."""
        rows = slice(first * h.shape[-1], end * h.shape[-1])
        projected = cast_linear(h, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return projected.unflatten(-1, (end - first, self.num_heads, -1)).unbind(dim=-3)
