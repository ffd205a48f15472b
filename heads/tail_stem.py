"""What is below the first block of a CLIP image tower: pixels -> patches, CLS and positions, and ln_pre.

A head that puts something of its own before ln_pre, as AIM its temporal embedding, runs the whole tower on the stored pixels:

    x = embed_patches(normalised(pixels))        conv1, class_embedding, positional_embedding
    x = ln_pre(x + temporal embedding)           what enters block 0
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vcache.heads.frozen_linear import cast_linear


@dataclass(frozen=True, kw_only=True)
class StemShape:
    """What the weights of a stem do not tell."""

    patch_size: int
    """Side of a patch in pixels."""
    grid: tuple[int, int]
    """Patches of a frame: rows, columns."""
    ln_pre: bool = True
    """Whether there is a LayerNorm before the first block."""

    def __post_init__(self) -> None:
        if min(self.patch_size, *self.grid) < 1:
            raise ValueError(f"patch_size ({self.patch_size}) and grid ({self.grid}) must be at least 1")


class TailStem(nn.Module):
    """The frozen patch embedding. Weights have CLIP's names."""

    def __init__(self, shape: StemShape, width: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.shape, p = shape, shape.patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=p, stride=p, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + shape.grid[0] * shape.grid[1], width))
        self.ln_pre = nn.LayerNorm(width, eps=layer_norm_eps) if shape.ln_pre else nn.Identity()

    def embed_patches(self, images: Float[Tensor, "B T height width 3"]) -> Float[Tensor, "B T N D"]:
        """What enters ln_pre, of normalised images; what is beyond the last whole patch is left out.

        Raises:
            ValueError: the images have other patches than the positions.
        """
        p, (h, w) = self.shape.patch_size, self.shape.grid
        if (images.shape[2] // p, images.shape[3] // p) != (h, w):
            got = f"{images.shape[2]} x {images.shape[3]}"
            raise ValueError(f"frames must be of {h}x{w} patches of {p} pixels, got {got} pixels")
        patches = rearrange(images[:, :, : h * p, : w * p], "b t (h p) (w q) c -> b t (h w) (c p q)", p=p, q=p)
        # The convolution as a matrix product, as the extractor computes it.
        x = cast_linear(patches, self.conv1.weight.flatten(1), None)  # (B, T, P, D)
        cls = self.class_embedding.to(x.dtype).expand(*x.shape[:2], 1, -1)
        return torch.cat([cls, x], dim=2) + self.positional_embedding.to(x.dtype)


def normalised(
    pixels: UInt8[Tensor, "B T height width 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T height width 3"]:
    """What a backbone is given for stored pixels; mean and deviation are of values from 0 to 1."""
    mean_, std_ = (torch.tensor(values, dtype=dtype, device=pixels.device) for values in (mean, std))
    return (pixels.to(dtype) / 255 - mean_) / std_
