"""The top k blocks of the frozen backbone, which a head runs on the cached tokens that enter them.

    x = cached tokens of layer N-k-1       (B, T, N, D); of k = all blocks, what leaves ln_pre: the stem
    x = block(x)                           blocks N-k .. N-1; a head may put something of its own between their parts
    embed = ln_post(x[cls]) @ proj         of a backbone without a class token: what its attention pool makes of ln_post(patches)

With nothing put between, embed is that of the backbone itself. The tail is given to a head by `set_tail`, and is no part of it:
neither its parameters nor its state dict hold it, and heads that are trained side by side share one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.tail_block import BlockShape, TowerBlock
from vcache.heads.tail_pool import AttentionPool
from vcache.heads.tail_stem import StemShape, TailStem


@dataclass(frozen=True, kw_only=True)
class TailShape:
    """What the weights of a tail do not tell."""

    num_layers: int
    """Blocks of the whole tower."""
    num_blocks: int
    """Those at its top that are there."""
    block: BlockShape
    embed_dim: int | None
    """None: there is no proj, as official checkpoints of AIM have none."""
    proj_bias: bool = False
    """EVA-CLIP's projection has one. A backbone without a class token has no projection, and `proj` changes nothing there."""
    stem: StemShape | None = None
    """Where the patch embedding below block 0 is there."""

    def __post_init__(self) -> None:
        if self.stem is not None and self.num_blocks != self.num_layers:
            raise ValueError(f"a stem is below all {self.num_layers} blocks, and the tail has {self.num_blocks}")


class FrozenTail(nn.Module):
    """The top blocks, ln_post and proj of one backbone: in evaluation mode, without gradients, whatever is called on it."""

    weights_sha256: str = ""
    """Of the whole image tower that they are of, where that is known."""

    def __init__(self, shape: TailShape) -> None:
        super().__init__()
        self.shape = shape
        width, eps = shape.block.width, shape.block.layer_norm_eps
        first = shape.num_layers - shape.num_blocks
        self.blocks = nn.ModuleDict({str(i): TowerBlock(shape.block) for i in range(first, shape.num_layers)})
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.pool = None if shape.block.class_token else AttentionPool(shape.block)
        self.proj = None if shape.embed_dim is None else nn.Parameter(torch.empty(width, shape.embed_dim))
        has_bias = shape.embed_dim is not None and shape.proj_bias
        self.proj_bias = nn.Parameter(torch.zeros(shape.embed_dim or 0)) if has_bias else None
        self.stem = None if shape.stem is None else TailStem(shape.stem, width, eps)
        self.requires_grad_(False).eval()

    @classmethod
    def of(
        cls, shape: TailShape, weights: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float32
    ) -> "FrozenTail":
        """With copies of these weights, by the names of `state_dict`; those of products in `dtype`, or with None in their own,
        and those of LayerNorms in float32."""
        with torch.device("meta"):
            tail = cls(shape)
        dtypes = {name: torch.float32 if _is_norm(name) else dtype or x.dtype for name, x in weights.items()}
        kept = {name: x.to(dtypes[name], copy=True) for name, x in weights.items()}
        tail.load_state_dict(kept, strict=True, assign=True)
        return tail.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenTail":
        """Stays in evaluation mode."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTail":
        """Itself: copies of a head share it."""
        return self

    def top(self, num_blocks: int) -> Sequence[TowerBlock]:
        """The last so many of its blocks, the lowest first.

        Raises:
            ValueError: it has fewer.
        """
        blocks: list[Any] = list(self.blocks.values())
        if num_blocks > len(blocks):
            raise ValueError(f"the head runs the top {num_blocks} blocks, and the tail has {len(blocks)}")
        return blocks[len(blocks) - num_blocks :]

    @torch.no_grad()
    def embed(self, x: Float[Tensor, "B T N D"], num_blocks: int) -> Float[Tensor, "B T E"]:
        """The backbone's own embedding of what enters its top blocks: nothing is put between.

        Raises:
            ValueError: the tail has no proj.
        """
        if self.proj is None:
            raise ValueError("the tail has no proj, so it makes no embeddings")
        for block in self.top(num_blocks):
            x = block(x)
        if self.pool is not None:
            return self.pool(self.ln_post(x[..., 1:, :]))
        return self.shifted(self.ln_post(x[..., 0, :]) @ self.proj.to(x.dtype))

    def shifted(self, y: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """What the projection gives, with the bias that it may have: in the space of the backbone's embeddings."""
        return y if self.proj_bias is None else y + self.proj_bias.to(y.dtype)


def _is_norm(name: str) -> bool:
    """Whether it is a parameter of a LayerNorm, or the angles of a rotation: both are computed in float32."""
    return f".{name}".split(".")[-2].startswith("ln") or name.endswith(".rope")
