"""The official formulation of EVL's head for benchmarks/evl_head.py: restated, and the official module from a checkout.

The restatement does what model.py and vision_transformer.py at b282e8b do, in their order, with parameters of the same names: the
features are brought to (clip and token, channel, frame) for a Conv1d and back, three terms are added in place (here to a copy:
cached features are read again), every token becomes a key and a value, and T-CA gathers a vector for every pair of patches.
"""

import importlib
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vcache.heads.evl import EVL
from vcache.heads.quick_gelu import QuickGELU


class RestatedAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        q = self.q_proj(query).unflatten(-1, (self.num_heads, -1))
        k, v = (linear(tokens).unflatten(-1, (self.num_heads, -1)) for linear in (self.k_proj, self.v_proj))
        weights = torch.einsum("bqhd,bshd->bqsh", q / q.shape[-1] ** 0.5, k).softmax(dim=2)
        return self.out_proj(torch.einsum("bqsh,bshd->bqhd", weights, v).flatten(2))


class RestatedLayer(nn.Module):
    def __init__(self, config: EVL.Config) -> None:
        super().__init__()
        D = config.width
        self.attn = RestatedAttention(D, config.num_heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(D, config.mlp_dim), act=QuickGELU(), fc2=nn.Linear(config.mlp_dim, D))
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        query = query + self.attn(self.norm1(query), self.norm3(tokens))
        return query + self.mlp(self.norm2(query))


class RestatedCrossAttention(nn.Module):
    """From Q and K, (B, T, N, H, d), or from the maps that they make, which the official code has no way to read."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        h, w = grid
        self.w1, self.w2 = (nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), width)) for _ in range(2))
        rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
        self.index = (rows[:, None] - rows + h - 1) * (2 * w - 1) + columns[:, None] - columns + w - 1

    def forward(self, layer: dict[str, Tensor]) -> Tensor:
        x = layer["out"]
        self.index = self.index.to(x.device)
        if "maps" in layer:
            before, after = layer["maps"][:, :, 0], layer["maps"][:, :, 1]
        else:
            q, k = layer["q"][:, :, 1:], layer["k"][:, :, 1:]
            before, after = self.weights(q[:, 1:], k[:, :-1]), self.weights(q[:, :-1], k[:, 1:])
        out = torch.zeros_like(x)
        out[:, 1:, 1:] += torch.einsum("btqk,qkd->btqd", before, self.w1[self.index])
        out[:, :-1, 1:] += torch.einsum("btqk,qkd->btqd", after, self.w2[self.index])
        return out

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("btqhd,btkhd->btqkh", q / q.shape[-1] ** 0.5, k).softmax(dim=-2).mean(dim=-1)


class RestatedDecoder(nn.Module):
    def __init__(self, config: EVL.Config) -> None:
        super().__init__()
        M, T, D = len(config.layers), config.num_frames, config.width
        self.decoder_layers = nn.ModuleList(RestatedLayer(config) for _ in range(M))
        self.temporal_conv = nn.ModuleList(nn.Conv1d(D, D, 3, padding=1, groups=D) for _ in range(M))
        self.temporal_pos_embed = nn.ParameterList(nn.Parameter(torch.zeros(T, D)) for _ in range(M))
        if config.temporal_cross_attention:
            self.cross_attention = nn.ModuleList(RestatedCrossAttention(config.grid, D) for _ in range(M))
        self.cls_token = nn.Parameter(torch.zeros(D))

    def forward(self, layers: list[dict[str, Tensor]]) -> Tensor:
        query = self.cls_token.expand(len(layers[0]["out"]), 1, -1)
        for i, layer in enumerate(layers):
            x = layer["out"]
            B, _, N, D = x.shape
            columns = x.permute(0, 2, 3, 1).contiguous().flatten(0, 1)  # (B*N, D, T)
            y = x.clone()
            y += self.temporal_conv[i](columns).view(B, N, D, -1).permute(0, 3, 1, 2).contiguous()
            y += self.temporal_pos_embed[i].unsqueeze(1)
            if hasattr(self, "cross_attention"):
                y += self.cross_attention[i](layer)
            query = self.decoder_layers[i](query, y.flatten(1, 2))
        return query


class OfficialHead(nn.Module):
    """A decoder that takes the official form of features, and the classifier; loads the state dict of `EVL`."""

    def __init__(self, decoder: nn.Module, config: EVL.Config) -> None:
        super().__init__()
        self.decoder = decoder
        self.proj = nn.Sequential(
            nn.LayerNorm(config.width), nn.Dropout(0.5), nn.Linear(config.width, config.num_classes)
        )

    def forward(self, layers: list[dict[str, Tensor]]) -> Tensor:
        return self.proj(self.decoder(layers)[:, 0])


def restated_head(config: EVL.Config) -> OfficialHead:
    return OfficialHead(RestatedDecoder(config), config)


def official_head(config: EVL.Config, checkout: Path) -> OfficialHead:
    """The official repository's own decoder, imported from a checkout. It adds into the features that it is given."""
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("model")
    zeros = torch.zeros

    def zeros_where_others_are(*size: Any, **options: Any) -> Tensor:
        """Its T-CA asks for device='cuda' in any case."""
        return zeros(*size, **{**options, "device": None if not torch.cuda.is_available() else options.get("device")})

    mock.patch("torch.zeros", zeros_where_others_are).start()
    decoder = module.EVLDecoder(
        num_frames=config.num_frames, spatial_size=config.grid, num_layers=len(config.layers), in_feature_dim=config.width,
        qkv_dim=config.attention_dim, num_heads=config.num_heads,
        enable_temporal_cross_attention=config.temporal_cross_attention,
    )  # fmt: skip
    return OfficialHead(decoder, config)
