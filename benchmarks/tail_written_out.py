"""AIM's block as the paper's eq. 2-4 and torch's modules have it, for tail.py: nn.MultiheadAttention on (sequence, batch, D).

Nothing is shared with vcache but the weights: tokens are laid out again before each attention, and autograd keeps what it likes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vcache.heads.aim import AIM, BlockAdapters
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail_block import TowerBlock


class WrittenOut(nn.Module):
    """The head with blocks of its own; what is trained is that of the head it is given."""

    def __init__(self, head: AIM) -> None:
        super().__init__()
        self.head = head
        adapters: Any = head.adapters
        pairs = zip(head.config.layers_run, head.tower_blocks(), strict=True)
        self.blocks = nn.ModuleList(WrittenOutBlock(block, adapters[str(layer)]) for layer, block in pairs)

    def forward(self, features: ClipFeatures) -> Tensor:
        x = self.head.enter(self.head.read(features))
        for block in self.blocks:
            x = block(x)
        return self.head.classify_embedding(self.head.ln_post(x[:, :, 0]).mean(dim=1))

    def trained(self) -> Iterable[nn.Parameter]:
        return self.head.parameters()


class WrittenOutBlock(nn.Module):
    def __init__(self, block: TowerBlock, adapters: BlockAdapters) -> None:
        super().__init__()
        self.adapters, self.ln_1, self.ln_2 = adapters, block.ln_1, block.ln_2
        self.attn = nn.MultiheadAttention(block.shape.width, block.shape.num_heads)
        self.attn.load_state_dict({name: x.float() for name, x in block.attn.state_dict().items()})
        self.attn.requires_grad_(False).to(block.ln_1.weight.device)
        self.fc, self.proj = block.mlp.c_fc, block.mlp.c_proj

    def forward(self, x: Tensor) -> Tensor:
        B, T, N, D = x.shape
        own = self.adapters
        over_time = self.ln_1(x).permute(1, 0, 2, 3).reshape(T, B * N, D)
        mixed = self.attend(over_time).reshape(T, B, N, D).permute(1, 0, 2, 3)
        x = x + own.T_Adapter(mixed)
        frames = self.ln_1(x).permute(2, 0, 1, 3).reshape(N, B * T, D)
        mixed = self.attend(frames).reshape(N, B, T, D).permute(1, 2, 0, 3)
        x = x + (mixed + own.S_Adapter(mixed))
        h = self.ln_2(x)
        hidden = self.fc(h)
        return x + self.proj(hidden * torch.sigmoid(1.702 * hidden)) + own.scale * own.MLP_Adapter(h)

    def attend(self, h: Tensor) -> Tensor:
        return self.attn(h, h, h, need_weights=False)[0]
