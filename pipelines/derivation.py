"""`--cross-frame derive`: the store keeps what enters a block and the block's frozen weights; the device makes Q/K of them.

What enters block i > 0 is the output of block i-1, `tokens/<i-1>`, which is often stored anyway; of block 0 it is the stem,
`block_input/0`, which `--layers stem` stores by itself. The weights are constants of the store: 4.7 MB per layer of ViT-B/16,
once for all videos.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vcache.heads.query_key import QueryKeyProjection
from vcache.store.constants import Constant
from vcache.store.reader import FeatureStore

STEM_ARRAY = "block_input/0"

_WEIGHTS = {
    "ln_1_weight": ("channel",),
    "ln_1_bias": ("channel",),
    "qk_weight": ("feature", "channel"),
    "qk_bias": ("feature",),
}


def input_array(layer: int) -> str:
    """The array that holds what enters the block."""
    return f"tokens/{layer - 1}" if layer else STEM_ARRAY


def constant_names(layer: int) -> tuple[str, ...]:
    """The constants that hold the block's weights."""
    return tuple(f"blocks/{layer}/{name}" for name in _WEIGHTS)


def projection_constants(
    weights_of: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]], layers: Iterable[int]
) -> dict[str, Constant]:
    """The frozen weights of these blocks, as the store keeps them: float32, queries before keys.

    `weights_of` is `FrozenBackbone.query_key_weights`, and not the backbone: trainings load this file, and need no open_clip.
    """
    constants: dict[str, Constant] = {}
    for layer in layers:
        for name, tensor in zip(constant_names(layer), weights_of(layer), strict=True):
            dims = _WEIGHTS[name.rsplit("/", 1)[1]]
            constants[name] = Constant(dims, tensor.detach().cpu().float().numpy())
    return constants


def load_projection(store: FeatureStore, layer: int, device: torch.device) -> QueryKeyProjection:
    """The block's weights on the device.

    Raises:
        ArrayNotFound, CorruptStore: the store does not hold them, or they are damaged.
    """
    facts = store.manifest.facts["backbone"]
    ln_weight, ln_bias, weight, bias = (
        torch.tensor(store.constant(name), device=device) for name in constant_names(layer)
    )
    return QueryKeyProjection(ln_weight, ln_bias, weight, bias, facts["num_heads"], facts["layer_norm_eps"])
