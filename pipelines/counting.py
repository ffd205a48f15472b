"""What a head costs: parameters, and multiply-adds (MACs) of one clip or of all evaluation views; nothing is run.

Papers write "GFLOPs" for 10^9 MACs, and so does EVL's. Its formulation projects every token to a key and a value and sums T-CA
over pairs of patches; vcache computes the same with less (attention.py, cross_frame.py), and both are counted.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vcache.extract.layers import absolute_layer, resolve_layers
from vcache.heads.evl import EVL
from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.head_presets import HeadPreset, find_preset, presets_of
from vcache.pipelines.matching import STORE_FACTS
from vcache.pipelines.settings import SettingError, build, split_settings
from vcache.pipelines.stored_views import parse_grid

COUNTED_HEADS = ("evl",)
"""Heads whose paper's formulation is known here."""

REMARKS = (
    "The paper's parameters and GMACs of ViT-B/16 on Kinetics-400 are without T-CA, the others with it.",
    "ssv2-b16: this count is 1.3 to 1.9% above the paper's, with T-CA, and 4.5% below it without; it is not known why.",
    "k400-l14-336-32f: the paper's 18,196 cannot be reached, as the backbone alone takes 18,332.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """The cost of one configuration on one backbone. MACs of a clip, but for `total_gmacs`."""

    parameters: int
    head_macs: int
    """In the paper's formulation, with the maps between frames where T-CA is on."""
    absorbed_macs: int
    """Matrix products of what vcache computes for the same result, the maps included."""
    backbone_macs: int
    num_views: int

    @property
    def total_gmacs(self) -> float:
        """Backbone and head of all views: what the paper's tables give."""
        return self.num_views * (self.backbone_macs + self.head_macs) / 1e9


def count(config: EVL.Config, tower: ClipTower, num_views: int) -> Count:
    """The cost of EVL in this configuration, on clips that this tower encodes."""
    return Count(
        parameters=count_parameters(config),
        head_macs=plain_macs(config),
        absorbed_macs=absorbed_macs(config),
        backbone_macs=config.num_frames * tower.macs_per_frame,
        num_views=num_views,
    )


@lru_cache
def count_parameters(config: EVL.Config) -> int:
    with torch.device("meta"):
        head = EVL(config)
    return sum(parameter.numel() for parameter in head.parameters())


def plain_macs(config: EVL.Config) -> int:
    """MACs of one clip by eq. 1-8 as they are written: keys and values of all tokens, T-CA over all pairs of patches.

    Equal to torch's count of `formulation="plain"` with the maps on top, and there at once for 24 layers.
    """
    T, D, Q = config.num_frames, config.width, config.attention_dim
    P = config.grid[0] * config.grid[1]
    N = 1 if config.pooling == "cls" else 1 + P
    keys = {"none": T * N, "cls": T, "spatial_mean": T, "temporal_mean": N}[config.pooling]
    layer = 2 * keys * D * Q + 2 * keys * Q  # projections; scores and the weighted sum of one query
    layer += 2 * D * Q + 2 * D * config.mlp_dim  # the query's own projection and output; its MLP
    if config.temporal_conv:
        layer += 3 * T * N * D
    if config.temporal_cross_attention:
        layer += _maps_macs(config) + 2 * (T - 1) * P * P * D  # the vector of each pair of patches, weighted
    return len(config.layers) * layer + D * config.num_classes


def absorbed_macs(config: EVL.Config) -> int:
    """MACs of the matrix products that the head in heads/evl.py makes of one clip, and of the maps that it is given."""
    layer = _absorbed_layer_macs(dataclasses.replace(config, layers=(-1,), formulation="absorbed"))
    layer += _maps_macs(config) if config.temporal_cross_attention else 0
    return len(config.layers) * layer + config.width * config.num_classes


@lru_cache
def _absorbed_layer_macs(config: EVL.Config) -> int:
    """Of the one decoder layer of this configuration; all layers are alike, and depth 24 would take seconds to trace."""
    # Fake tensors of the CPU: shapes alone, on the path that real ones take.
    with FakeTensorMode(), torch.no_grad():
        head, features = EVL(config).eval().requires_grad_(False), _empty_features(config)
        with FlopCounterMode(display=False) as counter:
            head(features)
    return counter.get_total_flops() // 2 - config.width * config.num_classes


def _maps_macs(config: EVL.Config) -> int:
    """Scores of every patch with every patch of the frame before and of the frame after, over all heads."""
    return 2 * (config.num_frames - 1) * (config.grid[0] * config.grid[1]) ** 2 * config.width


def _empty_features(config: EVL.Config) -> ClipFeatures:
    asked, T, P, D = EVL.requires(config), config.num_frames, config.grid[0] * config.grid[1], config.width
    return ClipFeatures(
        tokens={layer: torch.empty(1, T, 1 + P, D) for layer in asked.tokens},
        cls={layer: torch.empty(1, T, D) for layer in asked.cls},
        maps={layer: torch.empty(1, T - 1, 2, P, P) for layer in asked.maps},
    )


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
    return [_described(preset_name or "as set", config, CLIP_TOWERS[model], num_views)]


def preset_config(head: str, tower: ClipTower, preset: HeadPreset | None, own: Mapping[str, Any]) -> Any:
    """The head's Config on a tower: sizes of the tower, the preset over the defaults, and what is set over both."""
    of_preset = {"num_classes": preset.num_classes, **preset.head_settings} if preset else {"num_classes": 400}
    values = tower.facts_for(get_head(head).Config) | of_preset | dict(own)
    if isinstance(layers := values.get("layers"), str) and (":" in layers or layers == "all"):
        values["layers"] = resolve_layers(layers, tower.num_layers)
    config = build(get_head(head).Config, values)
    for layer in config.layers:
        absolute_layer(layer, tower.num_layers)
    return config


def _num_views(preset: HeadPreset) -> int:
    temporal, spatial = parse_grid(preset.eval_views)
    return temporal * spatial


def _row(preset: HeadPreset) -> dict[str, Any]:
    """A row of the paper, with T-CA and without; `deviation` is of the variant that the preset is."""
    tower, num_views = CLIP_TOWERS[preset.model], _num_views(preset)
    config = preset_config(preset.head, tower, preset, {})
    row = _described(preset.name, config, tower, num_views) | {
        "paper_millions": preset.millions,
        "paper_gmacs": preset.gmacs,
    }
    row["deviation"] = row["total_gmacs"] / preset.gmacs - 1 if preset.gmacs else None
    for name, tca in (("with_tca", True), ("without_tca", False)):
        other = dataclasses.replace(config, temporal_cross_attention=tca)
        clip = config.num_frames * tower.macs_per_frame + plain_macs(other)
        row[name] = {"parameters": count_parameters(other), "total_gmacs": num_views * clip / 1e9}
    return row


def _described(name: str, config: Any, tower: ClipTower, num_views: int) -> dict[str, Any]:
    counted = count(config, tower, num_views)
    return {
        "name": name,
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key in _SHOWN},
        **dataclasses.asdict(counted),
        "total_gmacs": counted.total_gmacs,
    }


_SHOWN: Iterable[str] = ("layers", "qkv_dim", "mlp_factor", "pooling", "temporal_cross_attention", *STORE_FACTS)
