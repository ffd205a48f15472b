"""What Text4Vis costs: parameters of the head and with the image tower, multiply-adds of one view, and the paper's beside them.

The paper's numbers (Table 7) are those of a profiler that sees convolutions and linear layers alone: nn.MultiheadAttention, a
third of a ViT, has neither parameters nor GFLOPs there. Both counts are told; the whole one is not to meet the paper's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vcache.heads.temporal_fusion import NUM_BLOCKS
from vcache.heads.text4vis import Text4Vis
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.counting_fusion import averaged_first_macs, fusion_macs
from vcache.pipelines.head_presets import HeadPreset

REMARKS = (
    "profiled: convolutions and linear layers alone, without attention: what the paper's profiler saw. 3,829 is no such number;",
    "3,729 is, and may be what was meant.",
)
SHOWN = ("temporal", "classifier", "frozen")
"""Fields of the Config that are told beside a count."""


def head_macs(config: Text4Vis.Config, num_frames: int = 8) -> int:
    """MACs of one clip: the temporal modelling, and a cosine with each class."""
    E = config.embed_dim
    return fusion_macs(config.temporal, E, num_frames) + E * (E * config.adapter + config.num_classes)


def computed_macs(config: Text4Vis.Config, num_frames: int = 8) -> int:
    """As vcache computes it."""
    return head_macs(config, num_frames) - averaged_first_macs(config.temporal, config.embed_dim, num_frames)


def is_counted(preset: HeadPreset) -> bool:
    """Whether a row of the paper is one of the table: towers and frames of Table 5, which cost the same on every dataset."""
    return preset.dataset == "k400" and preset.eval_views == "1x1" and not preset.settings and not preset.recipe


def beside_the_paper(preset: HeadPreset, config: Text4Vis.Config, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the table has besides its count: parameters with the image tower, and what the paper's profiler counts."""
    tower = CLIP_TOWERS[preset.model]
    millions, gmacs = _profiled(tower, config.num_classes, preset.frames)
    return {
        "with_tower": row["parameters"] + tower.num_parameters,
        "profiled_millions": millions,
        "profiled_gmacs": gmacs,
        "deviation": gmacs / preset.gmacs - 1 if preset.gmacs else None,
    }


def _profiled(tower: ClipTower, num_classes: int, num_frames: int) -> tuple[float, float]:
    """10^6 parameters and 10^9 MACs of a view of what is no attention and no norm: patches, MLPs, and the classifier."""
    D, E, P = tower.width, tower.embed_dim, tower.grid[0] * tower.grid[1]
    patches = 3 * tower.patch_size**2 * D
    parameters = patches + tower.num_layers * (8 * D**2 + 5 * D) + NUM_BLOCKS * (8 * E**2 + 5 * E) + num_classes * E
    frame = P * patches + tower.num_layers * (P + 1) * 8 * D**2 + NUM_BLOCKS * 8 * E**2
    return parameters / 1e6, (num_frames * frame + num_classes * E) / 1e9


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield _columns("preset", "parameters", "+ tower", "GMACs", "head", "profiled", "", "paper", "")
    for row in rows:
        millions, gmacs = row["paper_millions"], row["paper_gmacs"]
        yield _columns(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['with_tower'] / 1e6:.2f} M",
            f"{row['total_gmacs']:,.1f}",
            f"{row['head_macs'] / 1e9:.2f}",
            f"{row['profiled_millions']:.1f} M",
            f"{row['profiled_gmacs']:,.0f}",
            f"{millions} M" if millions else "",
            f"{gmacs:,}" if gmacs else "",
        )
    yield "  + tower: with CLIP's image tower. GMACs: 10^9 multiply-adds of backbone and head for one view."


def _columns(name: str, *numbers: str) -> str:
    widths = (11, 10, 8, 5, 9, 6, 8, 6)
    return f"{name:<16}{''.join(f'{number:>{width}}' for number, width in zip(numbers, widths, strict=True))}".rstrip()
