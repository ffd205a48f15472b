"""What EVL costs: multiply-adds of its paper's formulation and of vcache's, and the paper's numbers beside them.

The paper's formulation projects every token to a key and a value and sums T-CA over pairs of patches; vcache computes the same
with less (attention.py, cross_frame.py).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vcache.heads.evl import EVL
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting import count_parameters, giga
from vcache.pipelines.head_presets import HeadPreset

REMARKS = (
    "The paper's parameters and GMACs of ViT-B/16 on Kinetics-400 are without T-CA, the others with it.",
    "ssv2-b16: this count is 1.3 to 1.9% above the paper's, with T-CA, and 4.5% below it without; it is not known why.",
    "k400-l14-336-32f: the paper's 18,196 cannot be reached, as the backbone alone takes 18,332.",
)
SHOWN = ("layers", "qkv_dim", "mlp_factor", "pooling", "temporal_cross_attention")
"""Fields of the Config that are told beside a count."""


def head_macs(config: EVL.Config) -> int:
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


def computed_macs(config: EVL.Config) -> int:
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


def beside_the_paper(preset: HeadPreset, config: EVL.Config, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the table has besides its count: the paper's numbers, and the count with T-CA and without.

    `deviation` is of the variant that the preset is.
    """
    more: dict[str, Any] = {"deviation": row["total_gmacs"] / preset.gmacs - 1 if preset.gmacs else None}
    for name, tca in (("with_tca", True), ("without_tca", False)):
        other = dataclasses.replace(config, temporal_cross_attention=tca)
        clip = config.num_frames * CLIP_TOWERS[preset.model].macs_per_frame + head_macs(other)
        more[name] = {"parameters": count_parameters("evl", other), "total_gmacs": row["num_views"] * clip / 1e9}
    return more


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Two lines a preset, its own variant first: the paper's numbers stand beside the one that they are of."""
    yield _columns("preset", "T-CA", "parameters", "paper", "GMACs", "paper", "off", "head", "computed")
    for row in rows:
        own, other = ("on", "off") if row["config"]["temporal_cross_attention"] else ("off", "on")
        millions, gmacs, off = row["paper_millions"], row["paper_gmacs"], row["deviation"]
        yield _columns(
            row["name"],
            own,
            f"{row['parameters']:,}",
            f"{millions:.2f} M" if millions else "",
            f"{row['total_gmacs']:,.1f}",
            f"{gmacs:,}" if gmacs else "",
            f"{off:+.1%}" if off is not None else "",
            giga(row["head_macs"]),
            giga(row["computed_macs"]),
        )
        variant = row["with_tca" if other == "on" else "without_tca"]
        yield _columns("", other, f"{variant['parameters']:,}", "", f"{variant['total_gmacs']:,.1f}")
    yield "  GMACs: 10^9 multiply-adds of backbone and head over all views; the paper calls them GFLOPs."
    yield "  head, computed: of the head alone for one clip, by the paper's formulas, and as vcache computes the same."


def _columns(name: str, tca: str, *numbers: str) -> str:
    widths = (12, 9, 10, 8, 7, 10, 10)
    cells = (f"{number:>{width}}" for number, width in zip(numbers, widths, strict=False))
    return f"{name:<19}{tca:<4}{''.join(cells)}".rstrip()
