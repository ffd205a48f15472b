"""The settings of DiST, with the tables of its paper that vary them."""

from dataclasses import dataclass
from typing import Literal, get_args

TemporalBlock = Literal["r2plus1d", "c3d", "tada", "joint"]
DownSampling = Literal["dconv", "avg", "max"]
UpSampling = Literal["nearest", "trilinear", "deconv"]
Formulation = Literal["channels_last", "plain"]


@dataclass(frozen=True, kw_only=True)
class DiSTConfig:
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
    """Layers of the backbone that are read, first to last; None: all, as in the paper. There are as many T-Blocks."""
    gamma: int = 2
    """Frames that the temporal encoder sees for each frame of the clip (Table 1d)."""
    integration_dim: int = 384
    """Channels of the integration branch, the paper's alpha * width (Table 1e)."""
    temporal_dim: int = 96
    """Channels of the temporal encoder, the paper's beta * width (Table 1f)."""
    adaptive_pooling_layers: int = 2
    """2 on Something-Something, 4 on Kinetics."""
    temporal_encoder: bool = True
    """Table 1a. Without it no pixels are read."""
    integration_branch: bool = True
    """Table 1a. Without it F = FC(X) + down(Z), both of the last layer, is pooled, and no other layer is read. The paper does not
    say what is pooled then."""
    integration_to_temporal: bool = True
    """The lateral up(M) (Table 1b)."""
    temporal_to_integration: bool = True
    """The lateral down(Z) (Table 1b). Without it only the last layer has one, or nothing would come of Z."""
    temporal_block: TemporalBlock = "r2plus1d"
    """Of Table 1c: R(2+1)D, C3D, TAdaConv, or a Transformer over space and time."""
    down_sampling: DownSampling = "dconv"
    """Of down(Z), in time: a strided convolution, or pooling and a linear layer (Table 2a)."""
    up_sampling: UpSampling = "nearest"
    """Of up(M), in time, after its linear layer (Table 2b)."""
    templates: str = "label"
    """The set of templates of the text embeddings; "label" is the name of the class alone."""
    formulation: Formulation = "channels_last"
    """How it is computed, to the same result: the temporal encoder with its channels last and each layer's tokens one at a time,
    or "plain", as the paper writes it, slower and with more memory."""

    def __post_init__(self) -> None:
        for name in ("grid", "pixel_mean", "pixel_std", *(("layers",) if self.layers is not None else ())):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_sizes()
        self._check_choices()
        self._check_effects()

    def _check_sizes(self) -> None:
        sizes = ("num_classes", "num_frames", "num_layers", "width", "patch_size", "embed_dim")
        for name in (*sizes, "gamma", "integration_dim", "temporal_dim", "adaptive_pooling_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid ({self.grid}) must be two positive numbers: rows, columns")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError(f"layers ({self.layers}) must name at least one layer, each once")
        for name, heads in (("integration_dim", self.num_pooling_heads), ("temporal_dim", self.num_joint_heads)):
            if getattr(self, name) % heads and (name == "integration_dim" or self.temporal_block == "joint"):
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of its {heads} attention heads")

    def _check_choices(self) -> None:
        choices = {
            "temporal_block": get_args(TemporalBlock),
            "down_sampling": get_args(DownSampling),
            "up_sampling": get_args(UpSampling),
            "formulation": get_args(Formulation),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}")

    def _check_effects(self) -> None:
        """What was chosen for a part must not be chosen for nothing."""
        parts = {
            "temporal_block": ("temporal_encoder",),
            "down_sampling": ("temporal_encoder",),
            "up_sampling": ("temporal_encoder", "integration_branch", "integration_to_temporal"),
        }
        for name, needed in parts.items():
            default = type(self).__dataclass_fields__[name].default
            missing = [part for part in needed if not getattr(self, part)]
            if getattr(self, name) != default and missing:
                raise ValueError(
                    f"{name} ({getattr(self, name)!r}) has no effect with {missing[0]} off; leave it at {default!r}"
                )

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layers beside which there are blocks, as they are asked for."""
        return tuple(range(self.num_layers)) if self.layers is None else self.layers

    @property
    def has_up(self) -> bool:
        return self.temporal_encoder and self.integration_branch and self.integration_to_temporal

    @property
    def positions_with_down(self) -> tuple[int, ...]:
        """Positions in `read_layers` that have the lateral down(Z)."""
        last = len(self.read_layers) - 1
        if not self.temporal_encoder:
            return ()
        return tuple(range(last + 1)) if self.integration_branch and self.temporal_to_integration else (last,)

    @property
    def positions_read(self) -> tuple[int, ...]:
        """Positions in `read_layers` whose tokens are read."""
        last = len(self.read_layers) - 1
        return tuple(range(last + 1)) if self.integration_branch else (last,)

    @property
    def num_pooling_heads(self) -> int:
        """One attention head for 64 channels, as coded."""
        return max(1, self.integration_dim // 64)

    @property
    def num_joint_heads(self) -> int:
        """Of the joint space-time Transformer block: 32 channels each."""
        return max(1, self.temporal_dim // 32)
