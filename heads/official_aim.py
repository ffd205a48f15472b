"""Reads checkpoints of the official AIM (taoyang1122/adapt-image-models at b3580d2) into our head.

A file of mmcv is {"meta", "state_dict", ...}. The state dict has the whole network: CLIP's image tower, frozen and without its
proj, with the adapters in its blocks under "backbone.", and the classifier "cls_head.fc_cls":

    checkpoint = aim_checkpoint(torch.load("aim_k400.pth", map_location="cpu", weights_only=True))
    head = AIM(AIM.Config(**infer_aim_config(checkpoint)))
    load_aim_checkpoint(head, checkpoint)                  the tower in the file becomes the tail of the head

The head reads pixels (temporal_embedding "stem"): nothing of another tower is in what it says.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcache.heads.aim import AIM
from vcache.heads.official import (
    CheckpointMismatch,
    check_weights,
    check_whole,
    listed,
    load_whole,
    shape_of,
    unwrap,
    what_it_is,
)
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_stem import StemShape

_ADAPTER = re.compile(r"backbone\.transformer\.resblocks\.(\d+\.\w+_Adapter(?:_in)?\..+)")
_BLOCK = re.compile(r"backbone\.transformer\.resblocks\.(\d+\..+)")
_STEM = re.compile(r"backbone\.((?:class|positional)_embedding|conv1\.weight|ln_pre\.\w+)")
_TRAINED = re.compile(r"backbone\.(temporal_embedding|ln_post\.\w+)")
_CLASSIFIER = re.compile(r"cls_head\.(fc_cls\.\w+)")
_ADVICE = "The official code writes no such file."


@dataclass(frozen=True, kw_only=True)
class AIMCheckpoint:
    """The two parts of a file."""

    head: dict[str, Tensor]
    """What was trained, under the names of `AIM`."""
    tail: dict[str, Tensor]
    """The frozen image tower, under the names of `FrozenTail`; its ln_post is the trained one."""


def aim_checkpoint(checkpoint: object) -> AIMCheckpoint:
    """The parts of an official AIM checkpoint.

    Raises:
        CheckpointMismatch: it is something else; says what, where the names tell.
    """
    state = unwrap(checkpoint)
    if not any(_ADAPTER.fullmatch(name) for name in state):
        raise CheckpointMismatch(what_it_is(checkpoint, state, "no AIM (backbone.*_Adapter.*)"))
    check_weights(state)
    head: dict[str, Tensor] = {}
    tail: dict[str, Tensor] = {}
    strange = []
    for name, x in state.items():
        if match := _ADAPTER.fullmatch(name):
            head[f"adapters.{match[1]}"] = x
        elif match := _CLASSIFIER.fullmatch(name):
            head[f"classifier.{match[1]}"] = x
        elif match := _TRAINED.fullmatch(name):
            head[match[1]] = x
        elif match := _BLOCK.fullmatch(name):
            tail[f"blocks.{match[1]}"] = x
        elif match := _STEM.fullmatch(name):
            tail[f"stem.{match[1]}"] = x
        else:
            strange.append(name)
    if strange:
        raise CheckpointMismatch(listed("the official AIM has no", strange))
    tail |= {name: x for name, x in head.items() if name.startswith("ln_post.")}
    return AIMCheckpoint(head=head, tail=tail)


def infer_aim_config(checkpoint: AIMCheckpoint) -> dict[str, Any]:
    """The fields of the Config that the shapes tell.

    They do not tell the scale of the joint adapters, nor the heads of the blocks: one for 64 channels, as of CLIP.

    Raises:
        CheckpointMismatch: a parameter from which it is read is missing or has another number of axes.
    """
    head, tail = checkpoint.head, checkpoint.tail
    _, num_frames, width = shape_of(head, "temporal_embedding", 3)
    num_layers = _num_blocks(tail)
    return {
        "num_classes": shape_of(head, "classifier.fc_cls.weight", 2)[0],
        "num_frames": num_frames,
        "width": width,
        "num_heads": max(1, width // 64),
        "num_layers": num_layers,
        "blocks": num_layers,
        "grid": _grid(shape_of(tail, "stem.positional_embedding", 2)[0]),
        "patch_size": shape_of(tail, "stem.conv1.weight", 4)[-1],
        "bottleneck": _ratio(shape_of(head, "adapters.0.S_Adapter.D_fc1.weight", 2)[0], width),
        "temporal_adapters": 1 + any(".T_Adapter_in." in name for name in head),
        "temporal_embedding": "stem",
    }


def check_aim_config(config: AIM.Config, checkpoint: AIMCheckpoint) -> None:
    """Refuse a Config that the shapes contradict.

    Raises:
        CheckpointMismatch: names the field, its value, and what the weights are made for.
    """
    free = ("num_heads",)
    for name, told in infer_aim_config(checkpoint).items():
        if name not in free and (value := getattr(config, name)) != told:
            raise CheckpointMismatch(f"{name} is set to {value}, and its weights say {told}")


def load_aim_checkpoint(head: AIM, checkpoint: AIMCheckpoint) -> None:
    """Load an official AIM checkpoint with its tower; the head is changed only if all of it fits.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them.
    """
    config = head.config
    block = BlockShape(
        width=config.width,
        num_heads=config.num_heads,
        mlp_dim=shape_of(checkpoint.tail, "blocks.0.mlp.c_fc.weight", 2)[0],
    )
    shape = TailShape(
        num_layers=config.num_layers,
        num_blocks=config.num_layers,
        block=block,
        embed_dim=None,
        stem=StemShape(patch_size=config.patch_size, grid=config.grid),
    )
    with torch.device("meta"):
        expected = FrozenTail(shape).state_dict()
    check_whole(expected, checkpoint.tail, _ADVICE)
    check_whole(head.state_dict(), checkpoint.head, _ADVICE)
    dtype = torch.float32 if config.frozen_dtype == "auto" else getattr(torch, config.frozen_dtype)
    head.set_tail(FrozenTail.of(shape, checkpoint.tail, dtype))
    load_whole(head, checkpoint.head, _ADVICE)


def _num_blocks(tail: Mapping[str, Tensor]) -> int:
    """
    Raises:
        CheckpointMismatch: there is none, or one in between is missing.
    """
    there = {int(name.split(".")[1]) for name in tail if name.startswith("blocks.")}
    if missing := sorted(set(range(max(there, default=0) + 1)) - there):
        raise CheckpointMismatch(f"it is not whole: there is no backbone.transformer.resblocks.{missing[0]}")
    return len(there)


def _grid(num_tokens: int) -> tuple[int, int]:
    """Rows and columns of the patches, which are square.

    Raises:
        CheckpointMismatch: so many are not.
    """
    side = math.isqrt(num_tokens - 1)
    if side < 1 or side * side != num_tokens - 1:
        raise CheckpointMismatch(
            f"it is damaged: backbone.positional_embedding is for {num_tokens - 1} patches, no square"
        )
    return side, side


def _ratio(hidden: int, width: int) -> float:
    """The bottleneck of which `hidden` is the whole part, after rounding of the quotient."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
