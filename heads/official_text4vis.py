"""Reads checkpoints of the official Text4Vis (whwu95/Text4Vis at d61b34d) into our head.

A file is {"epoch", "model_state_dict", "optimizer_state_dict"}; the state dict has "fusion_model.*", the image tower "visual.*",
which was trained along, and the logit scale. The text tower is not inside: it was CLIP's own, and frozen:

    checkpoint = text4vis_checkpoint(torch.load("k400-vitb-16-f8.pt", map_location="cpu", weights_only=True))
    head = Text4Vis(Text4Vis.Config(num_classes=400, **text4vis_config(checkpoint)))
    load_text4vis_state_dict(head, checkpoint)

The classes are not in the file: the head compares videos with text, which whoever uses it gives (`Text4Vis.set_text`).
"""

from collections.abc import Mapping
from typing import Any

from vcache.heads.official import CheckpointMismatch, load_whole, unwrap, what_it_is
from vcache.heads.official_fusion import FusionCheckpoint, fusion_checkpoint
from vcache.heads.text4vis import Text4Vis

_FUSION = "fusion_model."
_TEMPORAL = {"meanp": "tap", "transf": "t_trans"}
"""What video_header of the official code can be."""
_ADVICE = "The official code writes no such file."


def text4vis_checkpoint(checkpoint: object) -> FusionCheckpoint:
    """The parts of an official Text4Vis checkpoint.

    Raises:
        CheckpointMismatch: it is something else; says what, where the names tell.
    """
    state = unwrap(checkpoint)
    assert isinstance(checkpoint, Mapping)
    fusion = {name.removeprefix(_FUSION): x for name, x in state.items() if name.startswith(_FUSION)}
    # Of the mean nothing is saved but an image tower with a logit scale; CLIP as a whole has a text tower, too.
    is_mean = "visual.proj" in state and "logit_scale" in state and "token_embedding.weight" not in state
    if not fusion and not is_mean:
        raise CheckpointMismatch(what_it_is(checkpoint, state, "no Text4Vis (fusion_model.*)"))
    return fusion_checkpoint(fusion, {name: x for name, x in state.items() if not name.startswith(_FUSION)})


def text4vis_config(checkpoint: FusionCheckpoint) -> dict[str, Any]:
    """The fields of the Config that the file tells: all that matter, less the number of classes.

    The heads of the transformer are in no shape: one for 64 channels, as of CLIP's text tower.

    Raises:
        CheckpointMismatch: a parameter from which it is read is missing or has another number of axes.
    """
    if checkpoint.kind not in _TEMPORAL:
        raise CheckpointMismatch(f"its module over the frames is {checkpoint.kind!r}, which Text4Vis does not have")
    return {"temporal": _TEMPORAL[checkpoint.kind], "classifier": "text", "embed_dim": checkpoint.embed_dim}


def load_text4vis_state_dict(head: Text4Vis, checkpoint: FusionCheckpoint) -> None:
    """Load an official Text4Vis checkpoint; the head is changed only if all of it fits. The text of the head stays.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them.
    """
    state = {f"{_FUSION}{name}": x.float() for name, x in checkpoint.fusion.items()}
    state["classifier.logit_scale"] = checkpoint.clip["logit_scale"].float()
    of_text = {name: x for name, x in head.state_dict().items() if not name.startswith(_FUSION)}
    load_whole(head, of_text | state, _ADVICE)
