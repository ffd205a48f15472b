"""Reads an official Text4Vis checkpoint for `vcache import-head text4vis`."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcache.heads.official import CheckpointMismatch
from vcache.heads.official_fusion import FusionCheckpoint, check_told
from vcache.heads.official_text4vis import load_text4vis_state_dict, text4vis_checkpoint, text4vis_config
from vcache.heads.text4vis import Text4Vis
from vcache.pipelines.checkpoint_file import CheckpointError, read_checkpoint_file
from vcache.pipelines.class_file import read_class_names
from vcache.pipelines.import_fusion import CROP_NOTE, extract_line, tower_facts
from vcache.pipelines.importing import ImportedHead
from vcache.pipelines.settings import build

SOURCE = "whwu95/Text4Vis at d61b34d"

# k400-vitb-16-f8.pt: tower, size of its patches, frames.
_RELEASED = re.compile(r"k400-vit([bl])-(\d+)-f(\d+)\.pt")
_WIDTHS = {"b": 768, "l": 1024}


def read(file: Path, settings: Mapping[str, Any], classes: Path | None) -> ImportedHead:
    """
    Raises:
        CheckpointError, SettingError, ClassFileError: as `import_head`.
    """
    class_names = read_class_names(classes) if classes else None
    head, checkpoint = read_text4vis(file, {**settings, **({"num_classes": len(class_names)} if class_names else {})})
    config, frames = head.config, _frames(file.name, checkpoint)
    released = {"dataset": "k400", "frames": frames, "eval_views": "4x3"} if frames else {}
    return ImportedHead(
        head=head,
        class_names=class_names,
        num_classes=config.num_classes if class_names or "num_classes" in settings else None,
        source=SOURCE,
        reads=(
            f"the embeddings of {frames or 'the'} frames, of {config.embed_dim} channels, and text of the templates "
            f"{config.templates}; temporal {config.temporal}"
        ),
        extract=extract_line(file, checkpoint, **released),  # type: ignore[arg-type]
        notes=_notes(config, frames),
        # The official evaluation makes the tower float32.
        facts={**tower_facts(checkpoint, {"visual": "image tower"}), "precision": "float32"},
    )


def read_text4vis(file: Path, settings: Mapping[str, Any]) -> tuple[Text4Vis, FusionCheckpoint]:
    """The head in an official Text4Vis checkpoint, with no text, and what it was read from."""
    content = read_checkpoint_file(file)
    try:
        checkpoint = text4vis_checkpoint(content)
        told = text4vis_config(checkpoint)
        # The classifier takes the text of any number of classes; none has been given yet.
        config = build(Text4Vis.Config, {"num_classes": 1, **told, **settings})
        check_told(told, config)
        head = Text4Vis(config)
        load_text4vis_state_dict(head, checkpoint)
    except CheckpointMismatch as error:
        raise CheckpointError(f"{file} is not a Text4Vis checkpoint that fits: {str(error).rstrip('.')}.") from error
    return head, checkpoint


def _frames(file_name: str, checkpoint: FusionCheckpoint) -> int | None:
    """What the name of a released file says, if its tower is the one that it names."""
    named = _RELEASED.fullmatch(file_name)
    patch_size = checkpoint.clip["visual.conv1.weight"].shape[-1] if named else 0
    if named is None or (_WIDTHS[named[1]], int(named[2])) != (checkpoint.width, patch_size):
        return None
    return int(named[3])


def _notes(config: Text4Vis.Config, frames: int | None) -> tuple[str, ...]:
    notes = [
        "the image tower was trained along: the head is evaluated on features of the tower in this file alone, and features of "
        "the frozen CLIP are refused"
    ]
    if frames is None:
        notes.append("no weight tells its number of frames (8, 16 or 32 of those that were published)")
    text = shlex.join(["vcache", "text", "STORE", "--templates", config.templates, "--pretrained", "openai"])
    return (
        *notes,
        f"the text tower stayed CLIP's own and is not in the file; its text is added with:  {text}",
        CROP_NOTE,
    )
