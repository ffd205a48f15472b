"""Reads an official EVL checkpoint for `vcache import-head evl`."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcache.heads.evl import EVL
from vcache.heads.official import CheckpointMismatch, InferredConfig
from vcache.heads.official_evl import check_evl_config, evl_state_dict, infer_evl_config, load_evl_state_dict
from vcache.pipelines.checkpoint_file import CheckpointError, read_checkpoint_file
from vcache.pipelines.class_file import read_class_names
from vcache.pipelines.clip_towers import tower_name
from vcache.pipelines.console import count
from vcache.pipelines.importing import ImportedHead
from vcache.pipelines.settings import build

SOURCE = "OpenGVLab/efficient-video-recognition at b282e8b"

_RELEASED = re.compile(r"k400_vit[bl]\d+_(\d+)f_dec(\d+)x(\d+)")
# Of the released files, by their frames: the stride, and the views that the evaluation scripts average (scripts/eval_*.sh).
_STRIDES = {8: 16, 16: 16, 32: 8}
_VIEWS = {8: "3x1", 16: "1x3", 32: "1x3"}


def read(file: Path, settings: Mapping[str, Any], classes: Path | None) -> ImportedHead:
    """
    Raises:
        CheckpointError, SettingError, ClassFileError: as `import_head`.
    """
    head, notes = read_evl(file, settings)
    config = head.config
    rows, columns = config.grid
    return ImportedHead(
        head=head,
        class_names=read_class_names(classes, config.num_classes) if classes else None,
        num_classes=config.num_classes,
        source=SOURCE,
        reads=(
            f"{count(len(config.layers), 'layer')} ({', '.join(map(str, config.layers))}) of {config.num_frames} frames, "
            f"{rows}x{columns} patches of width {config.width}; {config.num_heads} heads"
        ),
        extract=extract_line(config, file.name),
        notes=notes,
    )


def read_evl(file: Path, settings: Mapping[str, Any]) -> tuple[EVL, tuple[str, ...]]:
    """The head in an official EVL checkpoint, and what is to be said of how it was read."""
    checkpoint = read_checkpoint_file(file)
    try:
        state = evl_state_dict(checkpoint)
        inferred = infer_evl_config(state)
        _check_told(file, inferred, settings)
        config = build(EVL.Config, {**inferred.fields, **settings})
        check_evl_config(config, state)
        head = EVL(config)
        load_evl_state_dict(head, state, advice="The official code writes no such file.")
    except CheckpointMismatch as error:
        raise CheckpointError(f"{file} is not an EVL checkpoint that fits: {str(error).rstrip('.')}.") from error
    return head, _notes(file.name, config, settings)


def extract_line(config: EVL.Config, file_name: str) -> str:
    """The `vcache extract` command that makes what the head reads; words in capitals where neither weights nor name tell."""
    model, frames, released = (
        tower_name(config.width, config.grid) or "MODEL",
        config.num_frames,
        _is_released(config, file_name),
    )
    last = config.layers == tuple(range(-len(config.layers), 0))
    line = ["vcache", "extract", "k400" if released else "DATASET", "--split", "val", "--model", model]
    line += ["--layers", f"{-len(config.layers)}:" if last else ",".join(map(str, config.layers))]
    line += ["--frames", str(frames), "--stride", str(_STRIDES[frames]) if released else "STRIDE"]
    line += ["--eval-views", _VIEWS[frames]] if released else []
    line += [] if config.temporal_cross_attention else ["--cross-frame", "none"]
    return shlex.join(line)


def _check_told(file: Path, inferred: InferredConfig, settings: Mapping[str, Any]) -> None:
    for name, why in inferred.unknown.items():
        if name not in settings:
            example = {"grid": "14,14", "num_frames": "8", "num_heads": "12"}[name]
            raise CheckpointError(f"{file} does not tell {name}: {why}. Say it as in  --set {name}={example}")


def _notes(file_name: str, config: EVL.Config, settings: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if "num_heads" not in settings:
        notes.append("heads are taken to have 64 channels, as CLIP's; no checkpoint says it (--set num_heads=N)")
    if (named := _RELEASED.match(file_name)) and not _is_released(config, file_name):
        frames, layers, width = named.groups()
        notes.append(
            f"the name of the file says {frames} frames, {layers} layers and width {width}, its weights say "
            f"{config.num_frames}, {len(config.layers)} and {config.width}"
        )
    # dataset.py normalises, then resizes bilinearly without antialiasing; --fp16 is the default of main.py.
    notes.append(
        "trained on OpenAI's CLIP in float16 and frames resized bilinearly; vcache resizes as CLIP does, and a GPU extracts in "
        "float16 by default: the accuracy may differ a little from the published one"
    )
    return tuple(notes)


def _is_released(config: EVL.Config, file_name: str) -> bool:
    """Whether the name is one of the released files', and the weights are what it says."""
    named = _RELEASED.match(file_name)
    told = (config.num_frames, len(config.layers), config.width)
    return named is not None and tuple(map(int, named.groups())) == told and config.num_frames in _STRIDES
