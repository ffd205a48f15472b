"""The frozen open_clip image tower: {layer: tokens, q, k} and the CLIP embedding in one pass.

The tower runs block by block, not through hooks: queries and keys fall out of the projection that attention needs anyway, where
fused attention never shows them. clip_tower.py and timm_tower.py hold the parts; each is checked against the library's own
forward.

In float32, or in half precision as the official repositories run their frozen CLIP on a GPU: products and the residual stream
x in float16 or bfloat16, LayerNorms in float32.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from vcache.extract.layers import LayerError
from vcache.extract.tower import BackboneFacts, Tower, cast_products
from vcache.extract.tower_weights import Checkpoint, check_activation, misfit, read_checkpoint, weights_sha256
from vcache.extract.weights import (
    ActivationMismatch,
    Architecture,
    BackboneError,
    RandomWeightsRefused,
    UnsupportedBackbone,
    find_architecture,
    find_checkpoint,
)
from vcache.extract.which_tower import build_tower, check_supported, fill_buffers, tower_of

__all__ = [
    "ActivationMismatch",
    "BackboneError",
    "BackboneFacts",
    "FrozenBackbone",
    "RandomWeightsRefused",
    "Taps",
    "UnsupportedBackbone",
    "backbone_of",
    "check_backbone",
    "load_backbone",
]


@dataclass(frozen=True)
class Taps:
    """What one forward pass gives, under the layers that were asked for.

    `q` and `k` are views into the projection of their layer, which also holds v: copy what is to be kept for long.
    """

    tokens: dict[int, Float[Tensor, "B N D"]]
    """Output of the block, CLS first."""
    q: dict[int, Float[Tensor, "B H N d"]]
    """What enters the softmax, before 1/sqrt(d): biased projections of ln_1(input of the block), in EVA-02 rotated."""
    k: dict[int, Float[Tensor, "B H N d"]]
    embed: Float[Tensor, "B E"]
    inputs: dict[int, Float[Tensor, "B N D"]] = field(default_factory=dict)
    """What enters the block, before ln_1: of block i > 0 the output of block i-1."""


class FrozenBackbone(nn.Module):
    """An image tower in eval mode, without gradients, whatever is called on it."""

    architecture: Architecture
    facts: BackboneFacts
    preprocess_config: dict[str, Any]
    """open_clip's preprocessing of these weights: size, mean, std, interpolation, resize_mode, ..."""
    weights_sha256: str
    """Of the float32 weights, whatever the precision."""
    dtype: torch.dtype
    """Of the products and the residual stream, and so of all taps."""

    def __init__(self, visual: nn.Module, architecture: Architecture, precision: str = "float32") -> None:
        super().__init__()
        self.architecture = architecture
        self.visual = visual.requires_grad_(False).eval()
        self.tower: Tower = tower_of(visual)
        self.facts = self.tower.facts(architecture.name)
        size = (self.facts.image_size, self.facts.image_size)
        self.preprocess_config = {**asdict(PreprocessCfg()), **architecture.preprocess, "size": size}
        self.weights_sha256 = weights_sha256(visual.state_dict())
        self.dtype = getattr(torch, precision)
        cast_products(visual, self.dtype)

    @property
    def device(self) -> torch.device:
        return next(self.visual.parameters()).device

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stays in eval mode, also as a part of a model that is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        images: Float[Tensor, "B 3 S S"],
        *,
        tokens: Sequence[int] = (),
        qk: Sequence[int] = (),
        inputs: Sequence[int] = (),
    ) -> Taps:
        """Run normalised images through all blocks and keep the absolute layers asked for.

        Raises:
            LayerError: a layer is negative or not there; `resolve_layers` makes them absolute.
            ValueError: the images are not of the backbone's size.
        """
        self._check(images, (*tokens, *qk, *inputs))
        entering: dict[int, Tensor] = {}
        kept: dict[int, Tensor] = {}
        queries: dict[int, Tensor] = {}
        keys: dict[int, Tensor] = {}
        tower, stored = self.tower, self.tower.stored
        x = tower.enter(images.to(self.dtype))
        for layer in range(self.facts.num_layers):
            if layer in inputs:
                entering[layer] = stored(x)
            x, q, k = tower.run_block(layer, x)
            if layer in tokens:
                kept[layer] = stored(x)
            if layer in qk:
                queries[layer], keys[layer] = stored(q), stored(k)
        return Taps(kept, queries, keys, tower.embed(x), entering)

    def query_key_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What makes q and k of a block's input: ln_1's weight and bias (D,), the projection (2*D, D) and its bias (2*D,).

        Raises:
            UnsupportedBackbone: they are made of it in another way; `check_backbone` says so before any work.
        """
        if self.tower.underivable:
            raise UnsupportedBackbone(_no_derivation(self.facts.model, self.tower))
        return self.tower.query_key_weights(layer)

    def tail_facts(self) -> dict[str, Any]:
        """What the weights of the top blocks do not tell of how they are run."""
        names = ("num_layers", "embed_dim", "width", "num_heads", "layer_norm_eps")
        return {**{name: getattr(self.facts, name) for name in names}, **self.tower.tail_facts()}

    def tail_weights(self, num_blocks: int, *, stem: bool = False) -> dict[str, Tensor]:
        """Weights of the top blocks, blocks.I.NAME with the absolute I and CLIP's names, of ln_post, and proj; few are copies.

        With `stem` those of the patch embedding, too: stem.conv1.weight, stem.class_embedding, stem.positional_embedding and
        stem.ln_pre.NAME, where there is an ln_pre.

        Raises:
            UnsupportedBackbone: the patch embedding is not CLIP's.
        """
        weights = self.tower.tail_weights(self.facts.num_layers - num_blocks)
        if not stem:
            return weights
        if (below := self.tower.stem_weights()) is None:
            raise UnsupportedBackbone(
                f"{self.facts.model}: what is below its first block is not CLIP's patch embedding, which heads run on stored "
                "pixels. Choose a head, or settings of it, that read cached tokens."
            )
        return weights | {f"stem.{name}": tensor for name, tensor in below.items()}

    def _check(self, images: Tensor, layers: Iterable[int]) -> None:
        size, last = self.facts.image_size, self.facts.num_layers - 1
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images {tuple(images.shape)} must be (B, 3, {size}, {size}) for {self.facts.model}")
        for layer in layers:
            if not 0 <= layer <= last:
                raise LayerError(f"layer {layer} must be absolute, 0 to {last} of {self.facts.model}")


def load_backbone(
    model: str,
    pretrained: str | None,
    *,
    random_weights: bool = False,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    seed: int = 0,
) -> FrozenBackbone:
    """The image tower of an open_clip model; the text tower is not built.

    Args:
        model: A name of open_clip ("ViT-B-16-quickgelu"), or "local-dir:FOLDER" with open_clip_config.json and weights.
        pretrained: A tag of that model ("openai") or a checkpoint file: .safetensors, a state dict or training
            checkpoint of torch, OpenAI's TorchScript archive. None with "local-dir:": the folder has the weights.
        random_weights: Draw the weights from `seed` instead; `pretrained` is then not looked at.
        precision: One of spec.PRECISIONS. In half precision a tap is within a few roundings of its dtype of that in float32.

    Raises:
        RandomWeightsRefused: the weights are not given, not found, not downloadable or do not fit the model exactly.
            Unlike open_clip, position embeddings of another image size are refused, not interpolated.
        ActivationMismatch: the weights are known to belong to the other GELU. A plain state dict does not tell: there
            the model's name decides, and OpenAI's weights need a "-quickgelu" model.
        UnsupportedBackbone: the model is unknown, or its tower is none that which_tower.py lists.
    """
    architecture = find_architecture(model, None if random_weights else pretrained)
    visual = _on_meta(architecture)
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            visual = build_tower(architecture)
    else:
        _load(visual, architecture, read_checkpoint(find_checkpoint(model, pretrained, architecture)))
    return FrozenBackbone(visual, architecture, precision).to(device)


def backbone_of(
    architecture: Architecture, weights: Mapping[str, Tensor], precision: str = "float32"
) -> FrozenBackbone:
    """The image tower of an architecture with these weights, which it keeps, on the CPU.

    Raises:
        RandomWeightsRefused: the weights do not fit it exactly.
    """
    visual = _on_meta(architecture)
    if differs := misfit(visual.state_dict(), weights):
        raise RandomWeightsRefused(f"the weights do not fit {architecture.name}: {differs}.")
    _assign(visual, weights)
    return FrozenBackbone(visual, architecture, precision)


def check_backbone(model: str, pretrained: str | None, *, derive: bool = False) -> BackboneFacts:
    """The sizes of the image tower that `load_backbone` would load, known without looking for weights.

    Args:
        derive: Whether queries and keys are to be made again of the input of a block, too.

    Raises:
        UnsupportedBackbone: it would refuse the model.
    """
    architecture = find_architecture(model, pretrained)
    tower = tower_of(_on_meta(architecture))
    if derive and tower.underivable:
        raise UnsupportedBackbone(_no_derivation(architecture.name, tower))
    return tower.facts(architecture.name)


def _no_derivation(name: str, tower: Tower) -> str:
    return (
        f"--cross-frame derive: {name} does not allow it, as {tower.underivable}. "
        "Say --cross-frame qk, which stores them, or maps."
    )


def _on_meta(architecture: Architecture) -> nn.Module:
    """The tower without memory or random numbers: it is filled, thrown away, or refused here."""
    with torch.device("meta"):
        visual = build_tower(architecture)
    check_supported(visual, architecture)
    return visual


def _load(visual: nn.Module, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Every weight of the tower from the checkpoint, and no weight left over."""
    check_activation(architecture, checkpoint)
    if differs := misfit(visual.state_dict(), checkpoint.weights):
        raise RandomWeightsRefused(f"{checkpoint.path} does not fit {architecture.name}: weights {differs}.")
    _assign(visual, checkpoint.weights)


def _assign(visual: nn.Module, weights: Mapping[str, Tensor]) -> None:
    visual.load_state_dict(weights, strict=True, assign=True)
    fill_buffers(visual)
