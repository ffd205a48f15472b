"""What reading an official checkpoint of Text4Vis and of ActionCLIP has in common: what to extract for it, with the towers in the
file, and what the run keeps of them."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcache.extract.tower_weights import weights_sha256
from vcache.heads.official_fusion import FusionCheckpoint
from vcache.pipelines.clip_towers import tower_name

CROP_NOTE = (
    "the official evaluation crops 224 pixels out of a short side of 256, vcache resizes the short side to what it crops: the "
    "accuracy may differ a little from the published one"
)


def extract_line(
    file: Path,
    checkpoint: FusionCheckpoint,
    *,
    dataset: str = "DATASET",
    frames: int | None = None,
    eval_views: str = "",
) -> str:
    """The `vcache extract` command that makes what the head reads; words in capitals where neither weights nor name tell."""
    model = tower_name(checkpoint.width, checkpoint.grid) or "MODEL"
    line = [
        "vcache",
        "extract",
        dataset,
        "--split",
        "val",
        "--model",
        model,
        "--pretrained",
        str(file),
        "--layers",
        "none",
    ]
    line += ["--tsn", "--frames", str(frames or "FRAMES")]
    return shlex.join([*line, "--eval-views", eval_views] if eval_views else line)


def tower_facts(checkpoint: FusionCheckpoint, trained_along: Mapping[str, str]) -> dict[str, Any]:
    """What a run records of the towers: the digests of their weights, and which of them, as "visual": "image tower", have to be
    those of a store."""
    towers = {"visual": checkpoint.visual, "text": checkpoint.text}
    digests = {f"{name}_sha256": weights_sha256(towers[name]) for name in trained_along}
    return {**digests, "trained_along": dict(trained_along)}
