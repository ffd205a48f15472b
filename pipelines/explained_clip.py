"""One clip as it goes through backbone and head once more: what the parts of `vcache explain` look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vcache.extract.backbone import BackboneFacts
from vcache.extract.layers import absolute_layer
from vcache.extract.views import PreparedClip
from vcache.heads.requirements import ClipFeatures, HeadRequirements
from vcache.pipelines.derivation import STEM_ARRAY
from vcache.pipelines.explanation import ExplainError, LayerAttention, LayerMagnitude, Question
from vcache.pipelines.pictures import Tiling


@dataclass(frozen=True, kw_only=True)
class ExplainedClip:
    """A head, the clip it looks at, and what was asked about it."""

    run: Path
    head: Any
    question: Question
    clip: PreparedClip
    computed: Mapping[str, Tensor]
    """Features by the names of arrays, frame by frame, as `ClipExtractor.features` gives them."""
    features: ClipFeatures
    """The same as the head reads them, a batch of 1."""
    facts: BackboneFacts
    tiling: Tiling

    def absolute(self, layer: int) -> int:
        """The number of a layer that the head asked for."""
        return absolute_layer(layer, self.facts.num_layers)


_OfLayer = TypeVar("_OfLayer", LayerAttention, LayerMagnitude)


def array_names(kind: str, layers: Sequence[int], num_layers: int) -> list[str]:
    """The arrays of a kind of these layers, which may be counted from the last."""
    return [f"{kind}/{absolute_layer(layer, num_layers)}" for layer in layers]


def read_arrays(requirements: HeadRequirements, num_layers: int) -> list[str]:
    """What a head reads of the backbone."""
    by_kind = {"tokens": requirements.tokens, "maps": requirements.maps, "cls": requirements.cls}
    names = [name for kind, layers in by_kind.items() for name in array_names(kind, layers, num_layers)]
    names += [STEM_ARRAY] if requirements.stem else []
    return [*names, *(["embed"] if requirements.embed else [])]


def clip_features(
    requirements: HeadRequirements, computed: Mapping[str, Tensor], num_layers: int, clip: PreparedClip
) -> ClipFeatures:
    """What a head asks for of one clip, out of what `ClipExtractor.features` gave: the features of a batch of 1.

    The pixels are those of the `clip`, which was prepared with as many for each frame as the head asks for.
    """

    def of(kind: str, layers: Sequence[int]) -> dict[int, Tensor]:
        names = array_names(kind, layers, num_layers)
        return {layer: computed[name] for layer, name in zip(layers, names, strict=True)}

    tokens = {layer: x.unsqueeze(0) for layer, x in of("tokens", requirements.tokens).items()}
    device = next(iter(computed.values())).device
    pixels = torch.from_numpy(clip.record["pixels"]).unsqueeze(0).to(device) if requirements.pixels else None
    return ClipFeatures(
        tokens=tokens,
        cls={layer: x.unsqueeze(0) for layer, x in of("cls", requirements.cls).items()},
        maps=of("maps", requirements.maps),  # made for whole clips
        stem=computed[STEM_ARRAY].unsqueeze(0) if requirements.stem else None,
        embed=computed["embed"].unsqueeze(0) if requirements.embed else None,
        pixels=pixels,
    )


def chosen_layers(found: Sequence[_OfLayer], asked: int | str | None, num_layers: int) -> tuple[_OfLayer, ...]:
    """What was found at the asked layer, at all, or at the one that is read last.

    Raises:
        ExplainError: the head does not read the layer.
    """
    if asked is None:
        return (found[-1],)
    if asked == "all":
        return tuple(found)
    chosen = tuple(one for one in found if one.layer == absolute_layer(int(asked), num_layers))
    if not chosen:
        read = ", ".join(str(layer) for layer in dict.fromkeys(one.layer for one in found))
        raise ExplainError(f"--layer {asked}: the head reads the layers {read}. Choose one of them, or all.")
    return chosen
