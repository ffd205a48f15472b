"""Reads checkpoints of the official EVL (OpenGVLab/efficient-video-recognition at b282e8b) into our head.

A file is a dict with the state dict under "model"; its keys carry "module." from distributed training, and the frozen backbone
is not inside:

    checkpoint = torch.load("k400_vitb16_8f_dec4x768.pth", map_location="cpu", weights_only=True)
    inferred = infer_evl_config(evl_state_dict(checkpoint))
    head = EVL(EVL.Config(**inferred.fields))         unless inferred.unknown names fields that are to be given
    load_evl_state_dict(head, checkpoint)
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vcache.heads.evl import EVL
from vcache.heads.official import (
    FINE_TUNED,
    CheckpointMismatch,
    InferredConfig,
    check_weights,
    load_whole,
    shape_of,
    unwrap,
    what_it_is,
)

_LAYER = "decoder.decoder_layers.0"
_ADVICE = (
    "Set layers, width, qkv_dim, grid, num_frames, num_classes and the temporal modules of the head's Config as the "
    "checkpoint was trained."
)


def load_evl_state_dict(head: EVL, checkpoint: Mapping[str, Any], *, advice: str = _ADVICE) -> None:
    """Load an official EVL checkpoint, or the state dict inside it; the head is changed only if all of it fits.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them, and ends in `advice`.
    """
    load_whole(head, unwrap(checkpoint), advice)


def evl_state_dict(checkpoint: object) -> dict[str, Tensor]:
    """The state dict of an official EVL checkpoint, whatever of its wrappings is there.

    Raises:
        CheckpointMismatch: it is something else; says what, where the names tell.
    """
    state = unwrap(checkpoint)
    if not any(name.startswith("decoder.decoder_layers.") for name in state):
        raise CheckpointMismatch(what_it_is(checkpoint, state, "no EVL decoder (decoder.decoder_layers.*)"))
    if any(name.startswith("backbone.") for name in state):
        raise CheckpointMismatch(f"it is a checkpoint of EVL trained with --finetune_backbone, {FINE_TUNED}")
    check_weights(state)
    return state


def infer_evl_config(state: Mapping[str, Tensor]) -> InferredConfig:
    """The Config that the shapes of `evl_state_dict` tell. M decoder layers read the last M of the backbone, as upstream.

    `num_heads` is in no shape: it is CLIP's, one head for 64 channels, where that divides.

    Raises:
        CheckpointMismatch: a parameter from which it is read is missing or has another number of axes.
    """
    (width,) = shape_of(state, "decoder.cls_token", 1)
    qkv_dim, mlp_dim = (shape_of(state, f"{_LAYER}.{name}.weight", 2)[0] for name in ("attn.q_proj", "mlp.fc1"))
    num_layers = len({name.split(".")[2] for name in state if name.startswith("decoder.decoder_layers.")})
    fields: dict[str, Any] = {
        "num_classes": shape_of(state, "proj.2.weight", 2)[0],
        "width": width,
        "layers": tuple(range(-num_layers, 0)),
        "qkv_dim": qkv_dim,
        "mlp_factor": mlp_dim / width,
        "temporal_conv": _has(state, "temporal_conv"),
        "temporal_pos_embed": _has(state, "temporal_pos_embed"),
        "temporal_cross_attention": _has(state, "cross_attention"),
    }
    unknown = {}
    if fields["temporal_pos_embed"]:
        fields["num_frames"] = shape_of(state, "decoder.temporal_pos_embed.0", 2)[0]
    else:
        unknown["num_frames"] = "it has no T-PE, whose size says it"
    if width % 64 == 0 and qkv_dim % (width // 64) == 0:
        fields["num_heads"] = width // 64
    else:
        unknown["num_heads"] = f"of width {width} and qkv_dim {qkv_dim} it is not one head for 64 channels, as CLIP has"
    grids = _grids(state)
    if square := [grid for grid in grids if grid[0] == grid[1]]:
        fields["grid"] = square[0]
    elif grids:
        unknown["grid"] = f"its T-CA fits {', '.join(f'{h}x{w}' for h, w in grids)} patches (rows x columns)"
    else:
        unknown["grid"] = "it has no T-CA, whose size says it"
    return InferredConfig(fields=fields, unknown=unknown)


def check_evl_config(config: EVL.Config, state: Mapping[str, Tensor]) -> None:
    """Refuse a Config that the shapes contradict.

    Raises:
        CheckpointMismatch: names the field, its value, and what the weights are made for.
    """
    fields = infer_evl_config(state).fields
    told = {name: value for name, value in fields.items() if name not in ("num_heads", "grid", "layers")}
    right = replace(config, **told)
    for name in told:
        size = {"qkv_dim": "attention_dim", "mlp_factor": "mlp_dim"}.get(name, name)
        if getattr(config, size) != getattr(right, size):
            raise CheckpointMismatch(f"{name} is set to {getattr(config, name)}, and its weights say {told[name]}")
    if len(config.layers) != len(fields["layers"]):
        raise CheckpointMismatch(f"layers is set to {config.layers}, and it has {len(fields['layers'])} decoder layers")
    grids = _grids(state)
    if grids and config.grid not in grids:
        fitting = ", ".join(f"{h}x{w}" for h, w in grids)
        raise CheckpointMismatch(f"grid is set to {config.grid[0]}x{config.grid[1]}, and its T-CA fits {fitting}")


def _grids(state: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """The grids (h, w) whose patches have as many displacements, (2h-1)(2w-1), as its T-CA; none if it has no T-CA."""
    if not _has(state, "cross_attention"):
        return []
    (number, _) = shape_of(state, "decoder.cross_attention.0.w1", 2)
    rows = [h for h in range(1, (number + 1) // 2 + 1) if number % (2 * h - 1) == 0]
    if not rows or number % 2 == 0:
        raise CheckpointMismatch(f"its T-CA has {number} displacements, and no grid of patches has so many")
    return [(h, (number // (2 * h - 1) + 1) // 2) for h in rows]


def _has(state: Mapping[str, Tensor], module: str) -> bool:
    return any(name.startswith(f"decoder.{module}.") for name in state)
