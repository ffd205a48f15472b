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
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.head_presets import HeadPreset, find_preset, presets_of
from vcache.pipelines.matching import STORE_FACTS
from vcache.pipelines.settings import SettingError, build, split_settings
from vcache.pipelines.stored_views import parse_grid

COUNTED_HEADS = ("dist", "evl")
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


def counter(head: str) -> ModuleType:
    """The module that counts this head; those of other heads are not imported."""
    return importlib.import_module(f"{__package__}.counting_{head}")


def count(head: str, config: Any, tower: ClipTower, num_views: int) -> Count:
    """The cost of a head in this configuration, on clips that this tower encodes."""
    return Count(
        parameters=count_parameters(head, config),
        head_macs=counter(head).head_macs(config),
        computed_macs=counter(head).computed_macs(config),
        backbone_macs=config.num_frames * tower.macs_per_frame,
        num_views=num_views,
    )


@lru_cache
def count_parameters(head: str, config: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in get_head(head)(config).parameters())


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
        return [_row(preset) for preset in presets_of(head).values() if preset.gmacs or preset.millions]
    preset = find_preset(head, preset_name) if preset_name else None
    settings = dict(settings)
    model = settings.pop("model", preset.model if preset else "ViT-B-16-quickgelu")
    if model not in CLIP_TOWERS:
        raise SettingError(f"--set model={model}: there are {', '.join(CLIP_TOWERS)}.")
    (own,) = split_settings(settings, get_head(head).Config)
    config = preset_config(head, CLIP_TOWERS[model], preset, own)
    num_views = _num_views(preset) if preset else 1
    return [_described(head, preset_name or "as set", config, CLIP_TOWERS[model], num_views)]


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


def _num_views(preset: HeadPreset) -> int:
    temporal, spatial = parse_grid(preset.eval_views)
    return temporal * spatial


def _row(preset: HeadPreset) -> dict[str, Any]:
    """A row of the paper, with its numbers."""
    tower = CLIP_TOWERS[preset.model]
    config = preset_config(preset.head, tower, preset, {})
    row = _described(preset.head, preset.name, config, tower, _num_views(preset))
    row |= {"paper_millions": preset.millions, "paper_gmacs": preset.gmacs}
    return row | counter(preset.head).beside_the_paper(preset, config, row)


def _described(head: str, name: str, config: Any, tower: ClipTower, num_views: int) -> dict[str, Any]:
    counted = count(head, config, tower, num_views)
    shown = {*counter(head).SHOWN, *STORE_FACTS} - {"pixel_mean", "pixel_std"}
    return {
        "name": name,
        "head": head,
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key in shown},
        **dataclasses.asdict(counted),
        "total_gmacs": counted.total_gmacs,
    }
