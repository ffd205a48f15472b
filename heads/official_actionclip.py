"""Reads checkpoints of the official ActionCLIP (sallymmx/ActionCLIP at 31c34df) into our head.

A file is {"epoch", "model_state_dict", "fusion_model_state_dict", "optimizer_state_dict"}: CLIP, both towers trained along, and
the visual prompt, whose names carry "module." from distributed training:

    checkpoint = actionclip_checkpoint(torch.load("model_best.pt", map_location="cpu", weights_only=True))
    head = ActionCLIP(ActionCLIP.Config(num_classes=400, **actionclip_config(checkpoint)))
    load_actionclip_state_dict(head, checkpoint)

The classes are not in the file: the head compares videos with text, which whoever uses it gives (`ActionCLIP.set_text`).
"""

from collections.abc import Mapping
from typing import Any

from vcache.heads.actionclip import ActionCLIP
from vcache.heads.official import CheckpointMismatch, load_whole, shape_of, unwrap, what_it_is
from vcache.heads.official_fusion import FusionCheckpoint, fusion_checkpoint

_PROMPT = "fusion_model_state_dict"
_ADVICE = "The official code writes no such file."


def actionclip_checkpoint(checkpoint: object) -> FusionCheckpoint:
    """The parts of an official ActionCLIP checkpoint.

    Raises:
        CheckpointMismatch: it is something else; says what, where the names tell.
    """
    state = unwrap(checkpoint)
    assert isinstance(checkpoint, Mapping)
    prompt = checkpoint.get(_PROMPT)
    if not isinstance(prompt, Mapping) or "token_embedding.weight" not in state:
        raise CheckpointMismatch(what_it_is(checkpoint, state, f"no visual prompt ({_PROMPT})"))
    return fusion_checkpoint({str(name).removeprefix("module."): x for name, x in prompt.items()}, state)


def actionclip_config(checkpoint: FusionCheckpoint) -> dict[str, Any]:
    """The fields of the Config that the file tells: all that matter, less the number of classes.

    Conv1D reads frames and channels as the official code does, in the wrong order: so was it trained.

    Raises:
        CheckpointMismatch: a parameter from which it is read is missing or has another number of axes.
    """
    fields: dict[str, Any] = {"prompt": checkpoint.kind, "embed_dim": checkpoint.embed_dim}
    if checkpoint.kind == "transf":
        # As coded: one head for 64 channels of the text tower.
        fields["prompt_heads"] = max(1, shape_of(checkpoint.clip, "ln_final.weight", 1)[0] // 64)
    if checkpoint.kind == "transf_cls":
        fields["num_frames"] = shape_of(checkpoint.fusion, "transformer.pos_embed", 3)[1] - 1
    if checkpoint.kind == "conv1d":
        fields["scrambled"] = True
    return fields


def load_actionclip_state_dict(head: ActionCLIP, checkpoint: FusionCheckpoint) -> None:
    """Load an official ActionCLIP checkpoint; the head is changed only if all of it fits. The text of the head stays.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them.
    """
    state = {f"fusion_model.{name}": x.float() for name, x in checkpoint.fusion.items()}
    scale = checkpoint.clip["logit_scale"].float()
    load_whole(head, {**state, "logit_scale": scale, "texts": head.texts}, _ADVICE)
