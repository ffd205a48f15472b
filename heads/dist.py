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
the same but for the first and the last layer. A part that is switched off has no parameters. How it is computed is in
dist_temporal.py, dist_integration.py and, as the paper writes it, dist_plain.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads import dist_channels_last, dist_plain
from vcache.heads.dist_config import DiSTConfig
from vcache.heads.dist_integration import AdaptivePooling, IBlock, Integration2Temporal, Temporal2Integration
from vcache.heads.dist_temporal import T_BLOCKS, TAda, TBlock
from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, InnerFeatures, Recipe
from vcache.heads.text import ClassText, TextClassifier


@dataclass
class _Layer:
    """What the network has at one layer that is read."""

    layer: int
    u: Tensor
    z: Tensor | None
    """After the T-Block, before the lateral."""
    carried: Tensor | None = None
    """R, without an integration branch None."""


@register_head("dist")
class DiST(nn.Module):
    """The temporal encoder, the integration branch, adaptive pooling, and a classifier of text embeddings."""

    Config = DiSTConfig

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

    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        self.config = config
        d, every = config.integration_dim, range(len(config.read_layers))
        if config.temporal_encoder:
            kernel = (5, config.patch_size, config.patch_size)
            self.temporal_stem = nn.Conv3d(3, config.temporal_dim, kernel, stride=(1, *kernel[1:]), padding=(2, 0, 0))
        self.input_linears = _at(config.positions_read, lambda: nn.Linear(config.width, d))
        # The lateral of the last layer goes nowhere: official checkpoints have its weights, which were never trained.
        self.integration2temporal_nets = _at(every if config.has_up else (), lambda: Integration2Temporal(config))
        if config.has_up:
            self.integration2temporal_nets[str(every[-1])].requires_grad_(False)
        self.temporal2integration_nets = _at(config.positions_with_down, lambda: Temporal2Integration(config))
        self.temporal_nets = _at(
            every if config.temporal_encoder else (), lambda: T_BLOCKS[config.temporal_block](config)
        )
        self.integration_nets = _at(every if config.integration_branch else (), lambda: IBlock(config))
        self.adapooling_nets = nn.ModuleList(AdaptivePooling(config) for _ in range(config.adaptive_pooling_layers))
        self.proj_spatial_cls_token = nn.Linear(config.width, d)
        self.ln_post = nn.LayerNorm(d)
        self.proj = nn.Parameter(d**-0.5 * torch.randn(d, config.embed_dim))
        self.aggregated_cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.aggregated_spatial_cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.text = TextClassifier(config.num_classes, config.embed_dim)
        self.apply(_initialise)
        for token in (self.aggregated_cls_token, self.aggregated_spatial_cls_token):
            nn.init.trunc_normal_(token, std=0.02)

    @property
    def _ways(self) -> ModuleType:
        """No attribute: a head with a module of Python in it could not be copied."""
        return dist_channels_last if self.config.formulation == "channels_last" else dist_plain

    @staticmethod
    def requires(config: DiSTConfig) -> HeadRequirements:
        return HeadRequirements(
            tokens=tuple(config.read_layers[i] for i in config.positions_read),
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

    def class_embeddings(self) -> Float[Tensor, "K E"]:
        return self.text.embeddings

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B E"]:
        """The video in the space of the text, not normalised.

        The features must stay as they are until the gradients are computed: they are read again for them.

        Raises:
            ValueError: the features have other frames, tokens, pixels or width than the configuration says.
        """
        return self._embed(self._stem(features), features)

    @torch.no_grad()
    def inner_features(self, features: ClipFeatures) -> list[InnerFeatures]:
        """Of each layer whose tokens are read, first to last: the frozen patches, U, and Z after the T-Block."""
        return [
            InnerFeatures(
                layer=at.layer,
                spatial=self._tokens(features, at.layer)[:, :, 1:],
                integrated=at.u[:, :, 1:],
                temporal=None if at.z is None else self._ways.z_by_patch(at.z),
            )
            for at in self._layers(self._stem(features), features)
        ]

    def _embed(self, z: Tensor | None, features: ClipFeatures) -> Float[Tensor, "B E"]:
        for at in self._layers(z, features):
            last = at
        fused = last.u if last.carried is None else last.u + last.carried
        s = self.aggregated_spatial_cls_token.expand(*fused.shape[:2], -1)
        g = self.aggregated_cls_token.expand(fused.shape[0], 1, -1)
        fused = self._ways.before_pooling(fused)
        for pooling in self.adapooling_nets:
            s, g = self._ways.pool(cast(AdaptivePooling, pooling), fused, s, g)
        cls = self._tokens(features, last.layer)[:, :, 0].to(self.proj.dtype)
        return self.ln_post(g[:, 0] + self.proj_spatial_cls_token(cls.mean(dim=1))) @ self.proj

    def _layers(self, z: Tensor | None, features: ClipFeatures) -> Iterator[_Layer]:
        """The network from the stem on, layer by layer; layers without tokens are passed over."""
        ways, config, carried = self._ways, self.config, None
        for i, layer in enumerate(config.read_layers):
            if z is not None:
                z = ways.t_block(cast(TBlock, self.temporal_nets[str(i)]), z)
            if i not in config.positions_read:
                continue
            linear = cast(nn.Linear, self.input_linears[str(i)])
            m = ways.read(linear, lambda layer=layer: self._tokens(features, layer), carried)
            u = m
            if z is not None and i in config.positions_with_down:
                u = ways.add_down(cast(Temporal2Integration, self.temporal2integration_nets[str(i)]), m, z)
            if config.integration_branch:
                carried = ways.i_block(cast(IBlock, self.integration_nets[str(i)]), u)
            yield _Layer(layer, u, z, carried)
            if z is not None and config.has_up and i + 1 < len(config.read_layers):
                z = ways.add_up(cast(Integration2Temporal, self.integration2temporal_nets[str(i)]), m, z)

    def _stem(self, features: ClipFeatures) -> Tensor | None:
        if not self.config.temporal_encoder:
            return None
        config, pixels = self.config, features.pixels
        p, (h, w) = config.patch_size, config.grid
        # Of a frame whose side is no multiple of p, what is beyond the last patch is no part of the backbone's patches either.
        whole = None if pixels is None else pixels[:, :, : pixels.shape[2] // p * p, : pixels.shape[3] // p * p]
        expected = (config.num_frames * config.gamma, h * p, w * p, 3)
        if pixels is None or whole is None or whole.shape[1:] != expected:
            got = "none" if pixels is None else tuple(pixels.shape[1:])
            raise ValueError(f"pixels must be {expected} per clip (frames, height, width, 3), got {got}")
        return self._ways.stem(self.temporal_stem, whole, config.pixel_mean, config.pixel_std)

    def _tokens(self, features: ClipFeatures, layer: int) -> Float[Tensor, "B T N D"]:
        (h, w), x = self.config.grid, features.tokens[layer]
        expected = (self.config.num_frames, 1 + h * w, self.config.width)
        if x.shape[1:] != expected:
            raise ValueError(
                f"tokens of layer {layer} must be {expected} per clip (frames, 1 + {h}x{w} patches, width), "
                f"got {tuple(x.shape[1:])}"
            )
        return x


def _at(positions: Iterable[int], make: Callable[[], nn.Module]) -> nn.ModuleDict:
    """A module at each of these positions among the layers, named by it as in a ModuleList."""
    return nn.ModuleDict({str(i): make() for i in positions})


def _initialise(module: nn.Module) -> None:
    """As coded; the projections of queries, keys and values of adaptive pooling keep torch's."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv3d | nn.ConvTranspose3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, TAda):  # after what is in it
        module.start_as_convolution()
