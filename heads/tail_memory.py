"""How many bytes a training step of a head on a tail keeps for its backward pass, by what each block makes.

Per token of width D, with an MLP of m channels and H heads; a norm's input is float32, what products read and give is in the
dtype of products, row statistics are float32:

    norm        D + 2                     its input, mean and deviation; whether it is frozen or not
    attention   4 D, H                    queries, keys, values, what is mixed of them; logarithms of sums
    MLP         m                         what enters its activation
    trained     2 D + m more              what enters in_proj, c_fc and c_proj
    adapter     D + 2 r                   AIM's, of r channels: its input, both sides of its GELU

Below the first thing that is trained nothing is kept: cached tokens have no gradient. Classifier, frozen weights, gradients and
what an optimiser keeps come on top.
"""

from dataclasses import dataclass
from typing import Any

from vcache.heads.aim import AIM
from vcache.heads.tail import TailShape

_NORM_BYTES = 4
"""Of what a norm reads, and of sums over rows, under autocast too."""


@dataclass(frozen=True, kw_only=True)
class _Token:
    """Bytes that the parts of a block keep for one token."""

    width: int
    mlp_dim: int
    num_heads: int
    item_bytes: int

    @property
    def stream(self) -> int:
        return _NORM_BYTES * self.width

    @property
    def norm(self) -> int:
        return _NORM_BYTES * (self.width + 2)

    @property
    def attention(self) -> int:
        return self.item_bytes * 4 * self.width + _NORM_BYTES * self.num_heads

    @property
    def mlp(self) -> int:
        return self.item_bytes * self.mlp_dim

    def adapter(self, hidden: int) -> int:
        return self.item_bytes * (self.width + 2 * hidden)


def activation_bytes(config: Any, shape: TailShape, batch_size: int, item_bytes: int = 4) -> int:
    """What a step with `batch_size` clips keeps; `item_bytes` is of the dtype of products, 2 under autocast.

    With `config.checkpointing` it is what enters each block, and all of the one that is run again. Of a head that is not known
    here, only its blocks are counted.
    """
    block = shape.block
    token = _Token(width=block.width, mlp_dim=block.mlp_dim, num_heads=block.num_heads, item_bytes=item_bytes)
    blocks, inputs, needs = list[int](), list[int](), _place_of_embedding(config) != "none"
    for layer in config.layers_run:
        inputs.append(token.stream if needs else 0)
        kept, needs = _block_bytes(config, layer, token, needs)
        blocks.append(kept)
    last = token.stream if needs and config.classifier == "evl" else 0  # which reads all tokens
    stem = token.norm if _place_of_embedding(config) == "stem" else 0  # what enters ln_pre
    per_token = sum(inputs) + max(blocks) if config.checkpointing else sum(blocks)
    h, w = config.grid
    return batch_size * config.num_frames * (1 + h * w) * (stem + per_token + last)


def _place_of_embedding(config: Any) -> str:
    """Of what is trained below the lowest block: "none" is that nothing is."""
    return str(getattr(config, "temporal_embedding", "none"))


def _block_bytes(config: Any, layer: int, token: _Token, needs: bool) -> tuple[int, bool]:
    """Of one token in this block, and whether what leaves the block has a gradient; `needs`: whether what enters it has."""
    if isinstance(config, AIM.Config) and layer in config.adapted_layers:
        return _aim_bytes(config, token, needs)
    if _has_volume_adapters(config):
        return _volume_bytes(config, token, needs)
    frozen = 2 * token.norm + token.attention + token.mlp
    if getattr(config, "train_blocks", False):
        return frozen + token.item_bytes * (2 * token.width + token.mlp_dim), True
    return (frozen if needs else 0), needs


def _aim_bytes(config: AIM.Config, token: _Token, needs: bool) -> tuple[int, bool]:
    adapter, kept = token.adapter(int(config.bottleneck * config.width)), 0
    if config.temporal:
        kept += token.norm * needs
        if config.temporal_adapters == 2:
            kept, needs = kept + adapter, True
        kept, needs = kept + token.attention * needs + adapter, True
    kept += (token.norm + token.attention) * needs
    if config.spatial:
        kept, needs = kept + adapter, True
    kept += (token.norm + token.mlp) * needs
    if config.joint:
        kept, needs = kept + adapter, True
    return kept, needs


def _has_volume_adapters(config: Any) -> bool:
    return all(hasattr(config, name) for name in ("before_attention", "before_mlp", "hidden"))


def _volume_bytes(config: Any, token: _Token, needs: bool) -> tuple[int, bool]:
    """Convolutions in bottlenecks, before the attention and before the MLP; they read what enters them, in the stream."""
    adapter, kept = token.stream + 2 * token.item_bytes * config.hidden, 0
    if config.before_attention:
        kept, needs = kept + adapter, True
    kept += (token.norm + token.attention) * needs
    if config.before_mlp:
        kept, needs = kept + adapter, True
    return kept + (token.norm + token.mlp) * needs, needs
