"""The contract between a head and whoever feeds it: what it reads, what it gets, and how its paper trains it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, UInt8
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
    stem: bool = False
    """What enters the first block, with all tokens: the layer below layer 0."""
    embed: bool = False
    """The projected CLS embedding, not normalised."""
    tail: int = 0
    """Top blocks of the backbone that the head runs by itself, 0 for none: it is given them by `set_tail` (tail.py)."""
    tail_stem: bool = False
    """The head runs the patch embedding below the first block by itself, too, on pixels."""
    pixels: int = 0
    """Frames whose pixels are read, for each frame of the clip, itself the first of them; 0 for none."""
    text: str | None = None
    """The set of templates whose text embeddings classify, as "label": the head is given them by `set_text` (text.py)."""
    training_text: str | None = None
    """The set of templates of which one is drawn at each training step: the head is given them by `set_training_text`."""
    fitted_on: int = 0
    """Clips of each class of those that are trained on, or all where there are fewer, whose features the head is to be fitted on
    before the first step (`fit`); 0: it is not fitted."""
    prompts: int = 0
    """Learnt vectors before the name of each class, 0 for none: the head is given the prompts by `set_prompts`
    (prompt_learning.py), and the text tower of the backbone is run with it."""
    own_prompts: bool = False
    """Each class has learnt vectors of its own, so no other class can take its place."""
    streamed: bool = False
    """Takes the tokens layer by layer, and again for the gradients: each layer is made when it is asked for, and not kept."""
    num_frames: int | None = None
    """Frames per clip; None: any number."""

    def __post_init__(self) -> None:
        for name in ("tokens", "cls", "maps"):
            layers = getattr(self, name)
            if len(set(layers)) != len(layers):
                raise ValueError(f"{name} ({layers}) must name each layer once")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames ({self.num_frames}) must be at least 1")
        for name in ("pixels", "fitted_on", "prompts", "tail"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")

    @property
    def by_name(self) -> bool:
        """Whether the head tells any classes apart whose names it is given, also those that it was not trained on."""
        return self.text is not None or (self.prompts > 0 and not self.own_prompts)


class OnDemand(Mapping[int, Tensor]):
    """Features by layer that are made each time they are asked for, and not kept: of many layers one at a time is in memory."""

    def __init__(self, layers: Iterable[int], make: Callable[[int], Tensor]) -> None:
        """`make` gives the same values for a layer whenever it is called."""
        self._layers, self._make = tuple(layers), make

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._layers:
            raise KeyError(layer)
        return self._make(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def each_layer(features: Mapping[int, Tensor], change: Callable[[Tensor], Tensor]) -> Mapping[int, Tensor]:
    """The features of every layer, changed: now, or where they are made on demand, each time that they are."""
    if isinstance(features, OnDemand):
        return OnDemand(features, lambda layer: change(features[layer]))
    return {layer: change(x) for layer, x in features.items()}


@dataclass(frozen=True)
class ClipFeatures:
    """Cached features of B clips: what a head's forward gets. Heads read them and never write to them.

    The keys are the layers AS THE HEAD ASKED: a head that requires layer -1 finds layer -1.
    """

    tokens: Mapping[int, Float[Tensor, "B T N D"]] = field(default_factory=dict)
    """`OnDemand` for a head that says it is `streamed`."""
    cls: dict[int, Float[Tensor, "B T D"]] = field(default_factory=dict)
    maps: dict[int, Float[Tensor, "B pairs 2 P P"]] = field(default_factory=dict)
    """Pair p is frames p and p+1. maps[l][b, p, 0] (PREV) has queries of frame p+1 and keys of frame p;
    maps[l][b, p, 1] (NEXT) queries of p and keys of p+1. Rows are query patches and sum to 1; CLS is dropped."""
    stem: Float[Tensor, "B T N D"] | None = None
    embed: Float[Tensor, "B T E"] | None = None
    pixels: UInt8[Tensor, "B F height width 3"] | None = None
    """What the backbone saw, before it was normalised; of F = T * HeadRequirements.pixels frames."""

    def __len__(self) -> int:
        return int(self.num_clips)

    @property
    def num_clips(self) -> int | torch.SymInt:
        """The number B; a symbol where a head is exported for any number of clips, which `len` would make a constant."""
        for tensor in self._tensors():
            return tensor.shape[0]
        raise ValueError("these ClipFeatures hold no feature, so they have no number of clips")

    def to(self, device: torch.device | str) -> "ClipFeatures":
        """The same features on a device; those that are there already are shared, not copied."""
        return ClipFeatures(
            tokens=each_layer(self.tokens, lambda x: x.to(device, non_blocking=True)),
            cls={layer: x.to(device, non_blocking=True) for layer, x in self.cls.items()},
            maps={layer: x.to(device, non_blocking=True) for layer, x in self.maps.items()},
            stem=None if self.stem is None else self.stem.to(device, non_blocking=True),
            embed=None if self.embed is None else self.embed.to(device, non_blocking=True),
            pixels=None if self.pixels is None else self.pixels.to(device, non_blocking=True),
        )

    def _tensors(self) -> Iterator[Tensor]:
        """What is there first, and what has to be made last."""
        yield from (x for x in (self.pixels, self.embed, self.stem) if x is not None)
        for features in (self.cls, self.maps, self.tokens):
            yield from features.values()


@dataclass(frozen=True, kw_only=True)
class InnerFeatures:
    """The patches of one frozen layer, and what a head makes of them on its way: for looking at, not for training."""

    layer: int
    """As the head asked."""
    spatial: Float[Tensor, "B T P D"]
    """What the frozen layer gives, without CLS."""
    integrated: Float[Tensor, "B T P d"] | None
    """What the head makes of it before it pools; None where it makes nothing."""
    temporal: Float[Tensor, "B F P c"] | None
    """What an encoder of the pixels sees beside this layer, of F = T * HeadRequirements.pixels frames; None without one."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a head is trained by default: AdamW on its trainable parameters, as its paper or its official code says.

    What is 0, None, false or empty is off. `mixup` and `cutmix` approximate what the papers do to pixels.
    """

    lr: float
    """Learning rate where the schedule begins to fall."""
    weight_decay: float
    """AdamW's: a step takes this times its rate off a parameter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Text4Vis and ActionCLIP: 0.9, 0.98; the others the default."""
    steps: int | None = None
    """Length in optimiser steps, or None where `epochs` says it."""
    epochs: int | None = None
    """Length in passes over the videos, or None where `steps` says it."""
    batch_size: int
    """Clips per optimiser step, over all GPUs."""
    schedule: Literal["cosine", "whole_cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine from `lr` to `min_lr`, or `lr` throughout. "whole_cosine" (DiST, as coded) is the part
    that the warm-up leaves of half a cosine over the whole length; the warm-up rises to where it begins, below `lr`."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes; with several classes a video, towards 1/2. DiST, AIM on SSv2: 0.1."""
    warmup_steps: int = 0
    """Steps of linear warm-up; part of the length, not added to it."""
    warmup_epochs: float = 0.0
    """The same in epochs. DiST: 6 of 36. Text4Vis: 5 of 30. ActionCLIP: 5 of 50. AIM: 2.5 of 30."""
    warmup_start: float | None = None
    """Rate of the first step as a fraction of `lr`. DiST: 0.0025, 8e-8 of 3.2e-5. Text4Vis, ActionCLIP: 0. AIM: 0.1.
    None: what is one step above 0, so that no step is lost."""
    min_lr: float = 0.0
    """Where the cosine ends."""
    schedule_every: int = 1
    """Steps for which a rate is kept. Text4Vis and ActionCLIP: 10, set in the first, 10th, 20th, ... step of each epoch."""
    no_decay: tuple[str, ...] = ()
    """Parameters without weight decay: patterns of their names, * for anything. DiST: *cls_token, *positional_embedding. AIM:
    names with class_embedding, positional_embedding, ln_1, ln_2, ln_pre, ln_post. EVL, Text4Vis, ActionCLIP: none."""
    no_decay_1d: bool = False
    """No weight decay of biases, nor of other parameters with fewer than two axes: gains of norms, scales. DiST: on."""
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    """pattern:factor pairs: factors of the rate of parameters by their names; the first pattern that fits counts. Text4Vis:
    0.1 for CLIP and its logit_scale. ActionCLIP: 10 for what comes after CLIP. AIM with ViT-L: 0.1 for the backbone."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters together; a longer one is scaled to it. None of the papers."""
    ema_decay: float | None = None
    """Validate and keep an exponential moving average of the weights with this decay. None of the papers."""
    mixup: float = 0.0
    """MixUp of features: parameter of the Beta distribution that clips are mixed by, 0: not at all. DiST: 0.8, on pixels."""
    cutmix: float = 0.0
    """CutMix of patches, likewise. DiST: 1.0, on pixels."""
    mix_switch: float = 0.5
    """Probability of CutMix where both are on. DiST: 0.5."""

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_rates()
        self._check_fractions()

    def _check_lengths(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"one of steps ({self.steps}) and epochs ({self.epochs}) must be set, and only one")
        at_least = {
            "steps": 1,
            "epochs": 1,
            "batch_size": 1,
            "schedule_every": 1,
            "warmup_steps": 0,
            "warmup_epochs": 0,
        }
        for name, bound in {**at_least, "weight_decay": 0, "mixup": 0, "cutmix": 0}.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < math.inf:
                raise ValueError(f"{name} ({value}) must be at least {bound}")
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and warmup_epochs ({self.warmup_epochs:g}) both say how long the warm-up "
                "is; one of them must be 0"
            )
        if self.schedule not in (choices := ("cosine", "whole_cosine", "constant")):
            raise ValueError(f"schedule ({self.schedule!r}) must be one of {', '.join(map(repr, choices))}")

    def _check_rates(self) -> None:
        factors = {f"the factor of {pattern!r} in lr_multipliers": factor for pattern, factor in self.lr_multipliers}
        positive = {"lr": self.lr, "clip_grad": self.clip_grad, **factors}
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:  # a NaN, too, would train to NaN
                raise ValueError(f"{name} ({value}) must be above 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must be in [0, lr], and lr is {self.lr}")

    def _check_fractions(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas ({self.betas}) must be two numbers in [0, 1)")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing ({self.label_smoothing}) must be in [0, 1)")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay ({self.ema_decay}) must be between 0 and 1, as 0.999")
        for name in ("warmup_start", "mix_switch"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} ({value}) must be in [0, 1]")
