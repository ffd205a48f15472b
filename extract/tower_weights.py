"""The weights of one tower, read out of a checkpoint of any form without running what is in it."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from vcache.extract.torchscript import is_torchscript, read_torchscript
from vcache.extract.weights import Architecture, NoTextTower, RandomWeightsRefused, activation_mismatch, first_line

# Numbers that OpenAI keeps among its weights, and nobody else does: such a state dict is OpenAI's, so QuickGELU.
_OPENAI_NAMES = {"input_resolution", "context_length", "vocab_size"}
# Where training scripts keep the state dict: open_clip's, and those that tune CLIP on videos.
_CONTAINERS = ("state_dict", "model_state_dict")
# open_clip's CLIP has the text tower beside `visual`, its CustomTextCLIP in `text`.
_TOWERS = {
    "image": ("visual.",),
    "text": (
        "text.",
        "token_embedding.",
        "positional_embedding",
        "transformer.",
        "ln_final.",
        "text_projection",
        "logit_scale",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one tower in a file."""

    path: Path
    weights: dict[str, Tensor]
    """float32, under the names of the tower ("visual." or "text." removed)."""
    quick_gelu: bool | None
    """What the file says about the activation; None: state dicts say nothing."""


def read_checkpoint(path: Path, tower: Literal["image", "text"] = "image") -> Checkpoint:
    """One tower in a .safetensors file, a state dict or training checkpoint of torch, or a TorchScript archive.

    Of .safetensors and TorchScript only that tower is read; of the others the rest is dropped on return. Code that a file
    holds is not run, and a file that cannot be read without is refused.

    Raises:
        RandomWeightsRefused: the file cannot be read, or holds no image tower under open_clip's names.
        NoTextTower: it holds no text tower under them.
    """
    try:
        state, quick_gelu = _read_state(path, _TOWERS[tower])
    # A file that is something else makes the readers raise nearly anything.
    except Exception as error:
        raise RandomWeightsRefused(f"{path} cannot be read as a checkpoint: {_why_unread(error)}.") from error
    weights = {
        name.removeprefix("visual.").removeprefix("text."): tensor.detach().float()
        for name, tensor in state.items()
        # OpenAI's archive keeps the causal mask among the tensors of each block.
        if name.startswith(_TOWERS[tower]) and not name.endswith("attn_mask")
    }
    if not weights and tower == "text":
        raise NoTextTower(
            f"{path} holds no text tower under open_clip's names (token_embedding.weight, transformer.*)."
        )
    if not weights:
        raise RandomWeightsRefused(
            f"{path} holds no image tower under open_clip's names (visual.*): pass a checkpoint of open_clip or OpenAI."
        )
    return Checkpoint(path=path, weights=weights, quick_gelu=quick_gelu)


def misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What differs in names and shapes, with one example of each kind; empty if nothing does."""
    missing, left_over = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    reshaped = [
        f"{name} is {list(given[name].shape)}, not {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & given.keys())
        if wanted[name].shape != given[name].shape
    ]
    kinds = (
        (missing, "missing"),
        (left_over, "left over"),
        (reshaped, "of another shape"),
    )
    return ", ".join(f"{len(found)} {kind} ({found[0]})" for found, kind in kinds if found)


def check_activation(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Raise ActivationMismatch if the file tells of another GELU than the model computes."""
    if checkpoint.quick_gelu not in (None, architecture.quick_gelu):
        raise activation_mismatch(
            architecture.name, f"the weights in {checkpoint.path}", trained_with_quick_gelu=bool(checkpoint.quick_gelu)
        )


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and little-endian bytes by sorted name: equal for any file format and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype.name} {list(values.shape)}\n".encode())
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _read_state(path: Path, prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], bool | None]:
    """Names and tensors of a file, of most files those with one of the prefixes; and whether it is QuickGELU where it tells."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}, None  # noqa: SIM118
    if is_torchscript(path):
        tensors, class_names = read_torchscript(path, prefixes)
        return tensors, "QuickGELU" in class_names
    state = _plain_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return state, True if state.keys() >= _OPENAI_NAMES else None


def _plain_state_dict(loaded: dict[str, Any]) -> dict[str, Tensor]:
    """Out of a training checkpoint, and without the prefix that data-parallel training adds."""
    state = next((loaded[name] for name in _CONTAINERS if name in loaded), loaded)
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def _why_unread(error: Exception) -> str:
    """torch's own advice, to load the file with its safety off, is left out."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {found[1]}, which only running code of the file could make, and vcache runs none"
    return first_line(error).split(". ")[0]
