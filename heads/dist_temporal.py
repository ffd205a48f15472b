"""DiST's temporal encoder: its stem and the four T-Blocks of Table 1c, with the channels last.

The encoder runs on s*Z, s = 1.702, because QuickGELU(x) = silu(s x) / s: one pass of a fused function, and s goes into weights.
LayerNorm gives the same of s*Z with eps * s^2. In all blocks n = LN(Z), channels and grid stay:

    r2plus1d    Z = QuickGELU(Z + Conv(1,3,3)(QuickGELU(Conv(3,1,1) n)))    as released; the others are in the paper alone
    c3d         Z = QuickGELU(Z + Conv(3,3,3) n)                            one convolution has the 168.2 GFLOPs of Table 1c
    tada        Z = QuickGELU(Z + Conv(1,3,3)(a n))                         a per frame and channel; 162.0 likewise
    joint       Z = Z + MHA(n);  Z = Z + MLP(LN(Z))                         over all frames and patches; MLP 4 times as wide

tada is TAdaConv (Huang et al. 2022; RouteFuncMLP and TAdaConv2d, models/module_zoo/branches/tada_branch.py), which scales the
input channels of the weights for each frame: a = 1 + Conv(3)(ReLU(LN(Conv(3)(v + W g)))) along the frames, v the mean of n
over a frame and g over the clip, with a quarter of the channels between. The last convolution has no bias and starts at zero,
and so the block as one with an ordinary convolution. Differs: LN in place of their batch norm, so that clips do not mix, as in
their own later RouteFuncMLPLnGelu; and the convolution has a bias, which is not scaled: theirs leaves it to the batch norm
behind. The average pooling in time beside it is TAda2D's, the network's, and not here.
joint is the block of VideoMAE (Tong et al. 2022) with what the other blocks here have: QuickGELU in place of GELU, a bias for the
keys, which cancels in the softmax, no drop path. It has attention heads of 32 channels, and no positions: VideoMAE adds them to
the tokens before its first block, and the paper says nothing of it. With 16 frames of 14 x 14 it takes 22.7 GMACs more than
r2plus1d; the 165.0 GFLOPs of Table 1c cannot be those of full attention.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vcache.heads.dist_config import DiSTConfig
from vcache.heads.quick_gelu import QUICK_GELU_SCALE, QuickGELU
from vcache.heads.recomputed import Convolution, Linear, recomputed
from vcache.heads.streamed_linear import streamed_linear

S = QUICK_GELU_SCALE
"""The encoder runs on S*Z."""
PIXEL_UNIT = 2.0**-8
"""Pixels times this are exact in float16 and bfloat16, and below 1."""


def stem(
    conv: nn.Conv3d, pixels: UInt8[Tensor, "B F height width 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "B F h w c"]:
    """S times the 3-D convolution of the normalised pixels: patches times the weights of 5 frames, summed over the frames.

    The normalisation is in the weights, and what it subtracts in a bias. Frames beyond the clip are zero AFTER it, and so
    have no part in the bias either.
    """
    p, num_taps = conv.kernel_size[1], conv.kernel_size[0]
    per_channel = (1, 3, 1, 1, 1)
    std_, mean_ = (conv.weight.new_tensor(x).view(per_channel) for x in (std, mean))
    weight = conv.weight * (S / std_)  # (c, 3, 5, p, p), of pixels from 0 to 1
    offsets = -(weight * mean_).sum(dim=(1, 3, 4)).mT  # (5, c)
    rows = (weight / (255 * PIXEL_UNIT)).permute(2, 0, 3, 4, 1).flatten(2).flatten(0, 1)  # (5*c, p*p*3)
    grid = pixels.shape[2] // p, pixels.shape[3] // p

    def patches(some: Tensor) -> Tensor:
        cut = some.unflatten(3, (grid[1], p)).unflatten(2, (grid[0], p)).transpose(3, 4)  # (b, F, h, w, p, p, 3)
        return cut.flatten(4).flatten(2, 3) * PIXEL_UNIT

    y = streamed_linear(lambda: pixels, rows, as_rows=patches)
    z = _ShiftedSum.apply(y.unflatten(-1, (num_taps, -1)))
    assert conv.bias is not None
    bias = S * conv.bias + _ShiftedSum.apply(offsets.expand(1, z.shape[1], 1, -1, -1))  # (1, F, 1, c)
    return (z + bias).unflatten(2, grid)


class _ShiftedSum(torch.autograd.Function):
    """out[t] = sum_k y[t + k - taps//2, k], of y (B, F, P, taps, c), over the frames that there are; float32 at least."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        out = y.new_zeros(*y.shape[:3], y.shape[4], dtype=torch.promote_types(y.dtype, torch.float32))
        for k, (to, of) in enumerate(_taps(y.shape)):
            out[:, to] += y[:, of, :, k]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        d_y = d_out.new_zeros(ctx.shape, dtype=ctx.dtype)
        for k, (to, of) in enumerate(_taps(ctx.shape)):
            d_y[:, of, :, k] = d_out[:, to]
        return d_y


def _taps(shape: torch.Size) -> list[tuple[slice, slice]]:
    """Of each tap: which frames get something, and of which."""
    F, shifts = shape[1], [k - shape[3] // 2 for k in range(shape[3])]
    return [(slice(max(0, -s), max(0, F - max(0, s))), slice(max(0, s), max(0, F - max(0, -s)))) for s in shifts]


def weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return weight, bias


def _norm_of(norm: nn.LayerNorm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """LN(Z) of S*Z, gain and bias."""
    shape, eps = norm.normalized_shape, norm.eps * S**2
    return lambda z, gain, bias: F.layer_norm(z, shape, gain.to(z.dtype), bias.to(z.dtype), eps)


class R2Plus1D(nn.Module):
    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        dim = config.temporal_dim
        self.temporal_net = nn.Sequential(
            OrderedDict(
                c_fc1=nn.Conv3d(dim, dim, (3, 1, 1), padding=(1, 0, 0)),
                gelu1=QuickGELU(),
                c_fc2=nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1)),
            )
        )
        self.ln = nn.LayerNorm(dim)
        self.gelu = QuickGELU()

    def forward(self, z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B F h w c"]:
        """S*Z to S*Z."""
        (W_time, b_time), (W_space, b_space) = weights(self.temporal_net[0]), weights(self.temporal_net[2])
        in_time = Convolution(padding=(1, 0)), S * W_time.squeeze(-1), S * b_time
        (a,) = recomputed(_norm_of(self.ln), (z.flatten(2, 3), self.ln.weight, self.ln.bias), in_time)
        a = a.unflatten(2, z.shape[2:4]).flatten(0, 1)  # (B*F, h, w, c)
        (y,) = recomputed(F.silu, (a,), (Convolution(padding=(1, 1)), W_space.squeeze(2), S * b_space))
        return F.silu(z + y.unflatten(0, z.shape[:2]))


class C3D(nn.Module):
    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        dim = config.temporal_dim
        self.conv = nn.Conv3d(dim, dim, 3, padding=1)
        self.ln = nn.LayerNorm(dim)

    def forward(self, z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B F h w c"]:
        """Three convolutions in space at once, whose results are summed over the frames."""
        weight = S * self.conv.weight.permute(2, 0, 1, 3, 4).flatten(0, 1)  # (3*c, c, 3, 3)
        (y,) = recomputed(
            _norm_of(self.ln),
            (z.flatten(0, 1), self.ln.weight, self.ln.bias),
            (Convolution(padding=(1, 1)), weight, None),
        )
        taps = y.unflatten(0, z.shape[:2]).flatten(2, 3).unflatten(-1, (3, -1))  # (B, F, h*w, 3, c)
        assert self.conv.bias is not None
        return F.silu(z + _ShiftedSum.apply(taps).view_as(z) + S * self.conv.bias)


class TAda(nn.Module):
    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        dim, inner = config.temporal_dim, max(1, config.temporal_dim // 4)
        self.conv = nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1))
        self.calibration = nn.ModuleDict(
            {
                "clip": nn.Linear(dim, dim),
                "in": nn.Conv1d(dim, inner, 3, padding=1),
                "ln": nn.LayerNorm(inner),
                "out": nn.Conv1d(inner, dim, 3, padding=1, bias=False),
            }
        )
        self.ln = nn.LayerNorm(dim)
        self.start_as_convolution()

    def start_as_convolution(self) -> None:
        nn.init.zeros_(cast(nn.Conv1d, self.calibration["out"]).weight)

    def factors(self, frames: Float[Tensor, "B F c"]) -> Float[Tensor, "B F c"]:
        """Of the weights' input channels, from the mean of each frame."""
        context = frames + self.calibration["clip"](frames.mean(dim=1, keepdim=True))
        hidden = self.calibration["ln"](self.calibration["in"](context.mT).mT).relu()
        return 1 + self.calibration["out"](hidden.mT).mT

    def forward(self, z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B F h w c"]:
        n = _norm_of(self.ln)(z, self.ln.weight, self.ln.bias)
        factors = self.factors(n.mean(dim=(2, 3))).to(n.dtype)
        weight, bias = weights(self.conv)
        (y,) = recomputed(
            lambda n, factors: (n * factors[:, :, None, None]).flatten(0, 1),
            (n, factors),
            (Convolution(padding=(1, 1)), S * weight.squeeze(2), S * bias),
        )
        return F.silu(z + y.unflatten(0, z.shape[:2]))


class Joint(nn.Module):
    def __init__(self, config: DiSTConfig) -> None:
        super().__init__()
        dim = config.temporal_dim
        self.num_heads = config.num_joint_heads
        self.ln, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(dim, 4 * dim), gelu=QuickGELU(), c_proj=nn.Linear(4 * dim, dim))
        )

    def forward(self, z: Float[Tensor, "B F h w c"]) -> Float[Tensor, "B F h w c"]:
        flat = z.flatten(1, 3)
        (qkv,) = recomputed(
            _norm_of(self.ln),
            (flat, self.ln.weight, self.ln.bias),
            (Linear(), self.in_proj.weight, self.in_proj.bias),
        )
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, F*h*w, 32)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        flat = flat + F.linear(mixed, S * self.out_proj.weight, S * self.out_proj.bias)
        (W_1, b_1), (W_2, b_2) = weights(self.mlp[0]), weights(self.mlp[2])
        second = (flat, self.ln_2.weight, self.ln_2.bias)
        (hidden,) = recomputed(_norm_of(self.ln_2), second, (Linear(), S * W_1, S * b_1))
        (y,) = recomputed(F.silu, (hidden,), (Linear(), W_2, S * b_2))
        return (flat + y).view_as(z)


TBlock = R2Plus1D | C3D | TAda | Joint
T_BLOCKS: dict[str, type[TBlock]] = {"r2plus1d": R2Plus1D, "c3d": C3D, "tada": TAda, "joint": Joint}
