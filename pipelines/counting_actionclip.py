"""What ActionCLIP costs: parameters of the visual prompt and with both towers, multiply-adds, and the paper's beside them."""

from collections.abc import Iterator, Mapping
from typing import Any

from vcache.heads.actionclip import ActionCLIP
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.counting_fusion import averaged_first_macs, fusion_macs
from vcache.pipelines.head_presets import HeadPreset
from vcache.pipelines.templates import TEMPLATE_SETS

REMARKS = (
    "+ towers: with CLIP's image tower and the 12 blocks of its text tower, which are the paper's 37.8 M. Its sums are smaller,",
    "and ViT-B/32 has 2.4 M more than ViT-B/16 in it, where the towers differ by 1.66 M: it is not known why.",
)
SHOWN = ("prompt", "templates")
"""Fields of the Config that are told beside a count."""


def head_macs(config: ActionCLIP.Config) -> int:
    """MACs of one clip: the visual prompt, and a cosine with each class in each template."""
    E = config.embed_dim
    return fusion_macs(config.prompt, E, config.num_frames) + E * config.num_classes * _num_templates(config.templates)


def computed_macs(config: ActionCLIP.Config) -> int:
    """As vcache computes it."""
    return head_macs(config) - averaged_first_macs(config.prompt, config.embed_dim, config.num_frames)


def _num_templates(name: str) -> int:
    """1 of a set in a file, which is not looked for."""
    return len(TEMPLATE_SETS[name].templates) if name in TEMPLATE_SETS else 1


def beside_the_paper(preset: HeadPreset, config: ActionCLIP.Config, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the table has besides its count: parameters with both towers."""
    tower = CLIP_TOWERS[preset.model]
    return {
        "with_towers": row["parameters"] + tower.num_parameters + _text_blocks(tower),
        "deviation": row["total_gmacs"] / preset.gmacs - 1 if preset.gmacs else None,
    }


def _text_blocks(tower: ClipTower) -> int:
    """Parameters of the 12 blocks of the text tower, as wide as the embedding."""
    E = tower.embed_dim
    return 12 * (12 * E**2 + 13 * E)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield _columns("preset", "parameters", "+ towers", "paper", "GMACs", "paper", "off", "head")
    for row in rows:
        millions, gmacs, off = row["paper_millions"], row["paper_gmacs"], row["deviation"]
        yield _columns(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['with_towers'] / 1e6:.2f} M",
            f"{millions} M" if millions else "",
            f"{row['total_gmacs']:,.1f}",
            f"{gmacs:,}" if gmacs else "",
            f"{off:+.1%}" if off is not None else "",
            f"{row['head_macs'] / 1e9:.2f}",
        )
    yield "  GMACs: 10^9 multiply-adds of backbone and head for one view; the paper calls them GFLOPs."


def _columns(name: str, *numbers: str) -> str:
    widths = (12, 11, 9, 8, 8, 7, 7)
    return f"{name:<14}{''.join(f'{number:>{width}}' for number, width in zip(numbers, widths, strict=True))}".rstrip()
