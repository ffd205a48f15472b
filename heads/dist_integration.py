"""DiST's integration branch: I-Blocks, the laterals to and from the temporal encoder, and adaptive pooling.

The gains and biases of the LayerNorms go into the linear layers behind them, so that the two of an I-Block are one, and that of
the pooled features is computed once for all pooling layers. The temporal encoder runs on S*Z (dist_temporal.py).

Of the laterals the released code has dconv and nearest; the others are in Table 2 alone, and the paper says no more of them. avg
and max pool the gamma frames, then a linear layer widens them. trilinear interpolates in time, the grids being equal. deconv is
a transposed convolution in time that reaches adjacent frames, as section 4.2 speculates of it: a stride of gamma, and
max(1, gamma // 2) frames beyond it on each side.
"""

from collections import OrderedDict
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vcache.heads.dist_config import DiSTConfig
from vcache.heads.dist_temporal import S, weights
from vcache.heads.quick_gelu import QuickGELU
from vcache.heads.recomputed import Convolution, Linear, recomputed


def without_affine(x: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes d"]:
    """LayerNorm without gain and bias."""
    return F.layer_norm(x, x.shape[-1:])


class IBlock(nn.Module):
    """FFN over the channels plus T-FFN over time, of each token; nothing is added to them."""

    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        dim = config.integration_dim
        inner = max(1, dim // 4)
        self.ffn = nn.Sequential(OrderedDict(c_fc=nn.Linear(dim, dim), gelu=QuickGELU(), c_proj=nn.Linear(dim, dim)))
        self.temporal_ffn = nn.Sequential(
            OrderedDict(
                c_fc1=nn.Conv3d(dim, inner, 1),
                c_fc2=nn.Conv3d(inner, inner, (3, 1, 1), padding=(1, 0, 0)),
                gelu1=QuickGELU(),
                c_proj=nn.Conv3d(inner, dim, 1),
            )
        )
        self.ln = nn.LayerNorm(dim)
        self.ln_temporal = nn.LayerNorm(dim)

    def forward(self, u: Float[Tensor, "B T N d"]) -> Float[Tensor, "B T N d"]:
        (W_1, b_1), (W_2, b_2) = weights(self.ffn[0]), weights(self.ffn[2])
        (W_in, b_in), (W_time, b_time), (W_out, b_out) = (weights(self.temporal_ffn[i]) for i in (0, 1, 3))
        W_1, b_1 = _absorbed(self.ln, S * W_1, S * b_1)
        W_in, b_in = _absorbed(self.ln_temporal, W_in.flatten(1), b_in)
        a, b = recomputed(without_affine, (u,), (Linear(), W_1, b_1), (Linear(), W_in, b_in))
        (b,) = recomputed(_itself, (b,), (Convolution(padding=(1, 0)), S * W_time.squeeze(-1), S * b_time))
        (y,) = recomputed(F.silu, (a,), (Linear(), W_2 / S, b_2))
        (over,) = recomputed(F.silu, (b,), (Linear(), W_out.flatten(1) / S, b_out))
        return y.add_(over)


class Temporal2Integration(nn.Module):
    """down(Z): gamma frames become one, and a learnt CLS token per frame goes before the patches."""

    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        gamma, c, d = config.gamma, config.temporal_dim, config.integration_dim
        self.gamma, self.down_sampling = gamma, config.down_sampling
        self.linear_fuse = (
            nn.Conv3d(c, d, (gamma, 1, 1), stride=(gamma, 1, 1)) if self.down_sampling == "dconv" else nn.Linear(c, d)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.num_frames, d))
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B T P d"]:
        """Of S*Z; without CLS."""
        flat = z.flatten(2, 3)
        weight, bias = weights(self.linear_fuse)
        weight = weight / S
        if self.down_sampling == "dconv":
            stride = Convolution(stride=(self.gamma, 1))
            return recomputed(_itself, (flat,), (stride, weight.squeeze(-1), bias))[0]
        return recomputed(self.pooled, (flat,), (Linear(), weight, bias))[0]

    def pooled(self, z: Float[Tensor, "B F *rest"]) -> Float[Tensor, "B T *rest"]:
        """The mean or the largest of every gamma frames."""
        frames = z.unflatten(1, (-1, self.gamma))
        return frames.mean(dim=2) if self.down_sampling == "avg" else frames.amax(dim=2)


class Integration2Temporal(nn.Module):
    """up(M): each frame becomes gamma, without CLS."""

    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        self.grid, self.gamma, self.up_sampling = config.grid, config.gamma, config.up_sampling
        c, gamma = config.temporal_dim, config.gamma
        self.linear_fuse = nn.Linear(config.integration_dim, c)
        if self.up_sampling == "deconv":
            beyond = max(1, gamma // 2)
            self.deconv = nn.ConvTranspose3d(
                c, c, (gamma + 2 * beyond, 1, 1), stride=(gamma, 1, 1), padding=(beyond, 0, 0)
            )

    def forward(self, m: Float[Tensor, "B T N d"], z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B F h w c"]:
        """S*(Z + up(M)) of M and S*Z."""
        (low,) = recomputed(_itself, (m,), (Linear(), S * self.linear_fuse.weight, S * self.linear_fuse.bias))
        low = low[:, :, 1:]  # (B, T, P, c)
        if self.up_sampling == "nearest":
            by_frame = z.unflatten(1, (-1, self.gamma)).flatten(3, 4)  # (B, T, gamma, P, c)
            return (by_frame + low.unsqueeze(2)).view_as(z)
        return z + self.upsampled(low).reshape(z.shape)

    def upsampled(self, low: Float[Tensor, "B T P c"]) -> Float[Tensor, "B F P c"]:
        """In time."""
        x = low.permute(0, 3, 1, 2)
        if self.up_sampling == "trilinear":
            x = F.interpolate(x, size=(self.gamma * x.shape[2], x.shape[3]), mode="bilinear", align_corners=False)
        else:
            weight, bias = weights(self.deconv)
            stride, padding = (self.gamma, 1), (max(1, self.gamma // 2), 0)
            x = F.conv_transpose2d(x, weight.squeeze(-1), S * bias, stride=stride, padding=padding)
        return x.permute(0, 2, 3, 1)


class AdaptivePooling(nn.Module):
    """One query per frame gathers from its tokens, then one query per clip from those of the frames."""

    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        dim = config.integration_dim
        self.temporal_transformer, self.spatial_transformer = CrossAttention(config), CrossAttention(config)
        self.positional_embedding = nn.Parameter(torch.zeros(1, config.num_frames, dim))
        nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        self.output_map_cls_token, self.output_map_spatial_cls_token = _mlp(dim), _mlp(dim)
        self.ln_out_temp_cls_token, self.ln_out_spat_cls_token = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self, normed: Float[Tensor, "B T N d"], s: Float[Tensor, "B T d"], g: Float[Tensor, "B 1 d"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B 1 d"]]:
        """`normed` is F after a LayerNorm without gain and bias."""
        s = s + self.spatial_transformer.absorbed(s.flatten(0, 1), normed.flatten(0, 1)).view_as(s)
        s = s + self.output_map_spatial_cls_token(self.ln_out_spat_cls_token(s))
        g = g + self.temporal_transformer(g, s + self.positional_embedding)
        return s, g + self.output_map_cls_token(self.ln_out_temp_cls_token(g))


class CrossAttention(nn.Module):
    """Attention with one LayerNorm for queries and keys."""

    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(config.integration_dim, config.num_pooling_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(config.integration_dim)

    def forward(self, query: Float[Tensor, "B q d"], keys: Float[Tensor, "B k d"]) -> Float[Tensor, "B q d"]:
        keys = self.ln_1(keys)
        return self.attn(self.ln_1(query), keys, keys, need_weights=False)[0]

    def absorbed(self, query: Float[Tensor, "b d"], normed: Float[Tensor, "b N d"]) -> Float[Tensor, "b d"]:
        """One query over keys that are normalised without gain and bias; no key or value is projected (attention.py)."""
        attn, norm, heads = self.attn, self.ln_1, self.attn.num_heads
        W_q, W_k, W_v = attn.in_proj_weight.chunk(3)
        b_q, _, b_v = attn.in_proj_bias.chunk(3)  # that of the keys cancels in the softmax
        q = rearrange(F.linear(norm(query), W_q, b_q), "b (H k) -> b H k", H=heads)
        folded = einsum(q * q.shape[-1] ** -0.5, rearrange(W_k, "(H k) d -> H k d", H=heads), "b H k, H k d -> b H d")
        attention = (folded * norm.weight @ normed.mT).softmax(dim=-1)
        pooled = (attention.to(normed.dtype) @ normed) * norm.weight + norm.bias
        values = einsum(pooled, rearrange(W_v, "(H k) d -> H k d", H=heads), "b H d, H k d -> b H k")
        return attn.out_proj(values.flatten(1) + b_v)


class _WithLateral(torch.autograd.Function):
    """U = M + [CLS, down(Z)], without a copy of [CLS, down(Z)]."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, cls: Tensor, patches: Tensor) -> Tensor:
        ctx.dtypes = cls.dtype, patches.dtype
        u = torch.empty_like(m)
        u[:, :, 0] = m[:, :, 0] + cls
        torch.add(m[:, :, 1:], patches.to(m.dtype), out=u[:, :, 1:])
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = torch.promote_types(d_u.dtype, torch.float32)
        return d_u, d_u[:, :, 0].sum(dim=0, dtype=total).to(ctx.dtypes[0]), d_u[:, :, 1:].to(ctx.dtypes[1])


def with_lateral(
    m: Float[Tensor, "B T N d"], lateral: Temporal2Integration, z: Float[Tensor, "B F h w c"]
) -> Float[Tensor, "B T N d"]:
    """U = M + down(Z), of S*Z."""
    return _WithLateral.apply(m, lateral.cls_token[0, 0], lateral(z))


def _absorbed(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer of what has no gain and bias yet."""
    return weight * norm.weight, bias + weight @ norm.bias


def _itself(x: Tensor) -> Tensor:
    return x


def _mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(c_fc=nn.Linear(dim, 4 * dim), gelu=QuickGELU(), c_proj=nn.Linear(4 * dim, dim)))
