"""What AIM costs: parameters that are trained, multiply-adds beside the paper's, and what training above a cut saves.

To the backbone it adds the attention over time of every adapted block, which computes with frozen weights, and the adapters.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vcache.heads.aim import AIM
from vcache.heads.tail_memory import reads_cls_alone
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting_tail import (
    block_macs,
    classifier_macs,
    projection_macs,
    run_macs,
    score_macs,
    tokens_per_clip,
    weight_macs,
)
from vcache.pipelines.head_presets import HeadPreset

REMARKS: tuple[str, ...] = ()  # they stand between the two tables
_REMARKS = (
    "GMACs of the paper grow in proportion to the frames; attention over time grows faster (32 frames: +0.2%).",
    "ssv2-l14: counted with 2 T-adapters, as the paper's 50 M are; the official config has 1, and 38,029,486.",
    "k700, diving48: GMACs of the official README.",
)
SHOWN = ("blocks", "spatial", "temporal", "joint", "bottleneck", "positions", "temporal_adapters", "classifier")
"""Fields of the Config that are told beside a count."""

_CUTS = tuple(f"k400-b16-8f{cut}" for cut in ("-top1", "-top2", "-top3", "-top6", ""))
"""Presets whose training step is counted: all blocks, the last of them, is what the others are compared with."""

COMPUTED = "with the blocks that are run here"
"""What `computed_macs` is of."""


def head_macs(config: AIM.Config) -> int:
    """What a clip takes besides the frozen backbone, by eq. 3-5."""
    D, adapters = config.width, config.spatial + config.joint + config.temporal * config.temporal_adapters
    block = adapters * 2 * D * int(config.bottleneck * D) * tokens_per_clip(config)
    if config.temporal:
        block += projection_macs(config) + score_macs(config, config.num_frames)
    return len(config.adapted_layers) * block + classifier_macs(config)


def computed_macs(config: AIM.Config) -> int:
    """A forward pass above the cut: the blocks that are run, with what AIM adds to them."""
    return run_macs(config) + head_macs(config) - _spared_macs(config)


def _spared_macs(config: AIM.Config) -> int:
    """Of adapters behind the attention of the last block, which the patches do not pass."""
    if config.layers_run[-1] not in config.adapted_layers or not reads_cls_alone(config):
        return 0
    patches = tokens_per_clip(config) - config.num_frames
    return (config.spatial + config.joint) * 2 * config.width * int(config.bottleneck * config.width) * patches


def step_macs(config: AIM.Config) -> int:
    """A training step of a clip above the cut, nothing run twice (`checkpointing`).

    The gradients of a product are two products as large, and one where its weights are frozen. They go through all of the lowest
    block, as the temporal embedding is below it.
    """
    over_time = len(config.adapted_layers) if config.temporal else 0
    frozen = (config.num_blocks - 1) * weight_macs(config) + over_time * projection_macs(config)
    return 3 * computed_macs(config) - frozen - weight_macs(config, cls_alone=reads_cls_alone(config))


def is_counted(preset: HeadPreset) -> bool:
    return bool(preset.gmacs or preset.millions or preset.name in _CUTS)


def beside_the_paper(preset: HeadPreset, config: AIM.Config, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the table has besides its count: parameters with the tower; of rows of the cut, the training step of a clip.

    `step_gmacs` are above the cut; `uncut_step_gmacs` with the frozen blocks below it, which no cache spares.
    """
    more: dict[str, Any] = {
        "with_tower": row["parameters"] + CLIP_TOWERS[preset.model].num_trunk_parameters,
        "deviation": row["total_gmacs"] / preset.gmacs - 1 if preset.gmacs else None,
    }
    if preset.name in _CUTS:
        step, below = step_macs(config), row["backbone_macs"] - config.num_blocks * block_macs(config)
        more |= {"blocks": config.num_blocks, "step_gmacs": step / 1e9, "uncut_step_gmacs": (step + below) / 1e9}
    return more


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield _columns("preset", "trained", "paper", "in all", "GMACs", "paper", "off")
    for row in rows:
        millions, gmacs, off = row["paper_millions"], row["paper_gmacs"], row["deviation"]
        yield _columns(
            row["name"],
            f"{row['parameters']:,}",
            f"{millions:g} M" if millions else "",
            f"{row['with_tower'] / 1e6:.2f} M",
            f"{row['total_gmacs']:,.1f}",
            f"{gmacs:,}" if gmacs else "",
            f"{off:+.1%}" if off is not None else "",
        )
    yield "  GMACs: 10^9 multiply-adds of backbone and head over all views; the paper calls them GFLOPs."
    yield from (f"  {remark}" for remark in _REMARKS)
    yield "What training above a cut saves: GMACs of a step, forward and backward, for one clip of k400-b16-8f (ours)"
    yield from _cut_table([row for row in rows if "step_gmacs" in row])


def _cut_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The fewest blocks first. The share is of the step that trains all of them and caches nothing."""
    ordered = sorted(rows, key=lambda row: row["blocks"])
    yield _cut_columns("blocks", "trained", "above the cut", "without a cache", "of all 12")
    for row in ordered:
        yield _cut_columns(
            str(row["blocks"]),
            f"{row['parameters']:,}",
            f"{row['step_gmacs']:,.1f}",
            f"{row['uncut_step_gmacs']:,.1f}",
            f"{row['step_gmacs'] / ordered[-1]['uncut_step_gmacs']:.0%}",
        )


def _columns(name: str, *numbers: str) -> str:
    widths = (11, 8, 10, 9, 7, 6)
    return f"{name:<29}{''.join(f'{number:>{width}}' for number, width in zip(numbers, widths, strict=True))}".rstrip()


def _cut_columns(*cells: str) -> str:
    widths = (8, 12, 15, 17, 11)
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
