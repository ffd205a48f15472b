"""Reads an official DiST checkpoint for `vcache import-head dist`."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcache.extract.layers import resolve_layers
from vcache.extract.tower_weights import weights_sha256
from vcache.heads.dist import DiST
from vcache.heads.dist_config import DiSTConfig
from vcache.heads.official import CheckpointMismatch
from vcache.heads.official_dist import (
    DistCheckpoint,
    check_dist_config,
    dist_checkpoint,
    infer_dist_config,
    load_dist_state_dict,
)
from vcache.pipelines.checkpoint_file import CheckpointError, read_checkpoint_file
from vcache.pipelines.class_file import read_class_names
from vcache.pipelines.clip_towers import tower_name
from vcache.pipelines.console import count
from vcache.pipelines.extract_commands import layers_word
from vcache.pipelines.importing import ImportedHead
from vcache.pipelines.settings import build, read_values

SOURCE = "alibaba-mmai-research/DiST at 4b3a09b"

# DIST_VIT_B16_K400_16+32f_84.4.pyth: tower, dataset, frames of both encoders, top-1.
_RELEASED = re.compile(r"dist_vit_(b16|l14)_(k400|ssv2)\w*?_(\d+)\+(\d+)f", re.IGNORECASE)
_SIZES = {"b16": (768, 16), "l14": (1024, 14)}
_POOLING_LAYERS = {"k400": 4, "ssv2": 2}


def read(file: Path, settings: Mapping[str, Any], classes: Path | None) -> ImportedHead:
    """
    Raises:
        CheckpointError, SettingError, LayerError, ClassFileError: as `import_head`.
    """
    class_names = read_class_names(classes) if classes else None
    head, checkpoint = read_dist(file, {**settings, **({"num_classes": len(class_names)} if class_names else {})})
    config = head.config
    rows, columns = config.grid
    return ImportedHead(
        head=head,
        class_names=class_names,
        num_classes=config.num_classes if class_names or "num_classes" in settings else None,
        source=SOURCE,
        reads=(
            f"{count(len(config.read_layers), 'layer')} ({_layers(config)}) of {config.num_frames} frames and the pixels of "
            f"{config.gamma * config.num_frames}, {rows}x{columns} patches of width {config.width}; "
            f"{config.adaptive_pooling_layers} pooling layers"
        ),
        extract=extract_line(config, file.name),
        notes=_notes(file.name, config, checkpoint),
        facts={
            "visual_sha256": weights_sha256(checkpoint.visual) if checkpoint.visual else None,
            "logit_scale": checkpoint.logit_scale,
        },
    )


def read_dist(file: Path, settings: Mapping[str, Any]) -> tuple[DiST, DistCheckpoint]:
    """The head in an official DiST checkpoint, with no text, and what it was read from."""
    content = read_checkpoint_file(file)
    try:
        checkpoint = dist_checkpoint(content)
        inferred = infer_dist_config(checkpoint)
        for name, why in inferred.unknown.items():
            if name not in settings:
                raise CheckpointError(f"{file} does not tell {name}: {why}. Say it as in  --set {name}=8:")
        # The classifier takes the text of any number of classes; none has been given yet.
        config = build(DiSTConfig, _with_layers({"num_classes": 1, **inferred.fields, **settings}))
        check_dist_config(config, checkpoint)
        head = DiST(config)
        load_dist_state_dict(head, checkpoint)
    except CheckpointMismatch as error:
        raise CheckpointError(f"{file} is not a DiST checkpoint that fits: {str(error).rstrip('.')}.") from error
    return head, checkpoint


def extract_line(config: DiSTConfig, file_name: str) -> str:
    """The `vcache extract` command that makes what the head reads; words in capitals where neither weights nor name tell."""
    named = _RELEASED.match(file_name)
    dataset = named[2].lower() if named and _is_what_it_says(named, config) else "DATASET"
    model = tower_name(config.width, config.grid) or "MODEL"
    line = ["vcache", "extract", dataset, "--split", "val", "--model", model, "--layers", _layers(config)]
    line += ["--tsn", "--frames", str(config.num_frames), "--pixels", str(config.gamma * config.num_frames)]
    return shlex.join([*line, "--eval-views", "3x1", "--cross-frame", "none"])


def _with_layers(values: dict[str, Any]) -> dict[str, Any]:
    """A selection of layers ("8:", "0,3", "all") as the layers that it means; LayerError if there are no such."""
    layers = values.get("layers")
    if not isinstance(layers, str) or layers.lower() in ("", "none"):
        return values
    num_layers = read_values(DiSTConfig, {"num_layers": values["num_layers"]})["num_layers"]
    return {**values, "layers": resolve_layers(layers, num_layers)}


def _layers(config: DiSTConfig) -> str:
    return layers_word(sorted(layer % config.num_layers for layer in config.read_layers), config.num_layers)


def _notes(file_name: str, config: DiSTConfig, checkpoint: DistCheckpoint) -> tuple[str, ...]:
    notes = []
    if (named := _RELEASED.match(file_name)) and not _is_what_it_says(named, config):
        tower, dataset, frames, dense = named.groups()
        notes.append(
            f"the name of the file says ViT-{tower}, {dataset} and {frames}+{dense} frames, its weights are of width "
            f"{config.width}, {config.adaptive_pooling_layers} pooling layers and {config.num_frames}+"
            f"{config.gamma * config.num_frames} frames"
        )
    if not checkpoint.visual:
        rows, columns = config.grid
        notes.append(
            f"there is no CLIP beside the head: it is taken to read all of {config.num_layers} blocks and {rows}x{columns} "
            "patches (--set num_layers=N, grid=ROWS,COLUMNS), and the backbone cannot be compared with a store's"
        )
    # The test transform resizes bilinearly; MIXED_PRECISION of its configurations runs the frozen tower in float16.
    notes.append(
        "trained on OpenAI's CLIP in mixed precision and frames resized bilinearly; vcache resizes as CLIP does: the accuracy "
        "may differ a little from the published one"
    )
    return tuple(notes)


def _is_what_it_says(named: re.Match[str], config: DiSTConfig) -> bool:
    """Whether the weights are what the name of a released file says."""
    tower, dataset, frames, dense = named.groups()
    told = (*_SIZES[tower.lower()], _POOLING_LAYERS[dataset.lower()], int(frames), int(dense))
    pooling, T = config.adaptive_pooling_layers, config.num_frames
    return told == (config.width, config.patch_size, pooling, T, config.gamma * T)
