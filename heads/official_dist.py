"""Reads checkpoints of the official DiST (alibaba-mmai-research/DiST at 4b3a09b) into our head.

A file is {"model_state": ...}. The head is under "backbone.base_encoder.dist_net."; before its authors renamed it
(process_dist_cpkt.py) it was "ladder_net.", with other names inside, and both are read. CLIP lies beside it, both towers, frozen:

    checkpoint = dist_checkpoint(torch.load("DIST_VIT_B16_K400_8+16f_83.6.pyth", map_location="cpu", weights_only=True))
    head = DiST(DiSTConfig(num_classes=400, **infer_dist_config(checkpoint).fields))
    load_dist_state_dict(head, checkpoint)

The classes are not in the file: the head compares videos with text, which whoever uses it gives (`DiST.set_text`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vcache.heads.dist import DiST
from vcache.heads.dist_config import DiSTConfig
from vcache.heads.official import (
    CheckpointMismatch,
    InferredConfig,
    check_weights,
    load_whole,
    shape_of,
    unwrap,
    what_it_is,
)

_OF_HEAD = re.compile(r"(.*?)(dist|ladder)_net\.(.+)")
# What modules of ladder_net are called in dist_net, where that is something else.
_RENAMED = {
    "input_map_feat_nets": "input_linears",
    "s2t_fuse_nets": "integration2temporal_nets",
    "t2s_fuse_nets": "temporal2integration_nets",
    "spatial_nets": "integration_nets",
    "final_temporal_nets": "adapooling_nets",
}
_IMAGE_SIZE = 224
_ADVICE = "The official code writes no such file in its released configurations."


@dataclass(frozen=True, kw_only=True)
class DistCheckpoint:
    """The two parts of a file."""

    head: dict[str, Tensor]
    """Under the names of `DiST`, less its text."""
    clip: dict[str, Tensor]
    """What lies beside it, under OpenAI's names: visual.*, transformer.*, logit_scale; empty where the head was saved alone."""

    @property
    def visual(self) -> dict[str, Tensor]:
        """The frozen image tower that it was trained on, under the names inside the tower and in float32, which is exact."""
        return {name.removeprefix("visual."): x.float() for name, x in self.clip.items() if name.startswith("visual.")}

    @property
    def logit_scale(self) -> float | None:
        """CLIP's, which was not trained along."""
        scale = self.clip.get("logit_scale")
        return None if scale is None or scale.numel() != 1 else float(scale)


def dist_checkpoint(checkpoint: object) -> DistCheckpoint:
    """The parts of an official DiST checkpoint, whatever of its wrappings is there.

    Raises:
        CheckpointMismatch: it is something else; says what, where the names tell.
    """
    state = unwrap(checkpoint)
    found = {name: match for name in state if (match := _OF_HEAD.fullmatch(name))}
    if not found and "temporal_stem.weight" in state:  # the head's own state dict
        check_weights(state)
        return DistCheckpoint(head=state, clip={})
    if not found:
        raise CheckpointMismatch(what_it_is(checkpoint, state, "no DiST (dist_net.*)"))
    head = {_our_name(match[3]): state[name] for name, match in found.items()}
    check_weights(head)
    prefix = next(iter(found.values()))[1]
    clip = {
        name.removeprefix(prefix): x
        for name, x in state.items()
        if name.startswith(prefix) and name not in found and isinstance(x, Tensor)
    }
    return DistCheckpoint(head=head, clip=clip)


def infer_dist_config(checkpoint: DistCheckpoint) -> InferredConfig:
    """The Config that the shapes tell, less the number of classes.

    How many blocks the backbone has and its grid are those of the CLIP beside the head. Where that is not there, all blocks are
    taken to be read, as in the paper, and frames to be 224 pixels wide.

    Raises:
        CheckpointMismatch: a parameter from which it is read is missing or has another number of axes, or its tensors are for
            clips of different lengths.
    """
    state = checkpoint.head
    temporal_dim, _, _, _, patch_size = shape_of(state, "temporal_stem.weight", 5)
    integration_dim, width = shape_of(state, "input_linears.0.weight", 2)
    num_read = _number(state, "input_linears")
    num_layers = _number(checkpoint.clip, "visual.transformer.resblocks") or num_read
    fields: dict[str, Any] = {
        "num_frames": _num_frames(state),
        "gamma": shape_of(state, "temporal2integration_nets.0.linear_fuse.weight", 5)[2],
        "width": width,
        "patch_size": patch_size,
        "embed_dim": shape_of(state, "proj", 2)[1],
        "integration_dim": integration_dim,
        "temporal_dim": temporal_dim,
        "adaptive_pooling_layers": _number(state, "adapooling_nets"),
        "num_layers": num_layers,
        "grid": _clip_grid(checkpoint) or (_IMAGE_SIZE // patch_size,) * 2,
    }
    unknown = {}
    if num_read != num_layers:
        unknown["layers"] = f"it reads {num_read} of the {num_layers} blocks of its CLIP, and no weight says which"
    return InferredConfig(fields=fields, unknown=unknown)


def check_dist_config(config: DiSTConfig, checkpoint: DistCheckpoint) -> None:
    """Refuse a Config that the shapes contradict.

    Raises:
        CheckpointMismatch: names the field, its value, and what the weights are made for.
    """
    fields = infer_dist_config(checkpoint).fields
    free = () if checkpoint.visual else ("num_layers", "grid")
    for name in fields.keys() - set(free):
        if getattr(config, name) != fields[name]:
            raise CheckpointMismatch(
                f"{name} is set to {_word(getattr(config, name))}, and its weights say {_word(fields[name])}"
            )
    if len(config.read_layers) != (num_read := _number(checkpoint.head, "input_linears")):
        raise CheckpointMismatch(
            f"{len(config.read_layers)} layers are set to be read, {_word(config.read_layers)}, and it has weights for {num_read}"
        )


def load_dist_state_dict(head: DiST, checkpoint: DistCheckpoint, *, advice: str = _ADVICE) -> None:
    """Load an official DiST checkpoint; the head is changed only if all of it fits. The text of the head stays.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them, and ends in `advice`.
    """
    text = {name: x for name, x in head.state_dict().items() if name.startswith("text.")}
    load_whole(head, {**checkpoint.head, **text}, advice)


def _our_name(name: str) -> str:
    module, dot, rest = name.partition(".")
    return _RENAMED.get(module, module) + dot + rest


def _number(state: Mapping[str, Any], module: str) -> int:
    """How many there are of a numbered module."""
    prefix = f"{module}."
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _num_frames(state: Mapping[str, Tensor]) -> int:
    """T, which sizes the CLS tokens of every layer and the positions of every pooling layer."""
    sizes: dict[int, str] = {}
    for name in sorted(state):
        if name.startswith("temporal2integration_nets.") and name.endswith(".cls_token"):
            sizes.setdefault(shape_of(state, name, 4)[2], name)
        elif name.endswith(".positional_embedding"):
            sizes.setdefault(shape_of(state, name, 3)[1], name)
    if not sizes:
        raise CheckpointMismatch("it is not whole: there is no temporal2integration_nets.0.cls_token")
    if len(sizes) > 1:
        told = " and ".join(f"{frames} ({name})" for frames, name in sorted(sizes.items()))
        raise CheckpointMismatch(f"it is damaged: its weights are for clips of different numbers of frames, {told}")
    return next(iter(sizes))


def _clip_grid(checkpoint: DistCheckpoint) -> tuple[int, int] | None:
    """Rows and columns of patches that the CLIP beside the head has positions for; they are square."""
    positions = checkpoint.clip.get("visual.positional_embedding")
    side = 0 if positions is None or positions.ndim != 2 else math.isqrt(max(len(positions) - 1, 0))
    return (side, side) if side else None


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
