"""What a head costs: parameters, and multiply-adds (MACs) of one clip or of all evaluation views; nothing is run.

Papers write "GFLOPs" for 10^9 MACs. How many a head makes is counted by formula in counting_HEAD.py, as its paper has it and as
vcache computes the same.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from vcache.extract.layers import absolute_layer, resolve_layers
from vcache.heads.registry import get_head
from vcache.heads.tail_head import TailHead
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.head_presets import HeadPreset, find_preset, presets_of
from vcache.pipelines.matching import STORE_FACTS
from vcache.pipelines.settings import SettingError, build, split_settings
from vcache.pipelines.stored_views import parse_grid

COUNTED_HEADS = ("actionclip", "aim", "dist", "evl", "st-adapter", "text4vis")
"""Heads whose paper's formulation is known: each has a counting_HEAD.py with `head_macs`, `computed_macs`, `table` and so on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """The cost of one configuration on one backbone. MACs of a clip, but for `total_gmacs`."""

    parameters: int
    head_macs: int
    """In the paper's formulation, with the maps between frames where the head reads them."""
    computed_macs: int
    """Matrix products of what vcache computes for the same result, the maps included."""
    backbone_macs: int
    num_views: int

    @property
    def total_gmacs(self) -> float:
        """Backbone and head of all views."""
        return self.num_views * (self.backbone_macs + self.head_macs) / 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Frames:
    """Of a clip, for a head whose Config does not say it."""

    num_frames: int

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames ({self.num_frames}) must be at least 1")


def counter(head: str) -> ModuleType:
    """The module that counts this head; those of other heads are not imported."""
    return importlib.import_module(f"{__package__}.counting_{head.replace('-', '_')}")


def count(head: str, config: Any, tower: ClipTower, num_views: int, num_frames: int = 8) -> Count:
    """The cost of a head in this configuration, on clips that this tower encodes.

    `num_frames` is for heads that take any number, and whose Config has none.
    """
    own = hasattr(config, "num_frames")
    frames = {} if own else {"num_frames": num_frames}
    return Count(
        parameters=count_parameters(head, config),
        head_macs=counter(head).head_macs(config, **frames),
        computed_macs=counter(head).computed_macs(config, **frames),
        backbone_macs=(config.num_frames if own else num_frames) * tower.macs_per_frame,
        num_views=num_views,
    )


@lru_cache
def count_parameters(head: str, config: Any) -> int:
    """Of a head on a tail those that are trained: what is frozen in it is the backbone's."""
    with torch.device("meta"):
        module = get_head(head)(config)
    on_tail = isinstance(module, TailHead)
    return sum(one.numel() for one in module.parameters() if one.requires_grad or not on_tail)


def describe_count(head: str, settings: Mapping[str, Any], preset_name: str | None) -> list[dict[str, Any]]:
    """One row for a preset or a configuration of its own, else one for every row of the paper that has a number.

    `settings` may name any field of the head's Config, sizes as well, and `model`, a tower of the papers.

    Raises:
        SettingError: the head cannot be counted, or a setting that it does not have or take.
        LayerError: the tower has no such layer.
    """
    if head not in COUNTED_HEADS:
        raise SettingError(f"--count knows {', '.join(COUNTED_HEADS)}, and not {head!r}. Leave out --count.")
    if preset_name is None and not settings:
        is_counted = getattr(counter(head), "is_counted", _has_number)
        return [_row(preset) for preset in presets_of(head).values() if is_counted(preset)]
    preset = find_preset(head, preset_name) if preset_name else None
    settings = dict(settings)
    model = settings.pop("model", preset.model if preset else "ViT-B-16-quickgelu")
    if model not in CLIP_TOWERS:
        raise SettingError(f"--set model={model}: there are {', '.join(CLIP_TOWERS)}.")
    frames = _taken_frames(head, settings, preset)
    (own,) = split_settings(settings, get_head(head).Config)
    config = preset_config(head, CLIP_TOWERS[model], preset, own)
    num_views = _num_views(preset) if preset else 1
    return [_described(head, preset_name or "as set", config, CLIP_TOWERS[model], num_views, frames)]


def _taken_frames(head: str, settings: dict[str, Any], preset: HeadPreset | None) -> int:
    """Frames of a clip; where the Config of the head has no such field, the setting is taken out."""
    frames = preset.frames if preset else 8
    if "num_frames" in {field.name for field in dataclasses.fields(get_head(head).Config)}:
        return frames
    return build(_Frames, {"num_frames": settings.pop("num_frames", frames)}).num_frames


def preset_config(head: str, tower: ClipTower, preset: HeadPreset | None, own: Mapping[str, Any]) -> Any:
    """The head's Config on a tower: sizes of the tower, the preset over the defaults, and what is set over both."""
    of_preset = {"num_classes": preset.num_classes, **preset.head_settings} if preset else {"num_classes": 400}
    values = tower.facts_for(get_head(head).Config) | of_preset | dict(own)
    if isinstance(layers := values.get("layers"), str) and (":" in layers or layers == "all"):
        values["layers"] = resolve_layers(layers, tower.num_layers)
    config = build(get_head(head).Config, values)
    asked = get_head(head).requires(config)
    for layer in (*(getattr(config, "layers", None) or ()), *asked.tokens, *asked.cls, *asked.maps):
        absolute_layer(layer, tower.num_layers)
    return config


def giga(macs: int) -> str:
    return f"{macs / 1e9:,.2f}"


def _has_number(preset: HeadPreset) -> bool:
    return bool(preset.gmacs or preset.millions)


def _num_views(preset: HeadPreset) -> int:
    temporal, spatial = parse_grid(preset.eval_views)
    return temporal * spatial


def _row(preset: HeadPreset) -> dict[str, Any]:
    """A row of the paper, with its numbers."""
    tower = CLIP_TOWERS[preset.model]
    config = preset_config(preset.head, tower, preset, {})
    row = _described(preset.head, preset.name, config, tower, _num_views(preset), preset.frames)
    row |= {"paper_millions": preset.millions, "paper_gmacs": preset.gmacs}
    return row | counter(preset.head).beside_the_paper(preset, config, row)


def _described(head: str, name: str, config: Any, tower: ClipTower, num_views: int, num_frames: int) -> dict[str, Any]:
    counted = count(head, config, tower, num_views, num_frames)
    shown = {*counter(head).SHOWN, *STORE_FACTS} - {"pixel_mean", "pixel_std"}
    return {
        "name": name,
        "head": head,
        "config": {
            key: value
            for key, value in {"num_frames": num_frames, **dataclasses.asdict(config)}.items()
            if key in {*shown, "num_frames"}
        },
        **dataclasses.asdict(counted),
        "total_gmacs": counted.total_gmacs,
    }
