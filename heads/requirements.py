"""The contract between a head and whoever feeds it: what it reads, what it gets, and how its paper trains it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadRequirements:
    """Which features of a clip a head reads. Layer i is the output of block i; -1 is the last block of the backbone."""

    tokens: tuple[int, ...] = ()
    """Layers read with all their tokens, CLS first."""
    cls: tuple[int, ...] = ()
    """Layers of which the CLS token is enough: 1/N of the bytes."""
    maps: tuple[int, ...] = ()
    """Layers whose head-mean attention between adjacent frames is read (vcache.heads.cross_frame.cross_frame_maps)."""
    embed: bool = False
    """The projected CLS embedding, not normalised."""
    num_frames: int | None = None
    """Frames per clip; None: any number."""

    def __post_init__(self) -> None:
        for name in ("tokens", "cls", "maps"):
            layers = getattr(self, name)
            if len(set(layers)) != len(layers):
                raise ValueError(f"{name} ({layers}) must name each layer once")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames ({self.num_frames}) must be at least 1")


@dataclass(frozen=True)
class ClipFeatures:
    """Cached features of B clips: what a head's forward gets. Heads read them and never write to them.

    The keys are the layers AS THE HEAD ASKED: a head that requires layer -1 finds layer -1.
    """

    tokens: dict[int, Float[Tensor, "B T N D"]] = field(default_factory=dict)
    cls: dict[int, Float[Tensor, "B T D"]] = field(default_factory=dict)
    maps: dict[int, Float[Tensor, "B pairs 2 P P"]] = field(default_factory=dict)
    """Pair p is frames p and p+1. maps[l][b, p, 0] (PREV) has queries of frame p+1 and keys of frame p;
    maps[l][b, p, 1] (NEXT) queries of p and keys of p+1. Rows are query patches and sum to 1; CLS is dropped."""
    embed: Float[Tensor, "B T E"] | None = None

    def __len__(self) -> int:
        """Number of clips."""
        for tensor in self._tensors():
            return len(tensor)
        raise ValueError("these ClipFeatures hold no feature, so they have no number of clips")

    def to(self, device: torch.device | str) -> "ClipFeatures":
        """The same features on a device; those that are there already are shared, not copied."""
        return ClipFeatures(
            tokens={layer: x.to(device, non_blocking=True) for layer, x in self.tokens.items()},
            cls={layer: x.to(device, non_blocking=True) for layer, x in self.cls.items()},
            maps={layer: x.to(device, non_blocking=True) for layer, x in self.maps.items()},
            embed=None if self.embed is None else self.embed.to(device, non_blocking=True),
        )

    def _tensors(self) -> Iterator[Tensor]:
        for features in (self.tokens, self.cls, self.maps):
            yield from features.values()
        if self.embed is not None:
            yield self.embed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a head is trained by default: AdamW on all its parameters, as its paper or its official code says."""

    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int | None = None
    """Length in optimiser steps, or None where `epochs` says it."""
    epochs: int | None = None
    batch_size: int
    """Clips per optimiser step."""
    warmup_steps: int = 0
    """Steps of linear warm-up; part of the length, not added to it."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine from `lr` to 0, set at every step, or `lr` throughout."""
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"one of steps ({self.steps}) and epochs ({self.epochs}) must be set, and only one")
        for name, bound in (("steps", 1), ("epochs", 1), ("batch_size", 1), ("warmup_steps", 0), ("weight_decay", 0)):
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} ({value}) must be at least {bound}")
        if not 0 < self.lr < math.inf:  # a NaN, too, would train to NaN
            raise ValueError(f"lr ({self.lr}) must be above 0")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule ({self.schedule!r}) must be 'cosine' or 'constant'")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing ({self.label_smoothing}) must be in [0, 1)")
