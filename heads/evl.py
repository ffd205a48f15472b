"""EVL: a small Transformer decoder whose one query gathers from several layers of a frozen backbone.

Lin et al. 2022, "Frozen CLIP Models are Efficient Video Learners", eq. 1-8; EVLDecoder and EVLTransformer, model.py at
b282e8b. Decoder layer i reads X, the i-th of `layers`:

    Y = X + T-Conv(X) + T-PE + T-CA(maps)         all three from the raw X
    q = q + Attention(LN1(q), LN3(Y));  q = q + MLP(LN2(q))

Parameters have the official names, so that official.py can load them. Differs, to the same result: the features are
never written to (upstream adds into them in place), attention is computed with absorbed projections (attention.py), T-CA by
displacement (cross_frame.py), both a few clips at a time (modulated_pooling.py). evl_plain.py is the paper written out.
`tca_gain` is ours.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads import evl_plain
from vcache.heads.attention import SingleQueryAttention
from vcache.heads.cross_frame import TemporalCrossAttention
from vcache.heads.modulated_pooling import Pooling, TemporalTerms, pool
from vcache.heads.quick_gelu import QuickGELU
from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, InnerFeatures, Recipe
from vcache.heads.temporal_conv import TemporalConvolution

Formulation = Literal["absorbed", "plain"]
QueryInit = Literal["zero", "normal"]


@register_head("evl")
class EVL(nn.Module):
    """The EVL decoder and its classifier. It knows the order of the frames only through T-Conv, T-PE and T-CA."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        num_frames: int = 8
        """Frames of a clip; another number is another store."""
        width: int = 768
        num_heads: int = 12
        """Of the decoder's attention. The backbone's unless set; the maps are means over the backbone's own heads."""
        grid: tuple[int, int] = (14, 14)
        """Patches of a frame: rows, columns."""
        layers: tuple[int, ...] = (-4, -3, -2, -1)
        """The backbone layer that each decoder layer reads, first to last. The paper's Kinetics models read the last
        four, its Something-Something models all 12 (ViT-B) or 24 (ViT-L). A layer may come several times, as in Table 6b:
        it is read once."""
        qkv_dim: int | None = None
        """Width of the queries, keys and values; None: `width`."""
        mlp_factor: float = 4.0
        """Hidden width of the MLP, in widths."""
        mlp_dropout: float = 0.5
        """Dropout between the two layers of the MLP."""
        cls_dropout: float = 0.5
        """Dropout before the last linear layer."""
        temporal_conv: bool = True
        """T-Conv: a depthwise convolution over three frames (eq. 5)."""
        temporal_pos_embed: bool = True
        """T-PE: a learnt vector per frame (eq. 6)."""
        temporal_cross_attention: bool = True
        """Reads the cross-frame maps of every layer. The paper's parameter counts for Kinetics with ViT-B are without
        it; the released scripts leave it on."""
        pooling: Pooling = "none"
        """What a decoder layer attends to (Table 6c): all tokens, the CLS token of each frame, the mean of each frame's
        patches (CLS left out), or the mean of each token over the frames (CLS too); of Y, after the temporal terms.
        "cls" reads no patches, and so goes without T-CA, which gives CLS nothing."""
        query_init: QueryInit = "zero"
        """Where the query token starts: at zero, as in the official code, or drawn from N(0, 0.02), which that code
        defines in a method that it never calls (model.py 114). The paper does not say."""
        tca_gain: float = 1.0
        """Multiplies the output of T-CA. Ours, 1 is the paper: raise it where a backbone's maps are nearly flat."""

        formulation: Formulation = "absorbed"
        """How it is computed, to the same result: attention.py and modulated_pooling.py, or "plain", as the paper writes
        it (evl_plain.py), several times slower."""

        def __post_init__(self) -> None:
            object.__setattr__(self, "layers", tuple(self.layers))
            object.__setattr__(self, "grid", tuple(self.grid))
            for name in ("num_classes", "num_frames", "width", "num_heads"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
            if len(self.grid) != 2 or min(self.grid) < 1:
                raise ValueError(f"grid ({self.grid}) must be two positive numbers: rows, columns")
            if not self.layers:
                raise ValueError("layers must name at least one layer, as in layers=-2,-1")
            if self.attention_dim < 1 or self.attention_dim % self.num_heads:
                raise ValueError(
                    f"qkv_dim ({self.attention_dim}) must be a positive multiple of num_heads ({self.num_heads})"
                )
            for name, kind in (("pooling", Pooling), ("query_init", QueryInit), ("formulation", Formulation)):
                choices = get_args(kind)
                if getattr(self, name) not in choices:
                    raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, choices))}")
            if self.pooling == "cls" and self.temporal_cross_attention:
                raise ValueError(
                    "pooling 'cls' reads CLS tokens alone, to which temporal_cross_attention adds nothing; "
                    "set temporal_cross_attention=false"
                )
            # Else its rounding to a width raises, in words that name no setting.
            if not math.isfinite(self.mlp_factor) or self.mlp_dim < 1:
                raise ValueError(f"mlp_factor ({self.mlp_factor}) must be a number above 0")
            for name in ("mlp_dropout", "cls_dropout"):
                if not 0 <= getattr(self, name) < 1:
                    raise ValueError(f"{name} ({getattr(self, name)}) must be in [0, 1)")

        @property
        def attention_dim(self) -> int:
            return self.width if self.qkv_dim is None else self.qkv_dim

        @property
        def mlp_dim(self) -> int:
            return round(self.mlp_factor * self.width)

    summary = "Transformer decoder over several layers, with temporal convolution, positions and cross-frame attention"
    # Kinetics-400, appendix A of the paper. All parameters are decayed; there is no warm-up.
    recipe = Recipe(lr=4e-4, weight_decay=0.05, steps=50_000, batch_size=256)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.decoder = EVLDecoder(config)
        self.proj = nn.Sequential(
            nn.LayerNorm(config.width), nn.Dropout(config.cls_dropout), nn.Linear(config.width, config.num_classes)
        )

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        layers, num_frames = tuple(dict.fromkeys(config.layers)), config.num_frames
        if config.pooling == "cls":
            return HeadRequirements(cls=layers, num_frames=num_frames)
        maps = layers if config.temporal_cross_attention else ()
        return HeadRequirements(tokens=layers, maps=maps, num_frames=num_frames)

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        return self.proj(self.decoder(features))

    def class_embeddings(self) -> Float[Tensor, "K D"]:
        return cast(nn.Linear, self.proj[-1]).weight

    def attention(self, features: ClipFeatures) -> list[tuple[int, Float[Tensor, "B H T N"]]]:
        """Of each decoder layer: the layer it reads, and what its query gives each token there; sums to 1 over T*N.

        With `pooling`, the tokens are the pooled ones: N is 1 (CLS or the mean of the patches), or T is.
        """
        return self.decoder.attention(features)

    def inner_features(self, features: ClipFeatures) -> list[InnerFeatures]:
        """X and Y of the patches, of the layer that each decoder layer reads.

        Raises:
            ValueError: with `pooling` "cls" no patches are read.
        """
        if self.config.pooling == "cls":
            raise ValueError("the head reads CLS tokens alone (pooling='cls'), so there are no patches to look at")
        return self.decoder.inner_features(features)


class EVLDecoder(nn.Module):
    """M decoder layers and the query token that they refine."""

    def __init__(self, config: EVL.Config) -> None:
        super().__init__()
        self.config = config
        M, T, D = len(config.layers), config.num_frames, config.width
        self.decoder_layers = nn.ModuleList(EVLDecoderLayer(config) for _ in range(M))
        if config.temporal_conv:
            self.temporal_conv = nn.ModuleList(TemporalConvolution(D) for _ in range(M))
        if config.temporal_pos_embed:
            self.temporal_pos_embed = nn.ParameterList(nn.Parameter(torch.zeros(T, D)) for _ in range(M))
        if config.temporal_cross_attention:
            self.cross_attention = nn.ModuleList(
                TemporalCrossAttention(config.grid, D, config.tca_gain) for _ in range(M)
            )
        self.cls_token = nn.Parameter(torch.zeros(D))
        if config.query_init == "normal":
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B D"]:
        """The refined query token of each clip.

        Raises:
            ValueError: the features have other frames, tokens or width than the configuration says.
        """
        query = self.cls_token.expand(features.num_clips, -1)
        for i, layer in enumerate(self.config.layers):
            x = self._read(features, layer)
            maps = features.maps[layer] if self.config.temporal_cross_attention else None
            query = self.decoder_layers[i](query, x, maps, self.terms(i))
        return query

    def terms(self, i: int) -> TemporalTerms:
        """The temporal modules of decoder layer i that are on."""
        config = self.config
        return TemporalTerms(
            conv=cast(TemporalConvolution, self.temporal_conv[i]) if config.temporal_conv else None,
            positions=self.temporal_pos_embed[i] if config.temporal_pos_embed else None,
            cross_attention=cast(TemporalCrossAttention, self.cross_attention[i])
            if config.temporal_cross_attention
            else None,
            pooling=config.pooling,
        )

    def modulate(
        self, i: int, x: Float[Tensor, "B T N D"], maps: Float[Tensor, "B T-1 2 N-1 N-1"] | None
    ) -> Float[Tensor, "B T N D"]:
        """Y of decoder layer i, in the parameters' dtype, before it is pooled: for looking at, training does not need it."""
        return evl_plain.modulate(x.to(self.cls_token.dtype), maps, self.terms(i))

    @torch.no_grad()
    def attention(self, features: ClipFeatures) -> list[tuple[int, Float[Tensor, "B H T N"]]]:
        """(layer read, attention weights) of every decoder layer, first to last."""
        query, weights = self.cls_token.expand(features.num_clips, -1), []
        for i, layer in enumerate(self.config.layers):
            x, block = self._read(features, layer), cast(EVLDecoderLayer, self.decoder_layers[i])
            maps = features.maps[layer] if self.config.temporal_cross_attention else None
            y = pool(self.modulate(i, x, maps), self.config.pooling)
            flat = block.attn.weights(block.norm1(query), y.flatten(1, 2), block.norm3)
            weights.append((layer, flat.unflatten(-1, y.shape[1:3])))
            query = block(query, x, maps, self.terms(i))
        return weights

    @torch.no_grad()
    def inner_features(self, features: ClipFeatures) -> list[InnerFeatures]:
        """The patches of X and Y of every decoder layer, first to last."""
        found = []
        for i, layer in enumerate(self.config.layers):
            x = self._read(features, layer)
            maps = features.maps[layer] if self.config.temporal_cross_attention else None
            y = self.modulate(i, x, maps)
            found.append(InnerFeatures(layer=layer, spatial=x[:, :, 1:], integrated=y[:, :, 1:], temporal=None))
        return found

    def _read(self, features: ClipFeatures, layer: int) -> Tensor:
        """X of a layer, (B, T, N, D): all tokens, or the CLS token alone."""
        (h, w), config = self.config.grid, self.config
        if config.pooling == "cls":
            x, kind, axes = features.cls[layer].unsqueeze(2), "CLS", "(frames, 1, width)"
            expected = (config.num_frames, 1, config.width)
        else:
            x, kind, axes = features.tokens[layer], "tokens", f"(frames, 1 + {h}x{w} patches, width)"
            expected = (config.num_frames, 1 + h * w, config.width)
        if x.shape[1:] != expected:
            raise ValueError(f"{kind} of layer {layer} must be {expected} per clip {axes}, got {tuple(x.shape[1:])}")
        return x


class EVLDecoderLayer(nn.Module):
    """Single-query attention and an MLP, both pre-norm and residual."""

    def __init__(self, config: EVL.Config) -> None:
        super().__init__()
        self.formulation = config.formulation
        self.attn = SingleQueryAttention(config.width, config.attention_dim, config.num_heads)
        fc1, fc2 = nn.Linear(config.width, config.mlp_dim), nn.Linear(config.mlp_dim, config.width)
        for linear in (fc1, fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        dropout = nn.Dropout(config.mlp_dropout)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=QuickGELU(), dropout=dropout, fc2=fc2))
        self.norm1 = nn.LayerNorm(config.width)  # of the query
        self.norm2 = nn.LayerNorm(config.width)  # before the MLP
        self.norm3 = nn.LayerNorm(config.width)  # of the tokens

    def forward(
        self,
        query: Float[Tensor, "B D"],
        x: Float[Tensor, "B T N D"],
        maps: Float[Tensor, "B T-1 2 N-1 N-1"] | None,
        terms: TemporalTerms,
    ) -> Float[Tensor, "B D"]:
        normed = self.norm1(query)
        if self.formulation == "plain":
            query = query + evl_plain.attend(self.attn, normed, x, maps, terms, self.norm3)
        else:
            query = query + self.attn.attend(normed, x, maps, terms, self.norm3)
        return query + self.mlp(self.norm2(query))
