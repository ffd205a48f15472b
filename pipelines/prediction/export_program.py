"""One torch module from uint8 frames to logits: what is compiled for ONNX and torch.export.

    frames (B, F, S, S, 3) uint8, resized and cropped     ->  normalised, through the backbone, rounded as the store rounds
    ClipFeatures, by the code that makes them of a store  ->  head  ->  logits (B, K)

Normalising, taps, rounding, maps and features are those of the extractor and of the loader. Heads with a formulation that is made
for speed run the one of their paper, which computes the same with torch's own operations.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vcache.extract.backbone import FrozenBackbone
from vcache.extract.preprocess import Preprocessing
from vcache.pipelines.batches import frame_features
from vcache.pipelines.loading.batch import BatchFeatures, StoreWeights
from vcache.pipelines.precision import encoded
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.layout import BFLOAT16, ArraySpec
from vcache.store.quantise import source_name

PLAIN = "plain"
"""The formulation of a head in torch's own operations."""


@dataclass(frozen=True, kw_only=True)
class ProgramInput:
    """Frames of one clip as the program takes them."""

    num_frames: int
    """That are given: those of the clip, and with pixels those between them."""
    frame_every: int
    """Every so many of them are frames of the clip, from the first on: what the backbone sees."""
    image_size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one clip: frames, rows, columns, red-green-blue."""
        return (self.num_frames, self.image_size, self.image_size, 3)


class VideoProgram(nn.Module):
    """A head behind normalisation and backbone. In evaluation mode, without gradients."""

    def __init__(
        self,
        head: nn.Module,
        backbone: FrozenBackbone,
        preprocessing: Preprocessing,
        plan: ReadPlan,
        specs: Iterable[ArraySpec],
        weights: StoreWeights,
        taken: ProgramInput,
    ) -> None:
        """`specs` are the store's of the arrays that the plan reads; `weights` go with the plan."""
        super().__init__()
        self.head, self.backbone = plain(head).requires_grad_(False).eval(), backbone
        self.preprocessing, self.plan, self.weights, self.taken = preprocessing, plan, weights, taken
        self.dtypes = _dtypes(plan, specs)
        # Each array is given as it is read, with no frame between.
        self._steps = {name: plan.step_of(name) for name in plan.arrays}

    @torch.no_grad()
    def forward(self, frames: UInt8[Tensor, "B F S S 3"]) -> Float[Tensor, "B K"]:
        arrays = self._arrays(frames)
        features = BatchFeatures(arrays, self._steps, self.weights, (self.plan,)).of(self.plan)
        logits: Tensor = self.head(features)
        return logits.float()

    def _arrays(self, frames: Tensor) -> dict[str, Tensor]:
        """What a store would hold of the clips."""
        taken, names = self.taken, tuple(self.dtypes)
        num_frames = taken.num_frames // taken.frame_every
        clips = frames[:, :: taken.frame_every]
        images = self.preprocessing.normalise(clips.flatten(0, 1).permute(0, 3, 1, 2))
        computed = frame_features(self.backbone, images, num_frames, names) if names else {}
        arrays: dict[str, Tensor] = {"pixels": frames} if self.plan.pixels else {}
        for name, dtype in self.dtypes.items():
            stored = _stored(name, computed[name], dtype, self.weights.constants)
            of_clips = name.startswith("maps/")
            arrays |= {part: x if of_clips else x.unflatten(0, (-1, num_frames)) for part, x in stored.items()}
        return arrays


def plain(head: nn.Module) -> nn.Module:
    """A copy of the head that computes with torch's own operations."""
    config: Any = head.config
    names = {field.name for field in fields(config)}
    if "formulation" not in names or config.formulation == PLAIN:
        return copy.deepcopy(head)
    return _with_config(head, replace(config, formulation=PLAIN))


def _with_config(head: nn.Module, config: Any) -> nn.Module:
    other = type(head)(config)
    other.load_state_dict(head.state_dict())
    return other


def _dtypes(plan: ReadPlan, specs: Iterable[ArraySpec]) -> dict[str, str]:
    """Of the arrays that the backbone makes, without their scales."""
    of_spec = {spec.name: spec.dtype for spec in specs}
    return {name: of_spec[name] for name in plan.features if name != "pixels"}


def _stored(name: str, x: Tensor, dtype: str, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As precision.encoded; bfloat16 stays what it is, as programs know no reinterpreted bytes."""
    if dtype == BFLOAT16:
        return {name: x.to(torch.bfloat16)}
    return encoded(name, x, dtype, constants)
