"""Shift: some channels of each frame come from the frames beside it, inside the blocks of a CLIP that is trained.

    x[t] = [x[t+1][:f], x[t-1][f:2f], x[t][2f:]]         f channels from each side, zeros beyond the ends

tokens="patches" is ActionCLIP's in-network prompt (Wang et al. 2021, section 3.3; TemporalShift_VIT, modules/temporal_shift.py
at 31c34df, sallymmx/ActionCLIP): an eighth of the channels, of all tokens but CLS, before each block, its residual path
included. tokens="cls" is Text4Vis's TokenShift (modules/temporal_modeling.py at d61b34d, whwu95/Text4Vis): a quarter of the
channels, of CLS alone, before each block and again before its MLP. Neither has parameters.

It is not the frozen CLIP at initialisation: the shift is there from the first step, and the blocks are trained to live with
it. Both papers shift in all blocks and train all; here the top ones are run, shifted and trained. In ActionCLIP's Table 4 it
is far below prompts after the tower.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcache.heads.registry import register_head
from vcache.heads.requirements import Recipe
from vcache.heads.tail_block import TowerBlock
from vcache.heads.tail_head import TOWER_RATES, TailConfig, TailHead

ShiftedTokens = Literal["patches", "cls"]


@register_head("shift")
class Shift(TailHead):
    """Channels shifted over time in the top blocks of the backbone, which are trained."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TailConfig):
        tokens: ShiftedTokens = "patches"
        """Which tokens are shifted, and where: the patches before each block (ActionCLIP), or CLS there and before its MLP
        (Text4Vis's TokenShift)."""
        shift_div: int | None = None
        """A frame takes width/shift_div channels of the next frame and as many of the one before. None: 8 for patches, 4 for
        CLS, as official."""
        train_blocks: bool = True
        """As in the papers; false leaves blocks that never saw a shift."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.tokens not in (choices := get_args(ShiftedTokens)):
                raise ValueError(f"tokens ({self.tokens!r}) must be one of {', '.join(map(repr, choices))}")
            if not 2 <= self.divisor <= self.width:
                raise ValueError(f"shift_div ({self.shift_div}) must be between 2 and the width ({self.width})")

        @property
        def divisor(self) -> int:
            if self.shift_div is not None:
                return self.shift_div
            return 8 if self.tokens == "patches" else 4

    summary = "channels shifted over time in the top blocks of the backbone, which are trained"
    # ActionCLIP as coded: CLIP at a tenth of the rate of what comes after it.
    recipe = Recipe(
        lr=5e-5,
        weight_decay=0.2,
        betas=(0.9, 0.98),
        epochs=50,
        batch_size=128,
        warmup_epochs=5.0,
        warmup_start=0.0,
        schedule_every=10,
        lr_multipliers=TOWER_RATES,
    )

    def adapt_block(
        self, layer: int, block: TowerBlock, x: Float[Tensor, "B T N D"], wanted: int | None
    ) -> Float[Tensor, "B T M D"]:
        channels = self.config.width // self.config.divisor
        if self.config.tokens == "patches":
            return block(shift_frames(x, slice(1, None), channels), wanted)
        cls = slice(0, 1)
        x = shift_frames(x, cls, channels)
        x = x[:, :, :wanted] + block.attend(block.ln_1(x), wanted)
        x = shift_frames(x, cls, channels)
        return x + block.feed_forward(block.ln_2(x))


def shift_frames(x: Float[Tensor, "B T N D"], tokens: slice, channels: int) -> Float[Tensor, "B T N D"]:
    """Of these tokens the first `channels` are those of the next frame, the next `channels` those of the frame before."""
    return _Shift.apply(x, tokens, channels)


class _Shift(torch.autograd.Function):
    """One copy forward and one backward: the gradient is shifted the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: slice, channels: int) -> Tensor:
        ctx.tokens, ctx.channels = tokens, channels
        return _shifted(x, tokens, slice(0, channels), slice(channels, 2 * channels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        channels = ctx.channels
        return _shifted(grad, ctx.tokens, slice(channels, 2 * channels), slice(0, channels)), None, None


def _shifted(x: Tensor, tokens: slice, from_next: slice, from_previous: slice) -> Tensor:
    out = x.clone()
    out[:, :-1, tokens, from_next] = x[:, 1:, tokens, from_next]
    out[:, -1, tokens, from_next] = 0
    out[:, 1:, tokens, from_previous] = x[:, :-1, tokens, from_previous]
    out[:, 0, tokens, from_previous] = 0
    return out
