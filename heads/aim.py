"""AIM: bottleneck adapters in the blocks of a frozen CLIP, whose own attention is used over time as well.

Yang et al. 2023, "AIM: Adapting Image Models for Efficient Video Action Recognition", eq. 2-4; ResidualAttentionBlock,
mmaction/models/backbones/vit_clip.py at b3580d2. In each adapted block, with attention that is frozen and shared by both steps:

    x = x + T_Adapter(MSA over time(ln_1(x)))                   temporal adaptation, before the spatial one
    x = x + S_Adapter(MSA(ln_1(x)))                             S_Adapter(h) = h + bottleneck(h)
    x = x + MLP(ln_2(x)) + scale MLP_Adapter(ln_2(x))           joint adaptation

At initialisation it is the frozen CLIP of each frame: every adapter ends in zeros. Here only the top blocks are run and adapted;
the official code adapts all.

The paper adds the temporal embedding before ln_pre, below every block. differs: by default it is added to what enters the lowest
block that is run, the cut, as what is below is in the cache. `temporal_embedding="stem"` is the paper's place, and that of
official checkpoints: all blocks and the patch embedding are run on stored pixels. It starts at zero in both.

Drop path is as coded: timm's DropPath is given x of (tokens, clips * frames, width) and draws once for each entry of its first
axis, so that a token's place is dropped for the whole batch. `drop_path_of="clips"` is stochastic depth as the paper cites it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe
from vcache.heads.tail import FrozenTail
from vcache.heads.tail_block import TowerBlock
from vcache.heads.tail_head import TailConfig, TailHead
from vcache.heads.tail_stem import TailStem, normalised

Positions = Literal["all", "every_second", "lower_half"]
TemporalEmbedding = Literal["cut", "stem", "none"]
DropPathOf = Literal["tokens", "clips"]


@register_head("aim")
class AIM(TailHead):
    """Spatial, temporal and joint adapters in the top blocks of the frozen backbone."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TailConfig):
        spatial: bool = True
        """Table 1: an adapter behind the attention of each frame."""
        temporal: bool = True
        """Table 1: the same attention over time before it, with an adapter behind."""
        joint: bool = True
        """Table 1: an adapter beside the MLP."""
        bottleneck: float = 0.25
        """Table 8: width of the bottleneck, in widths."""
        positions: Positions = "all"
        """Table 7: which of the blocks that are run have adapters. "Bottom 6" is lower_half of all 12 blocks. Of "Skip" the paper
        says "every two blocks", not which: here the last, and every other one below it."""
        temporal_adapters: int = 1
        """2: another adapter before the attention over time, as on Something-Something (also in Table 1, by its parameters)."""
        adapter_scale: float = 0.5
        """Of the joint adapter. The official Something-Something configs have 1, the paper 0.5."""
        temporal_embedding: TemporalEmbedding = "cut"
        """A learnt vector for each frame, added to what enters the lowest block that is run; or with "stem" before ln_pre, as in
        the paper, which runs all blocks and the patch embedding on stored pixels."""
        drop_path: float = 0.2
        """Probability in the last block of the backbone with which temporal and joint adapters are left out in training; less in
        those below, by their depth in the whole backbone, and 0 in the first."""
        drop_path_of: DropPathOf = "tokens"
        """What is left out together: a token's place in all clips and frames of a batch, as the official code does, or a clip."""
        patch_size: int = 16
        """Side of a patch in pixels; this and the next two are of the "stem" alone."""
        pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
        """What the pixels are normalised by, as those that the backbone saw; of values from 0 to 1."""
        pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("pixel_mean", "pixel_std"):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            self._check_choices()
            if self.temporal_embedding == "stem" and self.num_blocks != self.num_layers:
                raise ValueError(
                    f"temporal_embedding 'stem' is before ln_pre, below all blocks: it needs blocks ({self.num_blocks}) to be "
                    f"{self.num_layers}"
                )
            if self.temporal_adapters not in (1, 2):
                raise ValueError(f"temporal_adapters ({self.temporal_adapters}) must be 1 or 2")
            if not 0 < self.bottleneck <= 4 or int(self.bottleneck * self.width) < 1:
                raise ValueError(f"bottleneck ({self.bottleneck}) must be above 0 and make at least one channel")
            if not 0 <= self.drop_path < 1:
                raise ValueError(f"drop_path ({self.drop_path}) must be in [0, 1)")

        def _check_choices(self) -> None:
            kinds = {"positions": Positions, "temporal_embedding": TemporalEmbedding, "drop_path_of": DropPathOf}
            for name, kind in kinds.items():
                if (value := getattr(self, name)) not in (choices := get_args(kind)):
                    raise ValueError(f"{name} ({value!r}) must be one of {', '.join(map(repr, choices))}")

        @property
        def adapted_layers(self) -> tuple[int, ...]:
            """The blocks with adapters, absolute."""
            layers = tuple(self.layers_run)
            chosen: Mapping[str, tuple[int, ...]] = {
                "all": layers,
                "every_second": layers[::-2][::-1],
                "lower_half": layers[: max(1, len(layers) // 2)],
            }
            return chosen[self.positions]

    summary = "bottleneck adapters in the top blocks of the backbone, with its attention used over time"
    # Kinetics-400, configs/recognition/vit/vitclip_base_k400.py. Biases of adapters and the temporal embedding are decayed.
    # The factor is that of the official ViT-L configs; by default nothing of the backbone but ln_post is trained.
    recipe = Recipe(
        lr=3e-4,
        weight_decay=0.05,
        epochs=30,
        batch_size=64,
        warmup_epochs=2.5,
        warmup_start=0.1,
        no_decay=("ln_post.*",),
        lr_multipliers=(("blocks.*", 0.1), ("classifier.proj", 0.1)),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.adapters = nn.ModuleDict({str(layer): BlockAdapters(config, layer) for layer in config.adapted_layers})
        if config.temporal_embedding != "none":
            self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.width))

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        asked = TailHead.requires(config)
        if config.temporal_embedding != "stem":
            return asked
        return replace(asked, stem=False, pixels=1, tail_stem=True)

    def set_tail(self, tail: FrozenTail) -> None:
        """As every head on a tail, and with temporal_embedding "stem" the tail is to have one.

        Raises:
            ValueError: it has none, one of other patches, or is of another backbone.
        """
        if self.config.temporal_embedding == "stem":
            told, there = (self.config.patch_size, self.config.grid), tail.shape.stem
            if there is None:
                raise ValueError("the head runs the patch embedding of the backbone, too, and the tail has none")
            if told != (there.patch_size, there.grid):
                raise ValueError(
                    f"the head is for {told[1][0]}x{told[1][1]} patches of {told[0]} pixels; the tail's patch embedding is for "
                    f"{there.grid[0]}x{there.grid[1]} of {there.patch_size}"
                )
        super().set_tail(tail)

    def read(self, features: ClipFeatures) -> Float[Tensor, "B T N D"]:
        """The cached tokens that enter the lowest block, or what enters ln_pre, of the pixels.

        Raises:
            ValueError: they have other sizes than the configuration says.
        """
        config, pixels = self.config, features.pixels
        if config.temporal_embedding != "stem":
            return super().read(features)
        if pixels is None or pixels.shape[1] != config.num_frames:
            got = "none" if pixels is None else pixels.shape[1]
            raise ValueError(f"pixels must be those of {config.num_frames} frames per clip, got {got}")
        images = normalised(pixels, config.pixel_mean, config.pixel_std, self.ln_post.weight.dtype)
        return self._stem.embed_patches(images)

    def enter(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        if self.config.temporal_embedding == "none":
            return x
        x = x + self.temporal_embedding.unsqueeze(2)
        return self._stem.ln_pre(x) if self.config.temporal_embedding == "stem" else x

    @property
    def _stem(self) -> TailStem:
        stem = self.tail.stem
        assert stem is not None  # set_tail
        return stem

    def adapt_block(
        self, layer: int, block: TowerBlock, x: Float[Tensor, "B T N D"], wanted: int | None
    ) -> Float[Tensor, "B T M D"]:
        if str(layer) not in self.adapters:
            return block(x, wanted)
        return cast(BlockAdapters, self.adapters[str(layer)])(block, x, wanted)


class BlockAdapters(nn.Module):
    """The adapters of one block, by their official names."""

    def __init__(self, config: AIM.Config, layer: int) -> None:
        super().__init__()
        self.scale = config.adapter_scale
        probability = config.drop_path * layer / max(1, config.num_layers - 1)
        self.drop_path = DropPath(probability, config.drop_path_of)
        D, hidden = config.width, int(config.bottleneck * config.width)
        self.T_Adapter = Adapter(D, hidden) if config.temporal else None
        self.T_Adapter_in = Adapter(D, hidden) if config.temporal and config.temporal_adapters == 2 else None
        self.S_Adapter = Adapter(D, hidden) if config.spatial else None
        self.MLP_Adapter = Adapter(D, hidden) if config.joint else None

    def forward(
        self, block: TowerBlock, x: Float[Tensor, "B T N D"], wanted: int | None = None
    ) -> Float[Tensor, "B T M D"]:
        if self.T_Adapter is not None:
            h = block.ln_1(x)
            if self.T_Adapter_in is not None:
                h = h + self.T_Adapter_in(h)
            x = x + self.drop_path(self.T_Adapter(block.attend_over_time(h)))
        attended = block.attend(block.ln_1(x), wanted)
        x = x[:, :, :wanted] + attended
        if self.S_Adapter is not None:
            x = x + self.S_Adapter(attended)
        h = block.ln_2(x)
        x = x + block.feed_forward(h)
        if self.MLP_Adapter is not None:
            x = torch.add(x, self.drop_path(self.MLP_Adapter(h)), alpha=self.scale)
        return x


class Adapter(nn.Module):
    """A bottleneck that starts as zero. Its GELU is the exact one, not CLIP's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.D_fc1, self.D_fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.trunc_normal_(self.D_fc1.weight, std=0.02)
        for zero in (self.D_fc1.bias, self.D_fc2.weight, self.D_fc2.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.D_fc2(nn.functional.gelu(self.D_fc1(h)))


class DropPath(nn.Module):
    """In training, leaves out a branch for some places of tokens, or some clips, and scales it up for the others."""

    def __init__(self, probability: float, of: DropPathOf) -> None:
        super().__init__()
        self.probability, self.of = probability, of

    def forward(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        if not self.training or not self.probability:
            return x
        shape = (1, 1, x.shape[2], 1) if self.of == "tokens" else (x.shape[0], 1, 1, 1)
        kept = 1 - self.probability
        return x * x.new_empty(shape).bernoulli_(kept).div_(kept)
