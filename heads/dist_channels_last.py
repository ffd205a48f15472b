"""DiST's steps with the channels of the temporal encoder last, the default; dist_plain.py has the same, under the same names."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.dist_integration import (
    AdaptivePooling,
    IBlock,
    Integration2Temporal,
    Temporal2Integration,
    with_lateral,
    without_affine,
)
from vcache.heads.dist_temporal import S, TBlock, stem
from vcache.heads.streamed_linear import streamed_linear

__all__ = ["add_down", "add_up", "before_pooling", "i_block", "pool", "read", "stem", "t_block", "z_by_patch"]


def t_block(block: TBlock, z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B F h w c"]:
    return block(z)


def read(linear: nn.Linear, tokens: Callable[[], Tensor], carried: Tensor | None) -> Float[Tensor, "B T N d"]:
    """M = FC(X) + R."""
    m = streamed_linear(tokens, linear.weight, linear.bias)
    return m if carried is None else m.add_(carried)


def i_block(block: IBlock, u: Float[Tensor, "B T N d"]) -> Float[Tensor, "B T N d"]:
    return block(u)


def add_down(
    lateral: Temporal2Integration, m: Float[Tensor, "B T N d"], z: Float[Tensor, "B F h w c"]
) -> Float[Tensor, "B T N d"]:
    """U = M + down(Z)."""
    return with_lateral(m, lateral, z)


def add_up(
    lateral: Integration2Temporal, m: Float[Tensor, "B T N d"], z: Float[Tensor, "B F h w c"]
) -> Float[Tensor, "B F h w c"]:
    """Z + up(M)."""
    return lateral(m, z)


def before_pooling(fused: Float[Tensor, "B T N d"]) -> Float[Tensor, "B T N d"]:
    return without_affine(fused)


def pool(
    pooling: AdaptivePooling, normed: Float[Tensor, "B T N d"], s: Float[Tensor, "B T d"], g: Float[Tensor, "B 1 d"]
) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B 1 d"]]:
    return pooling(normed, s, g)


def z_by_patch(z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B F P c"]:
    """Z as vcache shows it."""
    return z.flatten(2, 3) / S
