"""Reads checkpoints of the heads' official repositories into the heads of this folder.

EVL (OpenGVLab/efficient-video-recognition at b282e8b): a file is a dict with the state dict under "model"; its keys
carry "module." from distributed training, and the frozen backbone is not inside. Our parameters have the official
names, so reading one is taking off those two wrappings and checking that everything fits. The caller opens the file:

    checkpoint = torch.load("k400_vitb16_8f_dec4x768.pth", map_location="cpu", weights_only=True)
    inferred = infer_evl_config(evl_state_dict(checkpoint))
    head = EVL(EVL.Config(**inferred.fields))         unless inferred.unknown names fields that are to be given
    load_evl_state_dict(head, checkpoint)
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vcache.heads.evl import EVL

# Where training scripts keep the state dict: EVL, DiST, AIM and mmaction, Text4Vis and ActionCLIP.
_CONTAINERS = ("model", "model_state", "state_dict", "model_state_dict")
_FINE_TUNED = "whose image tower was trained along, so the frozen CLIP's features are not what it reads"
# What a name inside says the file is. The first that fits: DiST, AIM and Text4Vis have CLIP's names beside their own.
_FOREIGN = (
    (r"(dist|ladder)_net\.", "a checkpoint of DiST"),
    (r"_Adapter\.", f"a checkpoint of AIM, {_FINE_TUNED}"),
    (r"^fusion_model_state_dict$", f"a checkpoint of ActionCLIP, {_FINE_TUNED}"),
    (r"^fusion_model\.", f"a checkpoint of Text4Vis, {_FINE_TUNED}"),
    (r"^cls_head\.", "a checkpoint of mmaction"),
    (r"^(visual|transformer|token_embedding)\.|^text_projection$", "CLIP's own weights: a backbone, not a head"),
)
_LAYER = "decoder.decoder_layers.0"
_ADVICE = (
    "Set layers, width, qkv_dim, grid, num_frames, num_classes and the temporal modules of the head's Config as the "
    "checkpoint was trained."
)


class CheckpointMismatch(ValueError):
    """What was read is no checkpoint of the head, or not one of the same shape."""


@dataclass(frozen=True, kw_only=True)
class InferredConfig:
    """What the shapes in a state dict say of the head's Config."""

    fields: dict[str, Any]
    """Values by field. `num_heads` is in no shape: it is CLIP's, one head for 64 channels, where that divides."""
    unknown: dict[str, str]
    """The fields that have to be given, each with why, as a clause."""


def load_evl_state_dict(head: EVL, checkpoint: Mapping[str, Any], *, advice: str = _ADVICE) -> None:
    """Load an official EVL checkpoint, or the state dict inside it; the head is changed only if all of it fits.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them, and ends in `advice`.
    """
    _load(head, _unwrap(checkpoint), advice)


def evl_state_dict(checkpoint: object) -> dict[str, Tensor]:
    """The state dict of an official EVL checkpoint, whatever of its wrappings is there.

    Raises:
        CheckpointMismatch: it is something else; says what, where the names tell.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointMismatch(f"it holds a {type(checkpoint).__name__}, where a checkpoint is a dict of weights")
    state = _unwrap(checkpoint)
    if not any(name.startswith("decoder.decoder_layers.") for name in state):
        raise CheckpointMismatch(_what_it_is(checkpoint, state))
    if any(name.startswith("backbone.") for name in state):
        raise CheckpointMismatch(f"it is a checkpoint of EVL trained with --finetune_backbone, {_FINE_TUNED}")
    if odd := [name for name, x in state.items() if not isinstance(x, Tensor) or not x.is_floating_point()]:
        raise CheckpointMismatch(_listed("it is damaged: these are no weights:", odd))
    if odd := [name for name, x in state.items() if not torch.isfinite(x).all()]:
        raise CheckpointMismatch(_listed("its training went wrong: there are NaN or infinite weights in", odd))
    return state


def infer_evl_config(state: Mapping[str, Tensor]) -> InferredConfig:
    """The Config that the shapes of `evl_state_dict` tell. M decoder layers read the last M of the backbone, as upstream.

    Raises:
        CheckpointMismatch: a parameter from which it is read is missing or has another number of axes.
    """
    (width,) = _shape(state, "decoder.cls_token", 1)
    qkv_dim, mlp_dim = (_shape(state, f"{_LAYER}.{name}.weight", 2)[0] for name in ("attn.q_proj", "mlp.fc1"))
    num_layers = len({name.split(".")[2] for name in state if name.startswith("decoder.decoder_layers.")})
    fields: dict[str, Any] = {
        "num_classes": _shape(state, "proj.2.weight", 2)[0],
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
        fields["num_frames"] = _shape(state, "decoder.temporal_pos_embed.0", 2)[0]
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
    (number, _) = _shape(state, "decoder.cross_attention.0.w1", 2)
    rows = [h for h in range(1, (number + 1) // 2 + 1) if number % (2 * h - 1) == 0]
    if not rows or number % 2 == 0:
        raise CheckpointMismatch(f"its T-CA has {number} displacements, and no grid of patches has so many")
    return [(h, (number // (2 * h - 1) + 1) // 2) for h in rows]


def _has(state: Mapping[str, Tensor], module: str) -> bool:
    return any(name.startswith(f"decoder.{module}.") for name in state)


def _shape(state: Mapping[str, Tensor], name: str, num_axes: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointMismatch(f"it is not whole: there is no {name}")
    shape = tuple(state[name].shape)
    if len(shape) != num_axes or math.prod(shape) == 0:
        raise CheckpointMismatch(f"it is damaged: {name} is {shape}, not {num_axes} axes of 1 or more")
    return shape


def _what_it_is(checkpoint: Mapping[Any, Any], state: Mapping[str, Any]) -> str:
    """What a mapping that is no EVL checkpoint seems to be."""
    names = [str(name) for name in (*state, *checkpoint)]
    for pattern, what in _FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return f"it is {what}"
    if not any(isinstance(value, Tensor) for value in state.values()):
        return f"it holds no weights, only {', '.join(sorted(map(str, checkpoint))[:6]) or 'an empty dict'}"
    return _listed("it holds no EVL decoder (decoder.decoder_layers.*), but", state)


def _unwrap(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict of a checkpoint, under the names it had before distributed training."""
    inside = (checkpoint[name] for name in _CONTAINERS if isinstance(checkpoint.get(name), Mapping))
    return {str(name).removeprefix("module."): value for name, value in next(inside, checkpoint).items()}


def _load(head: nn.Module, state: Mapping[str, Tensor], advice: str) -> None:
    expected = head.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the head's is {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    problems = [
        _listed("the checkpoint lacks", expected.keys() - state.keys()),
        _listed("the head has no", state.keys() - expected.keys()),
        _listed("shapes differ:", shapes),
    ]
    if any(problems):
        raise CheckpointMismatch(
            f"this checkpoint does not fit the head: {'; '.join(filter(None, problems))}. {advice}"
        )
    head.load_state_dict(dict(state))


def _listed(what: str, items: Iterable[str], at_most: int = 3) -> str:
    """ "the head has no a, b, c and 7 more", or "" without items."""
    names = sorted(items)
    if not names:
        return ""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{what} {', '.join(names[:at_most])}{more}"
