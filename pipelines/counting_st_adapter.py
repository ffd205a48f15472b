"""What ST-Adapter costs: parameters that are trained, and multiply-adds of the adapters."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vcache.heads.st_adapter import STAdapter
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting import giga
from vcache.pipelines.counting_tail import classifier_macs, run_macs
from vcache.pipelines.head_presets import HeadPreset

REMARKS = ("The official repository says neither parameters nor GMACs of its models.",)
SHOWN = ("blocks", "before_mlp", "before_attention", "adapter_width", "kernel", "classifier")
"""Fields of the Config that are told beside a count."""
COMPUTED = "with the blocks that are run here"
"""What `computed_macs` is of."""


def head_macs(config: STAdapter.Config) -> int:
    """What a clip takes besides the frozen backbone: adapters of the patches, and the classifier."""
    num_patches = config.num_frames * config.grid[0] * config.grid[1]
    adapter = num_patches * config.hidden * (2 * config.width + math.prod(config.kernel))
    return config.num_blocks * (config.before_mlp + config.before_attention) * adapter + classifier_macs(config)


def computed_macs(config: STAdapter.Config) -> int:
    """A forward pass above the cut: the blocks that are run, with the adapters in them."""
    return run_macs(config) + head_macs(config)


def is_counted(preset: HeadPreset) -> bool:
    return preset.head == "st-adapter"


def beside_the_paper(preset: HeadPreset, config: STAdapter.Config, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the table has besides its count: parameters with the tower, the frozen ln_post as well."""
    return {"with_tower": row["parameters"] + CLIP_TOWERS[preset.model].num_trunk_parameters + 2 * config.width}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield _columns("preset", "trained", "in all", "GMACs", "head", "above the cut")
    for row in rows:
        yield _columns(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['with_tower'] / 1e6:.2f} M",
            f"{row['total_gmacs']:,.1f}",
            giga(row["head_macs"]),
            giga(row["computed_macs"]),
        )
    yield "  GMACs: 10^9 multiply-adds of backbone and head over all views. Head, and forward above the cut: for one clip."


def _columns(name: str, *numbers: str) -> str:
    widths = (12, 11, 9, 9, 15)
    return f"{name:<18}{''.join(f'{number:>{width}}' for number, width in zip(numbers, widths, strict=True))}"
