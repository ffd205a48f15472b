"""ST-Adapter's official models (Pan et al. 2022) as presets, as their scripts train them (b914b38), and smaller cuts of ours.

    12x384   an adapter of 384 channels in each block, before the MLP: Kinetics-400
    24x384   two, before the attention as well: Something-Something v2

Accuracies are those of the official README, which says that its models may differ a little from the paper's.
"""

from typing import Any

from vcache.pipelines.head_presets import OURS, HeadPreset

_SOURCE = "Official models"
_JITTER = (
    "The script crops a square of 224 pixels from a short side of 224 to 258; --augment st-adapter takes one of four sizes at "
    "fixed places for it."
)


def _kinetics(source: str, variant: str = "", *, blocks: int = 12, **fields: Any) -> HeadPreset:
    return HeadPreset(
        name=f"k400-b16-8f{variant}",
        head="st-adapter",
        source=source,
        settings={"blocks": blocks},
        dataset="k400",
        num_classes=400,
        frames=8,
        stride=16,
        eval_views="3x1",
        augment="st-adapter",
        note=_JITTER,
        **fields,
    )


def _something(source: str, variant: str = "", *, blocks: int = 12, **fields: Any) -> HeadPreset:
    return HeadPreset(
        name=f"ssv2-b16-8f{variant}",
        head="st-adapter",
        source=source,
        settings={"blocks": blocks, "before_attention": True},
        recipe={"lr": 1e-3, "batch_size": 256, "epochs": 50},
        dataset="ssv2",
        num_classes=174,
        frames=8,
        eval_views="1x3",
        augment="st-adapter",
        **fields,
    )


PRESETS = (
    _kinetics(_SOURCE, top1=82.2),
    _something(_SOURCE, top1=66.9),
    *(_kinetics(OURS, f"-top{blocks}", blocks=blocks) for blocks in (2, 6)),
    _something(OURS, "-top6", blocks=6),
)
