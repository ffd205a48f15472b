"""Sizes of the CLIP image towers that the papers use, known without loading open_clip or any weights."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ClipTower:
    """An image tower of OpenAI's CLIP, as open_clip configures it."""

    num_layers: int
    width: int
    num_heads: int
    patch_size: int
    image_size: int
    embed_dim: int

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    def facts_for(self, config: type) -> dict[str, Any]:
        """Those of the sizes that a head's Config takes from a store, by its names."""
        facts = {**vars(self), "grid": self.grid}
        return {field.name: facts[field.name] for field in fields(config) if field.name in facts}

    @property
    def num_trunk_parameters(self) -> int:
        """Without ln_post and the projection, which no layer before them needs."""
        P, D = self.grid[0] * self.grid[1], self.width
        embeddings = 3 * self.patch_size**2 * D + (P + 2) * D + 2 * D  # patches; CLS and positions; ln_pre
        return embeddings + self.num_layers * (12 * D**2 + 13 * D)

    @property
    def num_parameters(self) -> int:
        """With ln_post and the projection, which the embedding needs."""
        return self.num_trunk_parameters + 2 * self.width + self.width * self.embed_dim

    @property
    def macs_per_frame(self) -> int:
        """Multiply-adds of one image: patches, blocks, and the projection of CLS; equal to a count of open_clip's own module."""
        P, D = self.grid[0] * self.grid[1], self.width
        N = P + 1
        patches, projection = P * D * 3 * self.patch_size**2, D * self.embed_dim
        block = 12 * N * D**2 + 2 * N**2 * D  # Q, K, V and output 4 D^2 a token, the MLP 8; scores and values
        return patches + self.num_layers * block + projection


_BASE = {"num_layers": 12, "width": 768, "num_heads": 12, "embed_dim": 512}
_LARGE = {"num_layers": 24, "width": 1024, "num_heads": 16, "embed_dim": 768}

CLIP_TOWERS = {
    "ViT-B-32-quickgelu": ClipTower(patch_size=32, image_size=224, **_BASE),
    "ViT-B-16-quickgelu": ClipTower(patch_size=16, image_size=224, **_BASE),
    "ViT-L-14-quickgelu": ClipTower(patch_size=14, image_size=224, **_LARGE),
    "ViT-L-14-336-quickgelu": ClipTower(patch_size=14, image_size=336, **_LARGE),
}
"""By the names of open_clip, which `vcache extract --model` takes."""


def tower_name(width: int, grid: tuple[int, ...]) -> str | None:
    """open_clip's name of the tower of this width and these patches, if it is one of those."""
    return next((name for name, tower in CLIP_TOWERS.items() if (tower.width, tower.grid) == (width, grid)), None)
