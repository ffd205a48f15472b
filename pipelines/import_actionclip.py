"""Reads an official ActionCLIP checkpoint for `vcache import-head actionclip`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcache.heads.actionclip import ActionCLIP
from vcache.heads.official import CheckpointMismatch
from vcache.heads.official_actionclip import actionclip_checkpoint, actionclip_config, load_actionclip_state_dict
from vcache.heads.official_fusion import FusionCheckpoint, check_told
from vcache.pipelines.checkpoint_file import CheckpointError, read_checkpoint_file
from vcache.pipelines.class_file import read_class_names
from vcache.pipelines.import_fusion import CROP_NOTE, extract_line, tower_facts
from vcache.pipelines.importing import ImportedHead
from vcache.pipelines.settings import build

SOURCE = "sallymmx/ActionCLIP at 31c34df"
_NO_WEIGHT_SAYS = ("prompt_heads", "scrambled")


def read(file: Path, settings: Mapping[str, Any], classes: Path | None) -> ImportedHead:
    """
    Raises:
        CheckpointError, SettingError, ClassFileError: as `import_head`.
    """
    class_names = read_class_names(classes) if classes else None
    head, checkpoint = read_actionclip(file, {**settings, **({"num_classes": len(class_names)} if class_names else {})})
    config = head.config
    frames = config.num_frames if config.prompt == "transf_cls" or "num_frames" in settings else None
    return ImportedHead(
        head=head,
        class_names=class_names,
        num_classes=config.num_classes if class_names or "num_classes" in settings else None,
        source=SOURCE,
        reads=(
            f"the embeddings of {frames or 'the'} frames, of {config.embed_dim} channels, and text of the templates "
            f"{config.templates}; prompt {config.prompt}"
        ),
        extract=extract_line(file, checkpoint, frames=frames),
        notes=_notes(config, frames),
        # convert_weights of the official code: on a GPU both towers run in float16.
        facts={
            **tower_facts(checkpoint, {"visual": "image tower", "text": "text tower"}),
            "precision": "float16",
        },
    )


def read_actionclip(file: Path, settings: Mapping[str, Any]) -> tuple[ActionCLIP, FusionCheckpoint]:
    """The head in an official ActionCLIP checkpoint, with no text, and what it was read from."""
    content = read_checkpoint_file(file)
    try:
        checkpoint = actionclip_checkpoint(content)
        told = actionclip_config(checkpoint)
        # The text of any number of classes is matched; none has been given yet.
        config = build(ActionCLIP.Config, {"num_classes": 1, **told, **settings})
        check_told({name: value for name, value in told.items() if name not in _NO_WEIGHT_SAYS}, config)
        head = ActionCLIP(config)
        load_actionclip_state_dict(head, checkpoint)
    except CheckpointMismatch as error:
        raise CheckpointError(f"{file} is not an ActionCLIP checkpoint that fits: {str(error).rstrip('.')}.") from error
    return head, checkpoint


def _notes(config: ActionCLIP.Config, frames: int | None) -> tuple[str, ...]:
    notes = [
        "both towers of CLIP were trained along: the head is evaluated on features and text of the towers in this file alone. "
        "MODEL there is the name or folder of their architecture; features of the frozen CLIP are refused"
    ]
    if config.scrambled:
        notes.append("its convolution reads frames and channels in the wrong order, as the official code does")
    if frames is None:
        notes.append("no weight tells its number of frames (8, 16 or 32 of those that were published)")
    text = shlex.join(["vcache", "text", "STORE", "--templates", config.templates])
    return (*notes, f"the text of its templates is added to that store with:  {text}", CROP_NOTE)
