"""DiST: a light temporal encoder of the pixels beside the frozen spatial one, and a branch that integrates both.

Qing et al. 2023, "Disentangling Spatial and Temporal Learning for Efficient Image-to-Video Transfer Learning", eq. 3-7;
DiSTNetwork, models/module_zoo/branches/dist.py at 4b3a09b. Of clips of T frames, the temporal encoder sees gamma*T:

    Z = Stem(pixels);  R = 0                                  every layer l that is read, X the output of the frozen block:
        Z = T-Block(Z)
        M = FC(X) + R
        U = M + down(Z);  Z = Z + up(M)                       laterals, both from the same Z and M
        R = FFN(LN(U)) + T-FFN(LN(U))
    F = R + U of the last layer
    s, g refined by attention over F, then over the frames    adaptive pooling
    video = ln_post(g + FC(mean CLS of the last X)) @ proj;   logits = exp(logit_scale) cos(video, text of the class)

Parameters have the official names. The paper's eq. 3 adds the lateral before the T-Block; as coded it is added after, which is
the same but for the first and the last layer.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vcache.heads.evl import QuickGELU
from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, InnerFeatures, Recipe
from vcache.heads.text import ClassText, TextClassifier

TemporalBlock = Literal["r2plus1d", "c3d", "tada", "joint"]
DownSampling = Literal["dconv", "avg", "max"]
UpSampling = Literal["nearest", "trilinear", "deconv"]


@register_head("dist")
class DiST(nn.Module):
    """The temporal encoder, the integration branch, adaptive pooling, and a classifier of text embeddings."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        num_frames: int = 8
        """Frames of a clip; another number is another store."""
        num_layers: int = 12
        """Blocks of the backbone."""
        width: int = 768
        grid: tuple[int, int] = (14, 14)
        """Patches of a frame: rows, columns."""
        patch_size: int = 16
        """Side of a patch in pixels."""
        embed_dim: int = 512
        """Of the text embeddings."""
        pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
        """What the pixels are normalised by, as those that the backbone saw; of values from 0 to 1."""
        pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
        layers: tuple[int, ...] | None = None
        """Layers of the backbone that are read, first to last; None: all, as in the paper."""
        gamma: int = 2
        """Frames that the temporal encoder sees for each frame of the clip (Table 1d)."""
        integration_dim: int = 384
        """Channels of the integration branch, the paper's alpha * width (Table 1e)."""
        temporal_dim: int = 96
        """Channels of the temporal encoder, the paper's beta * width (Table 1f)."""
        adaptive_pooling_layers: int = 2
        """2 on Something-Something, 4 on Kinetics."""
        temporal_encoder: bool = True
        """Table 1a."""
        integration_branch: bool = True
        """Table 1a. Without it the last spatial and the last temporal features are added once, and pooled."""
        integration_to_temporal: bool = True
        """The lateral up(M) (Table 1b)."""
        temporal_to_integration: bool = True
        """The lateral down(Z) (Table 1b). Without it only the last layer has one, or nothing would come of Z."""
        temporal_block: TemporalBlock = "r2plus1d"
        """Table 1c."""
        down_sampling: DownSampling = "dconv"
        """Of down(Z), in time: a strided convolution, or pooling and a linear layer (Table 2a)."""
        up_sampling: UpSampling = "nearest"
        """Of up(M), in time (Table 2b)."""
        templates: str = "label"
        """The set of templates of the text embeddings; "label" is the name of the class alone."""

        def __post_init__(self) -> None:
            for name in ("grid", "pixel_mean", "pixel_std", *(("layers",) if self.layers is not None else ())):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            sizes = ("num_classes", "num_frames", "num_layers", "width", "patch_size", "embed_dim")
            for name in (*sizes, "gamma", "integration_dim", "temporal_dim", "adaptive_pooling_layers"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
            if len(self.grid) != 2 or min(self.grid) < 1:
                raise ValueError(f"grid ({self.grid}) must be two positive numbers: rows, columns")
            if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
                raise ValueError(f"layers ({self.layers}) must name at least one layer, each once")
            for name, kind in (
                ("temporal_block", TemporalBlock),
                ("down_sampling", DownSampling),
                ("up_sampling", UpSampling),
            ):
                if getattr(self, name) not in (choices := get_args(kind)):
                    raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, choices))}")

        @property
        def read_layers(self) -> tuple[int, ...]:
            """The layers that are read, as they are asked for."""
            return tuple(range(self.num_layers)) if self.layers is None else self.layers

        @property
        def num_pooling_heads(self) -> int:
            """One attention head for 64 channels, as coded."""
            return max(1, self.integration_dim // 64)

    summary = "temporal encoder of the pixels and integration branch beside the frozen layers, classified by text"
    # Table A12. As coded, the rate is 3.2e-5 times NEW_NET_LRMULT 10; mixing and smoothing as in the configs.
    recipe = Recipe(
        lr=3.2e-4,
        weight_decay=1e-4,
        epochs=36,
        batch_size=256,
        schedule="whole_cosine",
        warmup_epochs=6.0,
        warmup_start=0.0025,
        label_smoothing=0.1,
        no_decay=("*cls_token", "*positional_embedding"),
        no_decay_1d=True,
        mixup=0.8,
        cutmix=1.0,
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        num_layers, alpha, beta = len(config.read_layers), config.integration_dim, config.temporal_dim
        P = config.patch_size
        self.temporal_stem = nn.Conv3d(3, beta, (5, P, P), stride=(1, P, P), padding=(2, 0, 0))
        self.input_linears = nn.ModuleList(nn.Linear(config.width, alpha) for _ in range(num_layers))
        self.integration2temporal_nets = nn.ModuleList(Integration2Temporal(config) for _ in range(num_layers))
        # The lateral of the last layer goes nowhere: official checkpoints have its weights, which were never trained.
        self.integration2temporal_nets[-1].requires_grad_(False)
        self.temporal2integration_nets = nn.ModuleList(Temporal2Integration(config) for _ in range(num_layers))
        self.temporal_nets = nn.ModuleList(TBlock(config) for _ in range(num_layers))
        self.integration_nets = nn.ModuleList(IBlock(config) for _ in range(num_layers))
        self.adapooling_nets = nn.ModuleList(AdaptivePooling(config) for _ in range(config.adaptive_pooling_layers))
        self.proj_spatial_cls_token = nn.Linear(config.width, alpha)
        self.ln_post = nn.LayerNorm(alpha)
        self.proj = nn.Parameter(alpha**-0.5 * torch.randn(alpha, config.embed_dim))
        self.aggregated_cls_token = nn.Parameter(torch.zeros(1, 1, alpha))
        self.aggregated_spatial_cls_token = nn.Parameter(torch.zeros(1, 1, alpha))
        self.text = TextClassifier(config.num_classes, config.embed_dim)
        self.apply(_initialise)
        for token in (self.aggregated_cls_token, self.aggregated_spatial_cls_token):
            nn.init.trunc_normal_(token, std=0.02)

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        return HeadRequirements(
            tokens=config.read_layers,
            pixels=config.gamma if config.temporal_encoder else 0,
            text=config.templates,
            streamed=True,
            num_frames=config.num_frames,
        )

    def set_text(self, text: ClassText) -> None:
        """Classify by the embeddings of these class names; of more, fewer or other classes than trained on, too."""
        self.text.set(text)

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        return self.classify_embedding(self.embed(features))

    def classify_embedding(self, embedding: Float[Tensor, "B E"]) -> Float[Tensor, "B K"]:
        return self.text(embedding)

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B E"]:
        """The video in the space of the text, not normalised."""
        assert features.pixels is not None
        z = self.temporal_stem(self._normalised(features.pixels))
        carried: Tensor | float = 0.0
        for i, layer in enumerate(self.config.read_layers):
            x = features.tokens[layer].to(self.proj.dtype)
            z = self.temporal_nets[i](z)
            m = self.input_linears[i](x) + carried
            u = m + self.temporal2integration_nets[i](z)
            z = z + self.integration2temporal_nets[i](m)
            carried = self.integration_nets[i](u)
        fused = carried + u
        s = self.aggregated_spatial_cls_token.expand(*fused.shape[:2], -1)
        g = self.aggregated_cls_token.expand(len(fused), 1, -1)
        for pooling in self.adapooling_nets:
            s, g = cast(AdaptivePooling, pooling)(fused, s, g)
        return self.ln_post(g[:, 0] + self.proj_spatial_cls_token(x[:, :, 0].mean(dim=1))) @ self.proj

    @torch.no_grad()
    def inner_features(self, features: ClipFeatures) -> list[InnerFeatures]:
        """X, U and Z (after the T-Block) of the patches, of each layer that is read."""
        assert features.pixels is not None
        z, found = self.temporal_stem(self._normalised(features.pixels)), []
        carried: Tensor | float = 0.0
        for i, layer in enumerate(self.config.read_layers):
            x = features.tokens[layer].to(self.proj.dtype)
            z = self.temporal_nets[i](z)
            m = self.input_linears[i](x) + carried
            u = m + self.temporal2integration_nets[i](z)
            temporal = z.flatten(3).permute(0, 2, 3, 1)
            found.append(InnerFeatures(layer=layer, spatial=x[:, :, 1:], integrated=u[:, :, 1:], temporal=temporal))
            z = z + self.integration2temporal_nets[i](m)
            carried = self.integration_nets[i](u)
        return found

    def _normalised(self, pixels: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B 3 F H W"]:
        mean, std = (torch.tensor(x, device=pixels.device) for x in (self.config.pixel_mean, self.config.pixel_std))
        return ((pixels / 255 - mean) / std).permute(0, 4, 1, 2, 3).to(self.proj.dtype)


class TBlock(nn.Module):
    """Z = QuickGELU(Z + Conv(1,3,3)(QuickGELU(Conv(3,1,1)(LN Z)))) of channels-first Z."""

    def __init__(self, config: DiST.Config) -> None:
        super().__init__()
        dim = config.temporal_dim
        self.temporal_net = nn.Sequential(
            OrderedDict(
                c_fc1=nn.Conv3d(dim, dim, (3, 1, 1), padding=(1, 0, 0)),
                gelu1=QuickGELU(),
                c_fc2=nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1)),
            )
        )
        self.ln = nn.LayerNorm(dim)
        self.gelu = QuickGELU()

    def forward(self, z: Float[Tensor, "B c F h w"]) -> Float[Tensor, "B c F h w"]:
        return self.gelu(z + self.temporal_net(self.ln(z.movedim(1, -1)).movedim(-1, 1)))


class IBlock(nn.Module):
    """FFN over the channels plus T-FFN over time, of each token; nothing is added to them."""

    def __init__(self, config: DiST.Config) -> None:
        super().__init__()
        dim = config.integration_dim
        inner = dim // 4
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
        over_time = self.temporal_ffn(self.ln_temporal(u).permute(0, 3, 1, 2).unsqueeze(-1))
        return self.ffn(self.ln(u)) + over_time.squeeze(-1).permute(0, 2, 3, 1)


class Temporal2Integration(nn.Module):
    """down(Z): gamma frames become one, and a learnt CLS token per frame goes before the patches."""

    def __init__(self, config: DiST.Config) -> None:
        super().__init__()
        gamma = config.gamma
        self.linear_fuse = nn.Conv3d(config.temporal_dim, config.integration_dim, (gamma, 1, 1), stride=(gamma, 1, 1))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.num_frames, config.integration_dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, z: Float[Tensor, "B c F h w"]) -> Float[Tensor, "B T N d"]:
        patches = self.linear_fuse(z).flatten(3).permute(0, 2, 3, 1)
        return torch.cat([self.cls_token.transpose(1, 2).expand(len(z), -1, -1, -1), patches], dim=2)


class Integration2Temporal(nn.Module):
    """up(M): each frame gamma times, without CLS."""

    def __init__(self, config: DiST.Config) -> None:
        super().__init__()
        self.grid, self.gamma = config.grid, config.gamma
        self.linear_fuse = nn.Linear(config.integration_dim, config.temporal_dim)

    def forward(self, m: Float[Tensor, "B T N d"]) -> Float[Tensor, "B c F h w"]:
        patches = self.linear_fuse(m[:, :, 1:]).unflatten(2, self.grid)
        return patches.permute(0, 4, 1, 2, 3).repeat_interleave(self.gamma, dim=2)


class AdaptivePooling(nn.Module):
    """One query per frame gathers from its tokens, then one query per clip from those of the frames."""

    def __init__(self, config: DiST.Config) -> None:
        super().__init__()
        dim = config.integration_dim
        self.temporal_transformer, self.spatial_transformer = CrossAttention(config), CrossAttention(config)
        self.positional_embedding = nn.Parameter(torch.zeros(1, config.num_frames, dim))
        nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        self.output_map_cls_token, self.output_map_spatial_cls_token = _mlp(dim), _mlp(dim)
        self.ln_out_temp_cls_token, self.ln_out_spat_cls_token = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self, fused: Float[Tensor, "B T N d"], s: Float[Tensor, "B T d"], g: Float[Tensor, "B 1 d"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B 1 d"]]:
        flat = s.flatten(0, 1).unsqueeze(1)
        flat = flat + self.spatial_transformer(flat, fused.flatten(0, 1))
        flat = flat + self.output_map_spatial_cls_token(self.ln_out_spat_cls_token(flat))
        s = flat.view_as(s)
        g = g + self.temporal_transformer(g, s + self.positional_embedding)
        return s, g + self.output_map_cls_token(self.ln_out_temp_cls_token(g))


class CrossAttention(nn.Module):
    """Attention with one LayerNorm for queries and keys."""

    def __init__(self, config: DiST.Config) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(config.integration_dim, config.num_pooling_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(config.integration_dim)

    def forward(self, query: Float[Tensor, "B q d"], keys: Float[Tensor, "B k d"]) -> Float[Tensor, "B q d"]:
        keys = self.ln_1(keys)
        return self.attn(self.ln_1(query), keys, keys, need_weights=False)[0]


def _mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(c_fc=nn.Linear(dim, 4 * dim), gelu=QuickGELU(), c_proj=nn.Linear(4 * dim, dim)))


def _initialise(module: nn.Module) -> None:
    """As coded; the projections of queries, keys and values keep torch's."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
