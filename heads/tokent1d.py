"""TokenT1D: the CLS tokens are convolved over time inside the blocks of a CLIP that is trained.

Wu et al. 2023 (Text4Vis); TokenT1D, modules/temporal_modeling.py, and ResidualAttentionBlock, clip/model.py at d61b34d
(whwu95/Text4Vis), where it is the option tm="tokent1d" of the tower. In each block, twice the same convolution:

    cls = conv(cls);  x = x + MSA(ln_1(x))         depthwise over three frames, no bias, zeros beyond the ends
    cls = conv(cls);  x = x + MLP(ln_2(x))

With init="shift", as there, the convolution starts as a shift, so that the tower is not the frozen CLIP at initialisation, and
its blocks are trained to live with it. The official code has it in all blocks and trains all; here in the top ones, which are
run and trained.
"""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.registry import register_head
from vcache.heads.requirements import Recipe
from vcache.heads.tail_block import TowerBlock
from vcache.heads.tail_head import TOWER_RATES, TailConfig, TailHead

TokenConvInit = Literal["shift", "identity"]


@register_head("tokent1d")
class TokenT1D(TailHead):
    """Convolutions of CLS over time in the top blocks of the backbone, which are trained."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TailConfig):
        init: TokenConvInit = "shift"
        """What the convolutions start as: a shift of a quarter of the channels each way, or the identity ("fixed" in the official
        code), with which the head is CLIP itself at initialisation."""
        shift_div: int = 4
        """With init="shift": width/shift_div channels begin as those of the next frame, as many as those of the one before."""
        train_blocks: bool = True
        """As in the paper; false trains the convolutions, ln_post and the classifier alone."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.init not in (choices := get_args(TokenConvInit)):
                raise ValueError(f"init ({self.init!r}) must be one of {', '.join(map(repr, choices))}")
            if not 2 <= self.shift_div <= self.width:
                raise ValueError(f"shift_div ({self.shift_div}) must be between 2 and the width ({self.width})")

    summary = "CLS convolved over time in the top blocks of the backbone, which are trained"
    # Text4Vis as coded: the whole tower, these convolutions too, at a tenth of the rate of what comes after it.
    recipe = Recipe(
        lr=5e-5,
        weight_decay=0.2,
        epochs=30,
        batch_size=256,
        warmup_epochs=5.0,
        warmup_start=0.0,
        schedule_every=10,
        lr_multipliers=(("control_points.*", 0.1), *TOWER_RATES),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.control_points = nn.ModuleDict({str(layer): TokenConv(config) for layer in config.layers_run})

    def adapt_block(
        self, layer: int, block: TowerBlock, x: Float[Tensor, "B T N D"], wanted: int | None
    ) -> Float[Tensor, "B T M D"]:
        control_point = cast(TokenConv, self.control_points[str(layer)])
        x = control_point(x)
        x = x[:, :, :wanted] + block.attend(block.ln_1(x), wanted)
        x = control_point(x)
        return x + block.feed_forward(block.ln_2(x))


class TokenConv(nn.Module):
    """The CLS tokens, convolved over the frames of their clip; the patches as they are."""

    def __init__(self, config: TokenT1D.Config) -> None:
        super().__init__()
        D, fold = config.width, config.width // config.shift_div
        self.conv = nn.Conv1d(D, D, kernel_size=3, padding=1, groups=D, bias=False)
        shifted = fold if config.init == "shift" else 0
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:shifted, 0, 2] = 1  # of the next frame
            self.conv.weight[shifted : 2 * shifted, 0, 0] = 1  # of the frame before
            self.conv.weight[2 * shifted :, 0, 1] = 1

    def forward(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        weight = self.conv.weight.to(x.dtype)
        cls = x[:, :, 0].mT.contiguous()  # a view would keep all of x for the backward pass
        convolved = F.conv1d(cls, weight, padding=1, groups=len(weight)).mT
        return torch.cat([convolved.unsqueeze(2).to(x.dtype), x[:, :, 1:]], dim=2)
