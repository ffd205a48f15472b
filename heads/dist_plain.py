"""DiST as its paper and its released code write it: the reference that the default formulation is tested against.

Channels come first in the temporal encoder, every layer of the network is one of torch's, and autograd keeps what it wants. The
parameters are those of the default formulation. `DiSTConfig(formulation="plain")` runs it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.dist_integration import AdaptivePooling, IBlock, Integration2Temporal, Temporal2Integration
from vcache.heads.dist_temporal import C3D, Joint, R2Plus1D, TAda, TBlock
from vcache.heads.quick_gelu import QuickGELU


def stem(
    conv: nn.Conv3d, pixels: UInt8[Tensor, "B F height width 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "B c F h w"]:
    mean_, std_ = (conv.weight.new_tensor(x) for x in (mean, std))
    return conv(((pixels.to(conv.weight.dtype) / 255 - mean_) / std_).permute(0, 4, 1, 2, 3))


def t_block(block: TBlock, z: Float[Tensor, "B c F h w"]) -> Float[Tensor, "B c F h w"]:
    n = block.ln(z.movedim(1, -1)).movedim(-1, 1)
    gelu = QuickGELU()
    match block:
        case R2Plus1D():
            return gelu(z + block.temporal_net(n))
        case C3D():
            return gelu(z + block.conv(n))
        case TAda():
            factors = block.factors(n.mean(dim=(3, 4)).mT).mT  # (B, c, F)
            calibrated = [_calibrated(block, n[i], factors[i]) for i in range(len(z))]
            return gelu(z + (torch.stack(calibrated) if calibrated else block.conv(n * factors[..., None, None])))
        case Joint():
            return _joint(block, z, n)


def _calibrated(block: TAda, n: Float[Tensor, "c F h w"], factors: Float[Tensor, "c F"]) -> Float[Tensor, "c F h w"]:
    """Each frame of a clip is convolved with weights of its own."""
    frames = [
        F.conv2d(n[:, t], block.conv.weight.squeeze(2) * factors[:, t, None, None], block.conv.bias, padding=1)
        for t in range(n.shape[1])
    ]
    return torch.stack(frames, dim=1)


def _joint(block: Joint, z: Tensor, n: Tensor) -> Tensor:
    tokens, normed = (x.flatten(2).mT for x in (z, n))  # (B, F*h*w, c)
    q, k, v = (x.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for x in block.in_proj(normed).chunk(3, dim=-1))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    tokens = tokens + block.out_proj((weights @ v).transpose(1, 2).flatten(2))
    return (tokens + block.mlp(block.ln_2(tokens))).mT.unflatten(2, z.shape[2:])


def read(linear: nn.Linear, tokens: Callable[[], Tensor], carried: Tensor | None) -> Float[Tensor, "B T N d"]:
    """M = FC(X) + R."""
    m = linear(tokens().to(linear.weight.dtype))
    return m if carried is None else m + carried


def i_block(block: IBlock, u: Float[Tensor, "B T N d"]) -> Float[Tensor, "B T N d"]:
    over_time = block.temporal_ffn(block.ln_temporal(u).permute(0, 3, 1, 2).unsqueeze(-1))
    return block.ffn(block.ln(u)) + over_time.squeeze(-1).permute(0, 2, 3, 1)


def add_down(
    lateral: Temporal2Integration, m: Float[Tensor, "B T N d"], z: Float[Tensor, "B c F h w"]
) -> Float[Tensor, "B T N d"]:
    """U = M + down(Z)."""
    if lateral.down_sampling == "dconv":
        patches = lateral.linear_fuse(z).flatten(3).permute(0, 2, 3, 1)
    else:
        pool = F.avg_pool3d if lateral.down_sampling == "avg" else F.max_pool3d
        patches = lateral.linear_fuse(pool(z, (lateral.gamma, 1, 1)).flatten(3).permute(0, 2, 3, 1))
    return m + torch.cat([lateral.cls_token.transpose(1, 2).expand(z.shape[0], -1, -1, -1), patches], dim=2)


def add_up(
    lateral: Integration2Temporal, m: Float[Tensor, "B T N d"], z: Float[Tensor, "B c F h w"]
) -> Float[Tensor, "B c F h w"]:
    """Z + up(M)."""
    low = lateral.linear_fuse(m[:, :, 1:]).unflatten(2, lateral.grid).permute(0, 4, 1, 2, 3)
    match lateral.up_sampling:
        case "nearest":
            return z + low.repeat_interleave(lateral.gamma, dim=2)
        case "trilinear":
            return z + F.interpolate(low, size=z.shape[2:], mode="trilinear", align_corners=False)
        case "deconv":
            return z + lateral.deconv(low)


def before_pooling(fused: Float[Tensor, "B T N d"]) -> Float[Tensor, "B T N d"]:
    return fused


def pool(
    pooling: AdaptivePooling, fused: Float[Tensor, "B T N d"], s: Float[Tensor, "B T d"], g: Float[Tensor, "B 1 d"]
) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B 1 d"]]:
    flat = s.flatten(0, 1).unsqueeze(1)
    flat = flat + pooling.spatial_transformer(flat, fused.flatten(0, 1))
    flat = flat + pooling.output_map_spatial_cls_token(pooling.ln_out_spat_cls_token(flat))
    s = flat.view_as(s)
    g = g + pooling.temporal_transformer(g, s + pooling.positional_embedding)
    return s, g + pooling.output_map_cls_token(pooling.ln_out_temp_cls_token(g))


def z_by_patch(z: Float[Tensor, "B c F h w"]) -> Float[Tensor, "B F P c"]:
    """Z as vcache shows it."""
    return z.flatten(3).permute(0, 2, 3, 1)
