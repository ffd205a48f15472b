"""ST-Adapter: a depthwise 3D convolution in a bottleneck, added to the patches inside the blocks of a frozen CLIP.

Pan et al. 2022, "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning", arXiv 2206.13559; Adapter and
ResidualAttentionBlock, models_adapter.py at b914b38. CLS gets nothing of its own: it sees the adapted patches by attention.

    adapter(x) = x + fc2(conv(fc1(x)))          of the patches, as a volume of frames, rows and columns
    x = adapter(x)                              with `before_attention`
    x = x + MSA(ln_1(x))
    x = adapter(x)                              with `before_mlp`, another one
    x = x + MLP(ln_2(x))

At initialisation it is the frozen CLIP of each frame: the convolution starts at zero. As in the official code there is no
activation in the adapter. Here only the top blocks are run and adapted; the official code adapts all.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vcache.heads.registry import register_head
from vcache.heads.requirements import Recipe
from vcache.heads.tail_block import TowerBlock
from vcache.heads.tail_head import TailConfig, TailHead
from vcache.heads.temporal_conv import filter_adjoint, filter_frames, sum_in_float32, taps_gradient


@register_head("st-adapter")
class STAdapter(TailHead):
    """Spatio-temporal adapters in the top blocks of the frozen backbone."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TailConfig):
        before_mlp: bool = True
        """An adapter before the MLP of each block: "12x384" of the official models, for Kinetics-400."""
        before_attention: bool = False
        """Another before its attention: with both "24x384", for Something-Something v2."""
        adapter_width: int | None = None
        """Channels of the convolution. None: half of `width`, which is the 384 of ViT-B."""
        kernel: tuple[int, int, int] = (3, 1, 1)
        """Of the convolution: frames, rows, columns; odd. The official models have 3,1,1."""

        def __post_init__(self) -> None:
            super().__post_init__()
            object.__setattr__(self, "kernel", tuple(self.kernel))
            if len(self.kernel) != 3 or any(size < 1 or size % 2 == 0 for size in self.kernel):
                sizes = ",".join(map(str, self.kernel))
                raise ValueError(f"kernel ({sizes}) must be three odd numbers: frames, rows, columns")
            if not (self.before_mlp or self.before_attention):
                raise ValueError(
                    "before_mlp and before_attention are both false, which leaves no adapter; set one of them"
                )
            if self.hidden < 1:
                raise ValueError(f"adapter_width ({self.adapter_width}) must be at least 1")

        @property
        def hidden(self) -> int:
            return max(1, self.width // 2) if self.adapter_width is None else self.adapter_width

    summary = "depthwise convolutions over time in a bottleneck, in the top blocks of the backbone"
    # scripts/train_k400_clip_vit_b16_adapter12x384.sh and the defaults of main.py: 3 GPUs with 64 clips, 1e-3 per 256 clips.
    recipe = Recipe(
        lr=7.5e-4,
        weight_decay=0.01,
        epochs=12,
        batch_size=192,
        warmup_epochs=2.0,
        warmup_start=0.0,
        no_decay=("*.bias",),
        lr_multipliers=(("blocks.*", 0.1), ("classifier.proj", 0.1), ("*logit_scale", 0.1)),
    )
    trains_ln_post = False
    mean_first = True
    classifier_std = 0.02

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.adapters = nn.ModuleDict({str(layer): BlockAdapters(config) for layer in config.layers_run})

    def adapt_block(
        self, layer: int, block: TowerBlock, x: Float[Tensor, "B T N D"], wanted: int | None
    ) -> Float[Tensor, "B T M D"]:
        # All tokens, whatever is wanted: the adapter before the last MLP, which CLS does not see, is decayed as official.
        adapters = cast(BlockAdapters, self.adapters[str(layer)])
        if adapters.adapter_pre_attn is not None:
            x = adapters.adapter_pre_attn(x)
        x = x + block.attend(block.ln_1(x))
        if adapters.adapter_pre_mlp is not None:
            x = adapters.adapter_pre_mlp(x)
        return x + block.feed_forward(block.ln_2(x))


class BlockAdapters(nn.Module):
    """The adapters of one block, by their official names."""

    def __init__(self, config: STAdapter.Config) -> None:
        super().__init__()
        self.adapter_pre_attn = VolumeAdapter(config) if config.before_attention else None
        self.adapter_pre_mlp = VolumeAdapter(config) if config.before_mlp else None


class VolumeAdapter(nn.Module):
    """x + fc2(conv(fc1(x))) of the patches, which starts as x."""

    def __init__(self, config: STAdapter.Config) -> None:
        super().__init__()
        self.grid, hidden = config.grid, config.hidden
        self.fc1, self.fc2 = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)
        around: Any = tuple(size // 2 for size in config.kernel)
        self.conv = nn.Conv3d(hidden, hidden, config.kernel, padding=around, groups=hidden)
        for zero in (self.conv.weight, self.conv.bias, self.fc1.bias, self.fc2.bias):
            nn.init.zeros_(cast(Tensor, zero))

    def forward(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        added = self.fc2(self.convolve(self.fc1(x[:, :, 1:])))
        return x + F.pad(added, (0, 0, 1, 0))  # nothing for CLS

    def convolve(self, h: Float[Tensor, "B T P c"]) -> Float[Tensor, "B T P c"]:
        """The depthwise convolution of the patches as a volume, zeros around it."""
        weight, bias = self.conv.weight.to(h.dtype), cast(Tensor, self.conv.bias).to(h.dtype)
        if self.conv.kernel_size == (3, 1, 1):
            return _OverTime.apply(h, weight.flatten(1).T.contiguous(), bias)
        volume = h.unflatten(2, self.grid).permute(0, 4, 1, 2, 3)  # (B, c, T, h, w)
        out = F.conv3d(volume, weight, bias, padding=self.conv.padding, groups=self.conv.groups)
        return out.permute(0, 2, 3, 4, 1).flatten(2, 3)


class _OverTime(torch.autograd.Function):
    """Three products with neighbouring frames, without the copies that bring the channels to the front for a Conv3d."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, taps)
        return filter_frames(h, taps, bias.expand(h.shape[1], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, taps = ctx.saved_tensors
        of_taps, of_bias = taps_gradient(h, grad), sum_in_float32(grad, (0, 1, 2))
        return filter_adjoint(grad, taps), of_taps.to(taps.dtype), of_bias.to(taps.dtype)
