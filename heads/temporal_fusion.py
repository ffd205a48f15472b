"""What makes one vector of a video of those of its frames: Text4Vis's temporal modelling, ActionCLIP's visual prompts.

Wu et al. 2023, "Revisiting Classifier", Table 2, and Wang et al. 2021, "ActionCLIP", fig. 2 e-g and Table 4; video_header of
modules/video_clip.py (whwu95/Text4Vis at d61b34d) and visual_prompt of modules/Visual_Prompt.py (sallymmx/ActionCLIP at 31c34df).
x are the embeddings of T frames, not normalised:

    MeanPooling           mean over the frames                                            TAP, MeanP
    FrameTransformer      mean of x + blocks(x + positions)                               T-Trans, Transf
    FrameConv             mean of x + Conv(x), depthwise over time                        T1D, Conv1D
    FrameLSTM             mean of x + LSTM(x)                                             LSTM
    FrameTransformerCls   LN(post-norm blocks([cls, x] + positions)) of cls               Transf_cls

Parameters have the official names. A table of positions that the official module makes and never reads is there, frozen, so
that checkpoints and counts agree.

Of the transformer's last block, the mean goes before the last product, to the same result: that product is then of one vector
a clip. QuickGELU(x) is silu(s x) / s with s = 1.702: one pass of a fused function, and s goes into weights, which are fewer.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from vcache.heads.quick_gelu import QUICK_GELU_SCALE

NUM_POSITIONS = 77
"""Rows of the table of frame positions: CLIP's context, whatever the number of frames."""
NUM_BLOCKS = 6
CLS_HEADS = 8
"""Of FrameTransformerCls, whatever the width."""


class MeanPooling(nn.Module):
    """The mean over the frames; no parameters."""

    def forward(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B E"]:
        return x.mean(dim=1)


class FrameTransformer(nn.Module):
    """Six pre-norm blocks over the frames, with a residual around all of them, and the mean."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(NUM_POSITIONS, embed_dim)
        self.transformer = _Blocks(embed_dim, num_heads)
        self.apply(_initialise)

    def forward(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B E"]:
        """
        Raises:
            ValueError: there are more frames than positions.
        """
        num_frames = x.shape[1]
        if num_frames > NUM_POSITIONS:
            raise ValueError(
                f"the transformer has positions for {NUM_POSITIONS} frames, and the clips have {num_frames}"
            )
        positions = self.frame_position_embeddings.weight[:num_frames]
        return x.mean(dim=1) + self.transformer(x + positions)


class FrameConv(nn.Module):
    """A depthwise convolution over three frames that starts as a shift: a quarter of the channels takes what was, a quarter
    what comes; a residual around it, and the mean."""

    def __init__(self, embed_dim: int, *, scrambled: bool = False) -> None:
        """`scrambled`: as coded, frames and channels are read in the wrong order, (T, E) in memory as (E, T). Checkpoints of the
        official code were trained so."""
        super().__init__()
        self.scrambled = scrambled
        self.frame_position_embeddings = _unread_positions(embed_dim)
        self.shift = nn.Conv1d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim, bias=False)
        quarter = embed_dim // 4
        with torch.no_grad():
            self.shift.weight.zero_()
            self.shift.weight[:quarter, 0, 0] = 1
            self.shift.weight[quarter : quarter + embed_dim // 2, 0, 1] = 1
            self.shift.weight[-embed_dim // 4 :, 0, 2] = 1  # rounded up, as coded: no channel is left out

    def forward(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B E"]:
        x = x.contiguous()
        by_channel = x.view(x.shape[0], x.shape[2], x.shape[1]) if self.scrambled else x.mT
        return (x + self.shift(by_channel).mT).mean(dim=1)


class FrameLSTM(nn.Module):
    """One layer of LSTM, from the first frame to the last, a residual around it, and the mean."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.frame_position_embeddings = _unread_positions(embed_dim)
        self.lstm_visual = nn.LSTM(embed_dim, embed_dim, batch_first=True)

    def forward(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B E"]:
        return (x + self.lstm_visual(x)[0]).mean(dim=1)


class FrameTransformerCls(nn.Module):
    """A learnt token before the frames, six post-norm layers with ReLU, and what becomes of the token. No residual, no mean.

    Whatever the width, there are 8 heads, and 2048 channels in the middle of the MLP.
    """

    def __init__(self, embed_dim: int, num_frames: int) -> None:
        super().__init__()
        self.frame_position_embeddings = _unread_positions(embed_dim)
        self.transformer = _ClsTransformer(embed_dim, num_frames)

    def forward(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B E"]:
        return self.transformer(x)


class _ClsTransformer(nn.Module):
    def __init__(self, embed_dim: int, num_frames: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(embed_dim, nhead=CLS_HEADS, batch_first=True)
        norm = nn.LayerNorm(embed_dim)
        self.transformer_enc = nn.TransformerEncoder(layer, NUM_BLOCKS, norm=norm, enable_nested_tensor=False)
        self.cls_token = nn.Parameter(_wrapped_normal(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(_wrapped_normal(1, num_frames + 1, embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = _wrapped_normal(*module.weight.shape)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if tokens.shape[1] != self.pos_embed.shape[1]:
            raise ValueError(f"the head was made for clips of {self.pos_embed.shape[1] - 1} frames, got {x.shape[1]}")
        return self.transformer_enc(tokens + self.pos_embed)[:, 0]


class _Blocks(nn.Module):
    """The mean over the frames of what the blocks make of them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(NUM_BLOCKS)))

    def forward(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B E"]:
        *blocks, last = cast(list[_Block], list(self.resblocks))
        for block in blocks:
            x = block(x)
        return last.mean(x)


class _Block(nn.Module):
    """x += Attention(LN(x)); x += MLP(LN(x)), with QuickGELU. The norms add 1e-12 to the variance."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads)
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.mlp = _Mlp(width)

    def forward(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        x = x + self._attention(self.ln_1(x))
        return x + self.mlp.project(self.mlp.activate(self.ln_2(x)))

    def mean(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B E"]:
        """The mean over the frames of what `forward` gives."""
        x = x + self._attention(self.ln_1(x))
        return x.mean(dim=1) + self.mlp.project(self.mlp.activate(self.ln_2(x)).mean(dim=1))

    def _attention(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        """nn.MultiheadAttention's own, without its ways around: frames stay in the second axis."""
        B, T, E = x.shape
        num_heads = self.attn.num_heads
        packed = linear(x, cast(Tensor, self.attn.in_proj_weight), self.attn.in_proj_bias)
        q, k, v = packed.view(B, T, 3, num_heads, E // num_heads).permute(2, 0, 3, 1, 4)
        return self.attn.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, E))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def activate(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B T hidden"]:
        """QUICK_GELU_SCALE times the QuickGELU of the first linear layer."""
        return silu(linear(x, QUICK_GELU_SCALE * self.c_fc.weight, QUICK_GELU_SCALE * self.c_fc.bias))

    def project(self, hidden: Float[Tensor, "*any hidden"]) -> Float[Tensor, "*any E"]:
        return linear(hidden, self.c_proj.weight / QUICK_GELU_SCALE, self.c_proj.bias)


def _unread_positions(embed_dim: int) -> nn.Embedding:
    table = nn.Embedding(NUM_POSITIONS, embed_dim)
    _initialise(table)
    return table.requires_grad_(False)


def _initialise(module: nn.Module) -> None:
    """As coded; the projections of queries, keys and values keep torch's."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _wrapped_normal(*shape: int) -> Tensor:
    """0.02 times a standard normal brought into (-2, 2) by the remainder, as coded; not a truncated one."""
    return torch.randn(*shape).fmod(2).mul(0.02)
