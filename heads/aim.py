"""AIM: bottleneck adapters in the blocks of a frozen CLIP, whose own attention is used over time as well.

Yang et al. 2023, "AIM: Adapting Image Models for Efficient Video Action Recognition", eq. 2-4; ResidualAttentionBlock,
mmaction/models/backbones/vit_clip.py at b3580d2. In each adapted block, with attention that is frozen and shared by both steps:

    x = x + T_Adapter(MSA over time(ln_1(x)))                   temporal adaptation, before the spatial one
    x = x + S_Adapter(MSA(ln_1(x)))                             S_Adapter(h) = h + bottleneck(h)
    x = x + MLP(ln_2(x)) + scale MLP_Adapter(ln_2(x))           joint adaptation

At initialisation it is the frozen CLIP of each frame: every adapter ends in zeros. Here only the top blocks are run and adapted;
the official code adapts all. differs: the temporal embedding is added to what enters the lowest block that is run, where the
paper adds it before ln_pre, far below; it starts at zero in both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.registry import register_head
from vcache.heads.requirements import Recipe
from vcache.heads.tail_block import TowerBlock
from vcache.heads.tail_head import TailConfig, TailHead

Positions = Literal["all", "every_second", "lower_half"]


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
        """Table 7: which of the blocks that are run have adapters."""
        temporal_adapters: int = 1
        """2: another adapter before the attention over time, as on Something-Something."""
        adapter_scale: float = 0.5
        """Of the joint adapter. The official Something-Something configs have 1, the paper 0.5."""
        temporal_embedding: bool = True
        """A learnt vector for each frame, added to what enters the lowest block."""
        drop_path: float = 0.2
        """Of the last block of the backbone, less in those below: clips whose temporal and joint adapters are left out."""
        dropout: float = 0.5
        """Before the linear classifier."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.positions not in (choices := get_args(Positions)):
                raise ValueError(f"positions ({self.positions!r}) must be one of {', '.join(map(repr, choices))}")
            if self.temporal_adapters not in (1, 2):
                raise ValueError(f"temporal_adapters ({self.temporal_adapters}) must be 1 or 2")
            if not 0 < self.bottleneck <= 4 or int(self.bottleneck * self.width) < 1:
                raise ValueError(f"bottleneck ({self.bottleneck}) must be above 0 and make at least one channel")
            for name in ("drop_path", "dropout"):
                if not 0 <= getattr(self, name) < 1:
                    raise ValueError(f"{name} ({getattr(self, name)}) must be in [0, 1)")

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
    recipe = Recipe(
        lr=3e-4,
        weight_decay=0.05,
        epochs=30,
        batch_size=64,
        warmup_epochs=2.5,
        warmup_start=0.1,
        no_decay=("ln_post.*",),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config, dropout=config.dropout)
        self.adapters = nn.ModuleDict({str(layer): BlockAdapters(config, layer) for layer in config.adapted_layers})
        if config.temporal_embedding:
            self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.width))

    def enter(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        return x + self.temporal_embedding.unsqueeze(2) if self.config.temporal_embedding else x

    def adapt_block(self, layer: int, block: TowerBlock, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        if str(layer) not in self.adapters:
            return block(x)
        return cast(BlockAdapters, self.adapters[str(layer)])(block, x)


class BlockAdapters(nn.Module):
    """The adapters of one block, by their official names."""

    def __init__(self, config: AIM.Config, layer: int) -> None:
        super().__init__()
        self.scale = config.adapter_scale
        self.drop_path = DropPath(config.drop_path * layer / max(1, config.num_layers - 1))
        D, hidden = config.width, int(config.bottleneck * config.width)
        self.T_Adapter = Adapter(D, hidden) if config.temporal else None
        self.T_Adapter_in = Adapter(D, hidden) if config.temporal and config.temporal_adapters == 2 else None
        self.S_Adapter = Adapter(D, hidden) if config.spatial else None
        self.MLP_Adapter = Adapter(D, hidden) if config.joint else None

    def forward(self, block: TowerBlock, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        if self.T_Adapter is not None:
            h = block.ln_1(x)
            if self.T_Adapter_in is not None:
                h = h + self.T_Adapter_in(h)
            x = x + self.drop_path(self.T_Adapter(block.attend_over_time(h)))
        attended = block.attend(block.ln_1(x))
        x = x + attended
        if self.S_Adapter is not None:
            x = x + self.S_Adapter(attended)
        h = block.ln_2(x)
        x = x + block.feed_forward(h)
        if self.MLP_Adapter is not None:
            x = x + self.drop_path(self.scale * self.MLP_Adapter(h))
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
    """In training, leaves out a branch for some of the clips and frames, and scales it up for the others."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        if not self.training or not self.probability:
            return x
        kept = 1 - self.probability
        return x * torch.empty(x.shape[0], x.shape[1], 1, 1, device=x.device, dtype=x.dtype).bernoulli_(kept) / kept
