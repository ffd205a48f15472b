"""Reads checkpoints of the heads' official repositories into the heads of this folder.

EVL (OpenGVLab/efficient-video-recognition at b282e8b): a file is a dict with the state dict under "model"; its keys
carry "module." from distributed training, and the frozen backbone is not inside. Our parameters have the official
names, so reading one is taking off those two wrappings and checking that everything fits. The caller opens the file:

    load_evl_state_dict(head, torch.load("k400_vitb16_8f_dec4x768.pth", map_location="cpu", weights_only=True))
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from vcache.heads.evl import EVL


class CheckpointMismatch(ValueError):
    """An official checkpoint and the head it is loaded into are not of the same shape."""


def load_evl_state_dict(head: EVL, checkpoint: Mapping[str, Any]) -> None:
    """Load an official EVL checkpoint, or the state dict inside it; the head is changed only if all of it fits.

    Raises:
        CheckpointMismatch: parameters are missing, unknown or of another shape; names them and what to configure.
    """
    _load(head, _unwrap(checkpoint))


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint, under the names it had before distributed training."""
    model = checkpoint.get("model", checkpoint)
    return {name.removeprefix("module."): tensor for name, tensor in model.items()}


def _load(head: nn.Module, state: Mapping[str, Tensor]) -> None:
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
            f"this checkpoint does not fit the head: {'; '.join(filter(None, problems))}. Set layers, width, qkv_dim, "
            "grid, num_frames, num_classes and the temporal modules of the head's Config as the checkpoint was trained."
        )
    head.load_state_dict(dict(state))


def _listed(what: str, items: Iterable[str], at_most: int = 3) -> str:
    """ "the head has no a, b, c and 7 more", or "" without items."""
    names = sorted(items)
    if not names:
        return ""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{what} {', '.join(names[:at_most])}{more}"
