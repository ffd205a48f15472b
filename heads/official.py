"""What the readers of official checkpoints share (official_evl.py, official_dist.py): the wrappings of training scripts, what a
foreign file is, what is damaged, and loading all of a checkpoint or nothing.

Our parameters have the official names, so reading one is taking off the wrappings and checking that everything fits. The caller
opens the file; pipelines/checkpoint_file.py does it without running code that is in it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Where training scripts keep the state dict: EVL, DiST, AIM and mmaction, Text4Vis and ActionCLIP.
_CONTAINERS = ("model", "model_state", "state_dict", "model_state_dict")
FINE_TUNED = "whose image tower was trained along, so the frozen CLIP's features are not what it reads"
# What a name inside says the file is. The first that fits: DiST, AIM and Text4Vis have CLIP's names beside their own.
_KINDS = (
    (r"(dist|ladder)_net\.", "a checkpoint of DiST"),
    (r"_Adapter\.", "a checkpoint of AIM"),
    (r"^fusion_model_state_dict$", f"a checkpoint of ActionCLIP, {FINE_TUNED}"),
    (r"^fusion_model\.", f"a checkpoint of Text4Vis, {FINE_TUNED}"),
    (r"^decoder\.decoder_layers\.", "a checkpoint of EVL"),
    (r"^cls_head\.", "a checkpoint of mmaction"),
    (r"^(visual|transformer|token_embedding)\.|^text_projection$", "CLIP's own weights: a backbone, not a head"),
)


class CheckpointMismatch(ValueError):
    """What was read is no checkpoint of the head, or not one of the same shape."""


@dataclass(frozen=True, kw_only=True)
class InferredConfig:
    """What a state dict says of the head's Config."""

    fields: dict[str, Any]
    """Values by field."""
    unknown: dict[str, str]
    """The fields that have to be given, each with why, as a clause."""


def unwrap(checkpoint: object) -> dict[str, Any]:
    """The state dict of a checkpoint, under the names it had before distributed training.

    Raises:
        CheckpointMismatch: it is no dict.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointMismatch(f"it holds a {type(checkpoint).__name__}, where a checkpoint is a dict of weights")
    inside = (checkpoint[name] for name in _CONTAINERS if isinstance(checkpoint.get(name), Mapping))
    return {str(name).removeprefix("module."): value for name, value in next(inside, checkpoint).items()}


def what_it_is(checkpoint: Any, state: Mapping[str, Any], lacking: str) -> str:
    """What a dict seems to be that holds nothing of the head; `lacking` says what that is, as "no EVL decoder (...)"."""
    names = [str(name) for name in (*state, *checkpoint)]
    for pattern, what in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return f"it is {what}"
    if not any(isinstance(value, Tensor) for value in state.values()):
        return f"it holds no weights, only {', '.join(sorted(map(str, checkpoint))[:6]) or 'an empty dict'}"
    return listed(f"it holds {lacking}, but", state)


def check_weights(state: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointMismatch: something among them is no tensor of finite floating point numbers.
    """
    if odd := [name for name, x in state.items() if not isinstance(x, Tensor) or not x.is_floating_point()]:
        raise CheckpointMismatch(listed("it is damaged: these are no weights:", odd))
    if odd := [name for name, x in state.items() if not torch.isfinite(x).all()]:
        raise CheckpointMismatch(listed("its training went wrong: there are NaN or infinite weights in", odd))


def shape_of(state: Mapping[str, Tensor], name: str, num_axes: int) -> tuple[int, ...]:
    """
    Raises:
        CheckpointMismatch: the parameter is not there, is empty, or has another number of axes.
    """
    if name not in state:
        raise CheckpointMismatch(f"it is not whole: there is no {name}")
    shape = tuple(state[name].shape)
    if len(shape) != num_axes or math.prod(shape) == 0:
        raise CheckpointMismatch(f"it is damaged: {name} is {shape}, not {num_axes} axes of 1 or more")
    return shape


def load_whole(head: nn.Module, state: Mapping[str, Tensor], advice: str) -> None:
    """Load a state dict; the head is changed only if all of it fits.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them, and ends in `advice`.
    """
    check_whole(head.state_dict(), state, advice)
    head.load_state_dict(dict(state))


def check_whole(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], advice: str) -> None:
    """
    Raises:
        CheckpointMismatch: the state dict is not for the parameters of `expected`; names them, and ends in `advice`.
    """
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the head's is {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    problems = [
        listed("the checkpoint lacks", expected.keys() - state.keys()),
        listed("the head has no", state.keys() - expected.keys()),
        listed("shapes differ:", shapes),
    ]
    if any(problems):
        raise CheckpointMismatch(
            f"this checkpoint does not fit the head: {'; '.join(filter(None, problems))}. {advice}"
        )


def listed(what: str, items: Iterable[str], at_most: int = 3) -> str:
    """ "the head has no a, b, c and 7 more", or "" without items."""
    names = sorted(items)
    if not names:
        return ""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{what} {', '.join(names[:at_most])}{more}"
