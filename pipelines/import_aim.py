"""Reads an official AIM checkpoint for `vcache import-head aim`: its adapters become the head, the tower in it the run's tail."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcache.heads.aim import AIM
from vcache.heads.official import CheckpointMismatch
from vcache.heads.official_aim import aim_checkpoint, check_aim_config, infer_aim_config, load_aim_checkpoint
from vcache.pipelines.checkpoint_file import CheckpointError, read_checkpoint_file
from vcache.pipelines.class_file import read_class_names
from vcache.pipelines.clip_towers import CLIP_TOWERS, tower_name
from vcache.pipelines.importing import ImportedHead
from vcache.pipelines.settings import build

SOURCE = "taoyang1122/adapt-image-models at b3580d2"

# Of configs/recognition/vit, by the number of classes: the dataset, what it is tested on, and the README's views of that.
_DATASETS = {
    400: ("k400", "val", "3x1"),
    700: ("k700", "val", "3x3"),
    174: ("ssv2", "val", "1x3"),
    48: ("diving48", "test", "1x1"),
}
_SEGMENTS = ("ssv2", "diving48")
"""Sampled from segments of the whole video; the others at a stride."""
_STRIDES = {8: 16, 16: 8, 32: 4}
"""By the frames, where they are at a stride."""
# img_norm_cfg, of values from 0 to 255: CLIP's, rounded.
_MEAN, _STD = (122.769, 116.74, 104.04), (68.493, 66.63, 70.321)


def read(file: Path, settings: Mapping[str, Any], classes: Path | None) -> ImportedHead:
    """
    Raises:
        CheckpointError, SettingError, ClassFileError: as `import_head`.
    """
    head = read_aim(file, settings)
    config = head.config
    rows, columns = config.grid
    return ImportedHead(
        head=head,
        class_names=read_class_names(classes, config.num_classes) if classes else None,
        num_classes=config.num_classes,
        source=SOURCE,
        reads=(
            f"the pixels of {config.num_frames} frames, {rows}x{columns} patches of {config.patch_size}; "
            f"{config.num_layers} blocks of width {config.width} with {config.num_heads} heads, which the run keeps"
        ),
        extract=extract_line(config),
        notes=_notes(config, settings),
        facts={"own_tower": True},
    )


def read_aim(file: Path, settings: Mapping[str, Any]) -> AIM:
    """The head in an official AIM checkpoint, with the tower in it."""
    content = read_checkpoint_file(file)
    try:
        checkpoint = aim_checkpoint(content)
        told = infer_aim_config(checkpoint)
        told |= {name: tuple(x / 255 for x in of) for name, of in (("pixel_mean", _MEAN), ("pixel_std", _STD))}
        if (tower := CLIP_TOWERS.get(tower_name(told["width"], told["grid"]) or "")) is not None:
            told["embed_dim"] = tower.embed_dim  # of the proj, which the file lacks
        config = build(AIM.Config, {**told, **settings})
        check_aim_config(config, checkpoint)
        head = AIM(config)
        load_aim_checkpoint(head, checkpoint)
    except CheckpointMismatch as error:
        raise CheckpointError(f"{file} is not an AIM checkpoint that fits: {str(error).rstrip('.')}.") from error
    return head


def extract_line(config: AIM.Config) -> str:
    """The `vcache extract` command that makes what the head reads; words in capitals where the weights do not tell."""
    frames = str(config.num_frames)
    dataset, split, views = _DATASETS.get(config.num_classes, ("DATASET", "val", ""))
    line = ["vcache", "extract", dataset, "--split", split, "--model", tower_name(config.width, config.grid) or "MODEL"]
    line += ["--layers", "none", "--frames", frames]
    line += ["--tsn"] if dataset in _SEGMENTS else ["--stride", str(_STRIDES.get(config.num_frames, "STRIDE"))]
    return shlex.join([*line, "--pixels", frames, *(["--eval-views", views] if views else [])])


def _notes(config: AIM.Config, settings: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if "adapter_scale" not in settings:
        notes.append(
            "no weight tells the scale of the joint adapters: 0.5, as of all published files (--set adapter_scale=1, as in the "
            "Something-Something configurations)"
        )
    if "num_heads" not in settings:
        notes.append("heads are taken to have 64 channels, as CLIP's; no checkpoint says it (--set num_heads=N)")
    if config.num_classes in _DATASETS:
        notes.append(
            f"{config.num_classes} classes are taken for those of {_DATASETS[config.num_classes][0]} in what is to be extracted"
        )
    return (
        *notes,
        "frames were resized bilinearly and the products computed in mixed precision; vcache resizes as CLIP does: the accuracy "
        "may differ a little from the published one",
    )
