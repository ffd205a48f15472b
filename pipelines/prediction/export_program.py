"""One torch module from uint8 frames to logits: what is compiled for ONNX and by torch.export.

    frames (B, F, S, S, 3) uint8, resized and cropped    ->  normalised, through the backbone, rounded as the store rounds
    ClipFeatures, by the code that makes them of a store ->  head  ->  logits (B, K)

Normalising, taps, rounding, maps and features are those of the extractor and of the loader. A head with a formulation that is
made for speed runs the one of its paper, which computes the same with torch's own operations.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vcache.extract.views import PreparedClip
from vcache.pipelines.batches import frame_features
from vcache.pipelines.loading.batch import BatchFeatures
from vcache.pipelines.precision import encoded
from vcache.pipelines.prediction.video_model import VideoModel
from vcache.store.layout import BFLOAT16

PLAIN = "plain"
"""The formulation of a head in torch's own operations."""


@dataclass(frozen=True, kw_only=True)
class ProgramInput:
    """Which frames of a clip the program takes: every `every`-th of those that the sampling of the store gives."""

    num_frames: int
    """That the program takes."""
    every: int
    pixels_per_frame: int
    """Of the clip that is sampled: with pixels, frames between those of the sampling are taken too; else 1."""
    backbone_every: int
    """Every so many of the frames that are taken go through the backbone, from the first on; the head gets the pixels of all."""
    image_size: int

    @classmethod
    def of(cls, model: VideoModel) -> "ProgramInput":
        """What a model's program takes."""
        plan, sampled = model.plan, model.extractor.sampling.num_frames
        (view,) = model.views()
        return cls(
            num_frames=sampled // plan.frame_step * max(1, plan.pixels),
            every=plan.pixel_step if plan.pixels else plan.frame_step,
            pixels_per_frame=max(1, view.pixels_per_frame),
            backbone_every=max(1, plan.pixels),
            image_size=model.extractor.preprocessing.image_size,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one clip: frames, rows, columns, red-green-blue."""
        return (self.num_frames, self.image_size, self.image_size, 3)

    def frames(self, clips: Sequence[PreparedClip]) -> UInt8[Tensor, "B F S S 3"]:
        """What the program takes of clips that were prepared for `VideoModel.scores`."""
        of_clips = [
            torch.from_numpy(clip.record["pixels"]) if "pixels" in clip.record else clip.images.permute(0, 2, 3, 1)
            for clip in clips
        ]
        return torch.stack([frames[:: self.every] for frames in of_clips]).contiguous()

    def random_clips(self, model: VideoModel, number: int, seed: int = 0) -> list[PreparedClip]:
        """Clips of noise, as `VideoModel.scores` takes them."""
        drawn = torch.Generator().manual_seed(seed)
        num_frames = model.extractor.sampling.num_frames * self.pixels_per_frame
        shape = (num_frames, self.image_size, self.image_size, 3)
        clips = []
        for _ in range(number):
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn)
            images = pixels[:: self.pixels_per_frame].permute(0, 3, 1, 2).contiguous()
            clips.append(PreparedClip(images, {"pixels": pixels.numpy()} if model.plan.pixels else {}))
        return clips


class VideoProgram(nn.Module):
    """A head behind normalisation and backbone, in evaluation mode and without gradients; it shares the weights of the model."""

    def __init__(self, model: VideoModel) -> None:
        super().__init__()
        self.head = plain(model.head).requires_grad_(False).eval()
        self.backbone, self.preprocessing = model.extractor.backbone, model.extractor.preprocessing
        self.plan, self.weights, self.outputs = model.plan, model.weights, model.outputs
        self.taken = ProgramInput.of(model)
        of_array = {spec.name: spec.dtype for spec in model.arrays}
        self.dtypes = {name: of_array[name] for name in model.plan.features if name != "pixels"}
        # The frames between those that are read are not given.
        self._steps = {name: model.plan.step_of(name) for name in model.plan.arrays}

    @torch.no_grad()
    def forward(self, frames: UInt8[Tensor, "B F S S 3"]) -> Float[Tensor, "B K"]:
        features = BatchFeatures(self._arrays(frames), self._steps, self.weights, (self.plan,)).of(self.plan)
        logits: Tensor = self.head(features).float()
        return logits if self.outputs is None else logits[:, list(self.outputs)]

    def _arrays(self, frames: Tensor) -> dict[str, Tensor]:
        """What a store would hold of these frames."""
        num_frames = self.taken.num_frames // self.taken.backbone_every
        of_clips = frames[:, :: self.taken.backbone_every]
        images = self.preprocessing.normalise(of_clips.flatten(0, 1).permute(0, 3, 1, 2))
        computed = frame_features(self.backbone, images, num_frames, self.dtypes) if self.dtypes else {}
        arrays: dict[str, Tensor] = {"pixels": frames} if self.plan.pixels else {}
        for name, dtype in self.dtypes.items():
            for part, x in _stored(name, computed[name], dtype, self.weights.constants).items():
                arrays[part] = x if name.startswith("maps/") else x.unflatten(0, (-1, num_frames))
        return arrays


def plain(head: Any) -> nn.Module:
    """A head that computes the same with torch's own operations; a copy."""
    names = {field.name for field in fields(head.config)}
    if "formulation" not in names or head.config.formulation == PLAIN:
        return copy.deepcopy(head)
    other: nn.Module = type(head)(replace(head.config, formulation=PLAIN))
    other.load_state_dict(head.state_dict())
    return other


def _stored(name: str, x: Tensor, dtype: str, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As precision.encoded, but for bfloat16, which stays one: programs cannot look at its bits as at another number's."""
    if dtype == BFLOAT16:
        return {name: x.to(torch.bfloat16)}
    return encoded(name, x, dtype, constants)
