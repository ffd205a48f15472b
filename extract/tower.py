"""An image tower in parts, whichever library built it: what `FrozenBackbone` runs and taps."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

ClassToken = Literal["own", "mean of patches"]


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Sizes of an image tower."""

    model: str
    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    patch_size: int
    image_size: int
    grid: tuple[int, int]
    """Patches down and across."""
    num_tokens: int
    """Per frame, CLS first."""
    embed_dim: int
    layer_norm_eps: float
    class_token: ClassToken = "own"
    """What is first. A tower without a class token has the mean of its patches there, in tokens, queries and keys: heads that
    read CLS read that, and no attention of the tower sees it."""


class Tower(ABC):
    """An image tower in parts; x is (B, N, D), without a first token where the tower has none of its own."""

    libraries: tuple[str, ...] = ()
    """Beside torch and open_clip, whose version may change a bit of the features."""
    class_token: ClassToken = "own"
    underivable: str = ""
    """Why queries and keys are no linear function of ln_1(block input); empty if they are."""
    visual: Any

    @abstractmethod
    def facts(self, model: str) -> BackboneFacts: ...

    @abstractmethod
    def enter(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        """What enters block 0."""

    @abstractmethod
    def run_block(
        self, layer: int, x: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B H N d"], Float[Tensor, "B H N d"]]:
        """The block's output with its queries and keys, as they enter the softmax, before 1/sqrt(d)."""

    @abstractmethod
    def embed(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        """The tower's own embedding of what leaves its last block, not normalised."""

    @abstractmethod
    def query_key_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ln_1's weight and bias (D,), the projection (2*D, D) to q and k and its bias (2*D,); not where `underivable`."""

    @abstractmethod
    def tail_facts(self) -> dict[str, Any]:
        """What the weights of the blocks do not tell of how they are run."""

    @abstractmethod
    def tail_weights(self, first: int) -> dict[str, Tensor]:
        """Weights of the blocks from `first`, of ln_post and of what makes `embed`, under CLIP's names."""

    def stem_weights(self) -> dict[str, Tensor] | None:
        """Weights of CLIP's patch embedding, under its names; None where it is another."""
        return None

    def stored(self, x: Float[Tensor, "*batch N D"]) -> Float[Tensor, "*batch M D"]:
        """With the first token that a store has."""
        return x if self.class_token == "own" else torch.cat([x.mean(dim=-2, keepdim=True), x], dim=-2)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm, or nothing where the model has none: always computed in float32."""
    return x if isinstance(norm, nn.Identity) else norm(x.float()).to(x.dtype)


def activation_name(module: nn.Module) -> str:
    """quick_gelu, gelu or gelu_tanh; empty for any other."""
    name = type(module).__name__
    if isinstance(module, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    return {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh"}.get(name, "")


def is_layer_norm(module: nn.Module) -> bool:
    """A LayerNorm with a gain and a shift."""
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def cast_products(visual: nn.Module, dtype: torch.dtype) -> None:
    """All weights but those of normalisations."""
    kept = (nn.LayerNorm, nn.modules.batchnorm._NormBase)
    for module in visual.modules():
        if not isinstance(module, kept):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
