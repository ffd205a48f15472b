"""MixUp and CutMix of cached features: approximations of what papers do to pixels.

The backbone is frozen and not linear, so features of a mixed image are not the mixed features of two. What holds exactly: a
head's linear view of its features is mixed as they are. EVL's Y = X + T-Conv(X) + T-PE + T-CA(maps), for one, is what pasting
or averaging the Y of both clips gives, as a query's row of the cross-frame maps goes with its patch.

As timm's Mixup in "batch" mode (Zhang et al. 2018, Yun et al. 2019): one draw for a batch, clip i with clip B-1-i. With
several processes each mixes its own clips among themselves.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe, each_layer
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.losses import ClipTargets, as_shares


@dataclass(frozen=True)
class Box:
    """Patches of the grid, half-open: rows top..bottom, columns left..right."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed: `share` is what a clip keeps of itself; `box` is taken from the other, or None for MixUp."""

    share: float
    box: Box | None = None


class Mixing:
    """Draws how the batches of one head are mixed. What it draws depends on its generator and on how often it was asked."""

    def __init__(self, head: nn.Module, recipe: Recipe, generator: torch.Generator) -> None:
        self.recipe, self.generator = recipe, generator
        grid = getattr(getattr(head, "config", None), "grid", None)
        self.grid: tuple[int, int] | None = None if grid is None else (grid[0], grid[1])

    def draw(self, features: ClipFeatures) -> Mix:
        """How to mix this batch; one number of the generator, whatever comes of it."""
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=self.generator)))
        recipe = self.recipe
        pasted = bool(recipe.cutmix) and (not recipe.mixup or rng.random() < recipe.mix_switch)
        alpha = recipe.cutmix if pasted else recipe.mixup
        share = float(rng.beta(alpha, alpha))
        if not pasted:
            return Mix(share)
        grid = self._grid_of(features)
        box = box_around(grid, share, int(rng.integers(grid[0])), int(rng.integers(grid[1])))
        return Mix(1 - box.area / math.prod(grid), box)

    @torch.no_grad()
    def features(self, features: ClipFeatures, mix: Mix) -> ClipFeatures:
        """New features; those given are shared among heads and stay as they are."""
        if mix.share == 1:
            return features
        maps = features.maps
        return ClipFeatures(
            tokens=each_layer(features.tokens, torch.no_grad()(lambda x: self._mixed_tokens(x, mix))),
            cls={layer: _averaged(x, mix.share) for layer, x in features.cls.items()},
            maps={layer: self._mixed_maps(x, mix) for layer, x in maps.items()},
            stem=None if features.stem is None else self._mixed_tokens(features.stem, mix),
            embed=None if features.embed is None else _averaged(features.embed, mix.share),
            pixels=None if features.pixels is None else self._mixed_pixels(features, mix),
        )

    def _mixed_tokens(self, x: Float[Tensor, "B T N D"], mix: Mix) -> Float[Tensor, "B T N D"]:
        """CutMix averages CLS by the share of patches: it is about the whole frame."""
        if mix.box is None:
            return _averaged(x, mix.share)
        mixed = x.clone()
        mixed[:, :, 0] = _averaged(x[:, :, 0], mix.share)
        self._paste(mixed[:, :, 1:], x[:, :, 1:], mix.box, axis=2)
        return mixed

    def _mixed_maps(self, maps: Float[Tensor, "B pairs 2 P P"], mix: Mix) -> Float[Tensor, "B pairs 2 P P"]:
        """CutMix takes the rows of pasted queries whole, so every row still sums to 1; keys are where they were in the clip that
        the query is from. Between patches of different clips there is no attention to take."""
        if mix.box is None:
            return _averaged(maps, mix.share)
        mixed = maps.clone()
        self._paste(mixed, maps, mix.box, axis=3)
        return mixed

    def _mixed_pixels(self, features: ClipFeatures, mix: Mix) -> UInt8[Tensor, "B F H W 3"]:
        """CutMix pastes the pixels of the patches, from side to side of the box; MixUp rounds, as the store did."""
        x = features.pixels
        assert x is not None
        if mix.box is None:
            return torch.stack(
                [_averaged(clips.float(), mix.share).round_().to(torch.uint8) for clips in x.unbind(1)], dim=1
            )
        mixed, grid = x.clone(), self._grid_of(features)
        height, width = x.shape[2] // grid[0], x.shape[3] // grid[1]
        box = (slice(mix.box.top * height, mix.box.bottom * height), slice(mix.box.left * width, mix.box.right * width))
        mixed[:, :, *box] = x[:, :, *box].flip(0)
        return mixed

    def _paste(self, mixed: Tensor, x: Tensor, box: Box, axis: int) -> None:
        """Into `mixed`, from the other clip of each, the patches of the box; the patches are on `axis`."""
        grid = self.grid or _square(x.shape[axis])
        inside = (slice(None),) * axis + (slice(box.top, box.bottom), slice(box.left, box.right))
        mixed.unflatten(axis, grid)[inside] = x.unflatten(axis, grid)[inside].flip(0)

    def _grid_of(self, features: ClipFeatures) -> tuple[int, int]:
        if self.grid:
            return self.grid
        stem = () if features.stem is None else (features.stem,)
        patches = [x.shape[2] - 1 for x in (*features.tokens.values(), *stem)]
        patches += [x.shape[3] for x in features.maps.values()]
        return _square(patches[0])


def check_mixing(head: nn.Module, recipe: Recipe) -> None:
    """
    Raises:
        SettingError: the head cannot be trained on what the recipe mixes.
    """
    if (recipe.mixup or recipe.cutmix) and hasattr(head, "training_loss"):
        raise SettingError(
            f"{type(head).__name__} has a loss of its own, which has no targets for mixed clips. Train with --set mixup=0 "
            "--set cutmix=0."
        )
    if recipe.cutmix and not _reads_patches(head):
        raise SettingError(
            f"cutmix ({recipe.cutmix:g}) pastes patches, and {type(head).__name__} with these settings reads none: CLS and "
            "embedding have no grid. Train with --set cutmix=0; mixup mixes them."
        )


def mixed_targets(targets: ClipTargets, mix: Mix, num_classes: int) -> Float[Tensor, "B K"]:
    """Shares of the classes of each clip; of several classes a clip, the convex combination of both rows."""
    return _averaged(as_shares(targets, num_classes), mix.share)


def box_around(grid: tuple[int, int], share: float, row: int, column: int) -> Box:
    """1 - `share` of the patches of a grid of rows x columns, around a patch, cut off at the border."""
    side = math.sqrt(1 - share)
    height, width = int(grid[0] * side), int(grid[1] * side)
    return Box(
        top=max(0, row - height // 2),
        bottom=min(grid[0], row + (height + 1) // 2),
        left=max(0, column - width // 2),
        right=min(grid[1], column + (width + 1) // 2),
    )


def _averaged(x: Float[Tensor, "B ..."], share: float) -> Float[Tensor, "B ..."]:
    """share * x + (1 - share) * the other clip's, in the dtype of x."""
    return torch.lerp(x.flip(0), x, share)


def _reads_patches(head: nn.Module) -> bool:
    asked: HeadRequirements = head.requires(head.config)  # type: ignore[operator]
    return bool(asked.tokens or asked.maps or asked.stem or asked.tail_stem)


def _square(num_patches: int) -> tuple[int, int]:
    """The grid of a head that has no `grid` in its Config."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise SettingError(
            f"cutmix pastes patches, and how {num_patches} of them lie in rows the head does not tell. Train with --set cutmix=0."
        )
    return side, side
