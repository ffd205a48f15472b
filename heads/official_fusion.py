"""What the official checkpoints of Text4Vis and ActionCLIP have in common: a module over the embeddings of the frames
(temporal_fusion.py), and beside it CLIP, which was trained along. So the features that the head reads are those of the tower in
the file, and of no other.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vcache.heads.official import CheckpointMismatch, check_weights, listed, shape_of
from vcache.heads.temporal_fusion import NUM_POSITIONS

KINDS = {
    "transformer.resblocks.": "transf",
    "transformer.transformer_enc.": "transf_cls",
    "lstm_visual.": "lstm",
    "shift.": "conv1d",
}
"""The kind of a module by how names in it begin; one without parameters is "meanp"."""
_TABLE = "frame_position_embeddings.weight"
# What a vision transformer of CLIP consists of, under OpenAI's names.
_OF_TOWER = re.compile(
    r"class_embedding|positional_embedding|proj|conv1\.weight|ln_(pre|post)\.\w+"
    r"|transformer\.resblocks\.\d+\.(attn\.in_proj_\w+|attn\.out_proj\.\w+|ln_[12]\.\w+|mlp\.c_(fc|proj)\.\w+)"
)


@dataclass(frozen=True, kw_only=True)
class FusionCheckpoint:
    """The two parts of a file."""

    fusion: dict[str, Tensor]
    """Under the names of temporal_fusion.py; empty for the mean."""
    clip: dict[str, Tensor]
    """Under OpenAI's names: visual.*, logit_scale, and of ActionCLIP the text tower, transformer.* and others."""

    @property
    def kind(self) -> str:
        """A value of KINDS, or "meanp"."""
        kinds = {kind for start, kind in KINDS.items() if any(name.startswith(start) for name in self.fusion)}
        if len(kinds) > 1 or (self.fusion and not kinds):
            raise CheckpointMismatch(
                listed("its module over the frames is none of the official ones: it has", self.fusion)
            )
        return next(iter(kinds), "meanp")

    @property
    def embed_dim(self) -> int:
        """Channels of CLIP's embeddings."""
        if not self.fusion:
            return shape_of(self.clip, "visual.proj", 2)[1]
        rows, width = shape_of(self.fusion, _TABLE, 2)
        if rows != NUM_POSITIONS:
            raise CheckpointMismatch(f"{_TABLE} has {rows} rows, where the official code has {NUM_POSITIONS}")
        return width

    @property
    def visual(self) -> dict[str, Tensor]:
        """The image tower, under the names inside it and in float32, which is exact."""
        return {name.removeprefix("visual."): x.float() for name, x in self.clip.items() if name.startswith("visual.")}

    @property
    def text(self) -> dict[str, Tensor]:
        """The text tower with its logit scale, in float32; empty where the file has none."""
        rest = {name: x.float() for name, x in self.clip.items() if not name.startswith("visual.")}
        return rest if "token_embedding.weight" in rest else {}

    @property
    def width(self) -> int:
        """Of the image tower."""
        return shape_of(self.clip, "visual.positional_embedding", 2)[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the image tower, which are square."""
        side = math.isqrt(max(shape_of(self.clip, "visual.positional_embedding", 2)[0] - 1, 0))
        return side, side


def fusion_checkpoint(fusion: Mapping[str, Any], clip: Mapping[str, Any]) -> FusionCheckpoint:
    """
    Raises:
        CheckpointMismatch: something is no weight, CLIP or its logit scale is missing, or its image tower does not see each frame
            by itself.
    """
    weights = {name: x for name, x in clip.items() if isinstance(x, Tensor) and x.is_floating_point()}
    check_weights(dict(fusion))
    check_weights(weights)
    shape_of(weights, "logit_scale", 0)
    tower = [name.removeprefix("visual.") for name in weights if name.startswith("visual.")]
    if not tower:
        raise CheckpointMismatch("it is not whole: there is no image tower (visual.*)")
    if strange := [f"visual.{name}" for name in tower if not _OF_TOWER.fullmatch(name)]:
        raise CheckpointMismatch(
            listed("its image tower is not CLIP's vision transformer, which sees each frame by itself: it has", strange)
        )
    return FusionCheckpoint(fusion=dict(fusion), clip=weights)


def check_told(told: Mapping[str, Any], config: Any) -> None:
    """Refuse a Config that the shapes contradict.

    Raises:
        CheckpointMismatch: names the field, its value, and what the weights are made for.
    """
    for name, value in told.items():
        if getattr(config, name) != value:
            raise CheckpointMismatch(f"{name} is set to {getattr(config, name)}, and its weights say {value}")
