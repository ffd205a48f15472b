"""How many bytes a training step of a head on a tail keeps for its backward pass, by what each block makes.

Per token of width D, with an MLP of m channels and H heads; a norm's input is float32, what products read and give is in the
dtype of products, row statistics are float32:

    norm        D + 2                     its input, mean and deviation; whether it is frozen or not
    attention   4 D, H                    queries, keys, values, what is mixed of them; logarithms of sums
    MLP         m                         what enters its activation
    trained     2 D + m more              what enters in_proj, c_fc and c_proj
    adapter     D + 2 r                   AIM's, of r channels: its input, both sides of its GELU

Of the last block only CLS is made behind keys and values, where nothing else is read. Below the first thing that is trained
nothing is kept: cached tokens have no gradient. Classifier, frozen weights, gradients and what an optimiser keeps come on top.
"""

from dataclasses import dataclass, replace

from vcache.heads.aim import AIM
from vcache.heads.st_adapter import STAdapter
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_head import TailConfig
from vcache.heads.tokent1d import TokenT1D

_NORM_BYTES = 4
"""Of what a norm reads, and of sums over rows, under autocast too."""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Bytes that the parts of a block keep for one frame."""

    num_tokens: int
    wanted: int
    """Tokens of which the attention's queries, and what comes behind it, are made: all but in the last block."""
    width: int
    mlp_dim: int
    num_heads: int
    item_bytes: int

    @property
    def stream(self) -> int:
        return self.num_tokens * _NORM_BYTES * self.width

    def norm(self, num_tokens: int) -> int:
        return num_tokens * _NORM_BYTES * (self.width + 2)

    def attention(self, wanted: int) -> int:
        of_queries = wanted * (self.item_bytes * 2 * self.width + _NORM_BYTES * self.num_heads)
        return of_queries + self.num_tokens * self.item_bytes * 2 * self.width

    @property
    def mlp(self) -> int:
        return self.wanted * self.item_bytes * self.mlp_dim

    def adapter(self, hidden: int, num_tokens: int) -> int:
        return num_tokens * self.item_bytes * (self.width + 2 * hidden)


def activation_bytes(config: TailConfig, block: BlockShape, batch_size: int, item_bytes: int = 4) -> int:
    """What a step with `batch_size` clips keeps; `item_bytes` is of the dtype of products, 2 under autocast.

    With `config.checkpointing` it is what enters each block, and all of the one that is run again. Of a head that is not known
    here, only its blocks are counted.
    """
    h, w = config.grid
    frame = _Frame(
        num_tokens=1 + h * w,
        wanted=1 + h * w,
        width=block.width,
        mlp_dim=block.mlp_dim,
        num_heads=block.num_heads,
        item_bytes=item_bytes,
    )
    blocks, inputs, needs = list[int](), list[int](), _place_of_embedding(config) != "none"
    for layer in config.layers_run:
        inputs.append(frame.stream if needs else 0)
        only_cls = layer == config.layers_run[-1] and block.class_token and reads_cls_alone(config)
        kept, needs = _block_bytes(config, layer, replace(frame, wanted=1) if only_cls else frame, needs)
        blocks.append(kept)
    last = frame.stream if needs and config.classifier == "evl" else 0  # which reads all tokens
    stem = frame.norm(frame.num_tokens) if _place_of_embedding(config) == "stem" else 0  # what enters ln_pre
    per_frame = sum(inputs) + max(blocks) if config.checkpointing else sum(blocks)
    return batch_size * config.num_frames * (stem + per_frame + last)


def reads_cls_alone(config: TailConfig) -> bool:
    """Whether of the last block CLS alone is made, as nothing reads its patches (TailHead.embed)."""
    return config.classifier != "evl" and not isinstance(config, STAdapter.Config)


def _place_of_embedding(config: TailConfig) -> str:
    """Of what is trained below the lowest block: "none" is that nothing is."""
    return config.temporal_embedding if isinstance(config, AIM.Config) else "none"


def _block_bytes(config: TailConfig, layer: int, frame: _Frame, needs: bool) -> tuple[int, bool]:
    """Of one frame in this block, and whether what leaves the block has a gradient; `needs`: whether what enters it has."""
    needs = needs or config.train_blocks
    read_over_time, read_by_mlp = 0, frame.wanted
    if isinstance(config, AIM.Config) and layer in config.adapted_layers:
        kept, needs = _aim_bytes(config, frame, needs)
        read_over_time = config.temporal * frame.num_tokens
        read_by_mlp -= config.joint * frame.wanted  # its adapter keeps the same
    elif isinstance(config, STAdapter.Config):
        kept, needs = _volume_bytes(config, frame, needs)
    else:
        needs = needs or isinstance(config, TokenT1D.Config)  # whose convolution comes first
        kept = needs * (_attention_part(frame) + _mlp_part(frame))
    if config.train_blocks:
        entering = (frame.num_tokens + read_over_time + read_by_mlp) * frame.width + frame.wanted * frame.mlp_dim
        kept += frame.item_bytes * entering
    return kept, needs


def _attention_part(frame: _Frame) -> int:
    return frame.norm(frame.num_tokens) + frame.attention(frame.wanted)


def _mlp_part(frame: _Frame) -> int:
    return frame.norm(frame.wanted) + frame.mlp


def _aim_bytes(config: AIM.Config, frame: _Frame, needs: bool) -> tuple[int, bool]:
    hidden, kept = int(config.bottleneck * config.width), 0
    if config.temporal:
        kept += frame.norm(frame.num_tokens) * needs
        adapter = frame.adapter(hidden, frame.num_tokens)
        if config.temporal_adapters == 2:
            kept, needs = kept + adapter, True
        kept, needs = kept + frame.attention(frame.num_tokens) * needs + adapter, True
    kept += _attention_part(frame) * needs
    if config.spatial:
        kept, needs = kept + frame.adapter(hidden, frame.wanted), True
    kept += _mlp_part(frame) * needs
    if config.joint:
        kept, needs = kept + frame.adapter(hidden, frame.wanted), True
    return kept, needs


def _volume_bytes(config: STAdapter.Config, frame: _Frame, needs: bool) -> tuple[int, bool]:
    """Convolutions in bottlenecks, before the attention and before the MLP; they read what enters them, in the stream."""
    adapter, kept = frame.stream + 2 * frame.num_tokens * frame.item_bytes * config.hidden, 0
    if config.before_attention:
        kept, needs = kept + adapter, True
    kept += _attention_part(frame) * needs
    if config.before_mlp:
        kept, needs = kept + adapter, True
    return kept + _mlp_part(frame) * needs, needs
