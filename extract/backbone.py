"""The frozen open_clip image tower: {layer: tokens, q, k} and the CLIP embedding in one pass.

The tower runs block by block here, not through hooks: queries and keys fall out of the projection that attention needs
anyway, where open_clip's fused attention never shows them. Checked against open_clip's own forward and transformers'.

    images -> patches, CLS, positions, ln_pre
        block i:  h = ln_1(x);  q, k, v = W h + b   ->  q[i], k[i]     (before 1/sqrt(d), all tokens)
                  x = x + out_proj(softmax(q k' / sqrt(d)) v)
                  x = x + mlp(ln_2(x))              ->  tokens[i]      (before ln_post)
    embed = ln_post(x[cls]) @ proj                                     (not normalised)

In float32, or in half precision as the official repositories run their frozen CLIP on a GPU: products and the residual stream
x in float16 or bfloat16, LayerNorms in float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import open_clip
import torch
from einops import rearrange
from jaxtyping import Float
from open_clip.transform import PreprocessCfg
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.extract.layers import LayerError
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

__all__ = [
    "ActivationMismatch",
    "BackboneError",
    "BackboneFacts",
    "FrozenBackbone",
    "RandomWeightsRefused",
    "Taps",
    "UnsupportedBackbone",
    "load_backbone",
]

_WHAT_WORKS = (
    "vcache taps open_clip's VisionTransformer with a class token and plain attention blocks "
    "(ViT-B-32, ViT-B-16, ViT-L-14 and their kind, from OpenAI, LAION, DataComp, MetaCLIP or DFN)"
)


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


@dataclass(frozen=True)
class Taps:
    """What one forward pass gives, under the layers that were asked for.

    `q` and `k` are views into the projection of their layer, which also holds v: copy what is to be kept for long.
    """

    tokens: dict[int, Float[Tensor, "B N D"]]
    """Output of the block, CLS first."""
    q: dict[int, Float[Tensor, "B H N d"]]
    """Biased query projections of ln_1(input of the block), before 1/sqrt(d)."""
    k: dict[int, Float[Tensor, "B H N d"]]
    embed: Float[Tensor, "B E"]
    inputs: dict[int, Float[Tensor, "B N D"]] = field(default_factory=dict)
    """What enters the block, before ln_1: of block i > 0 the output of block i-1."""


class FrozenBackbone(nn.Module):
    """An image tower in eval mode, without gradients, whatever is called on it."""

    facts: BackboneFacts
    preprocess_config: dict[str, Any]
    """open_clip's preprocessing of these weights: size, mean, std, interpolation, resize_mode, ..."""
    weights_sha256: str
    """Of the float32 weights, whatever the precision."""
    dtype: torch.dtype
    """Of the products and the residual stream, and so of all taps."""

    def __init__(self, visual: VisionTransformer, architecture: Architecture, precision: str = "float32") -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False).eval()
        self.facts = _facts(visual, architecture)
        self.preprocess_config = {**asdict(PreprocessCfg()), **architecture.preprocess, "size": visual.image_size}
        self.weights_sha256 = weights_sha256(visual.state_dict())
        self.dtype = getattr(torch, precision)
        _cast_products(visual, self.dtype)

    @property
    def device(self) -> torch.device:
        return self.visual.class_embedding.device

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
        x = _embed_patches(self.visual, images.to(self.dtype))
        for layer, block in enumerate(self.visual.transformer.resblocks):
            if layer in inputs:
                entering[layer] = x
            x, q, k = _run_block(block, x)
            if layer in tokens:
                kept[layer] = x
            if layer in qk:
                queries[layer], keys[layer] = q, k
        embed = _normed(self.visual.ln_post, x[:, 0]) @ self.visual.proj
        return Taps(kept, queries, keys, embed, entering)

    def query_key_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What makes q and k of a block's input: ln_1's weight and bias (D,), the projection (2*D, D) and its bias (2*D,)."""
        block: Any = self.visual.transformer.resblocks[layer]
        weight, bias = (
            tensor[: 2 * self.facts.width] for tensor in (block.attn.in_proj_weight, block.attn.in_proj_bias)
        )
        return block.ln_1.weight, block.ln_1.bias, weight, bias

    def tail_facts(self) -> dict[str, Any]:
        """What the weights of the top blocks do not tell of how they are run."""
        block: Any = self.visual.transformer.resblocks[0]
        return {
            "num_layers": self.facts.num_layers,
            "embed_dim": self.facts.embed_dim,
            "width": self.facts.width,
            "num_heads": self.facts.num_heads,
            "mlp_dim": block.mlp.c_fc.out_features,
            "activation": "gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
            "layer_norm_eps": self.facts.layer_norm_eps,
            "layer_scale": not isinstance(block.ls_1, nn.Identity),
        }

    def tail_weights(self, num_blocks: int, *, stem: bool = False) -> dict[str, Tensor]:
        """Weights of the top blocks, blocks.I.NAME with the absolute I and CLIP's names, of ln_post, and proj; not copies.

        With `stem` those of the patch embedding, too: stem.conv1.weight, stem.class_embedding, stem.positional_embedding and
        stem.ln_pre.NAME, where there is an ln_pre.
        """
        first = self.facts.num_layers - num_blocks
        blocks = self.visual.transformer.resblocks
        weights = {
            f"blocks.{layer}.{name}": tensor
            for layer in range(first, self.facts.num_layers)
            for name, tensor in blocks[layer].state_dict().items()
        }
        weights |= {f"ln_post.{name}": tensor for name, tensor in self.visual.ln_post.state_dict().items()}
        weights |= self._stem_weights() if stem else {}
        return {**weights, "proj": self.visual.proj.data}

    def _stem_weights(self) -> dict[str, Tensor]:
        visual = self.visual
        embeddings = {name: getattr(visual, name).data for name in ("class_embedding", "positional_embedding")}
        weights = {"conv1.weight": visual.conv1.weight.data, **embeddings}
        weights |= {f"ln_pre.{name}": tensor for name, tensor in visual.ln_pre.state_dict().items()}
        return {f"stem.{name}": tensor for name, tensor in weights.items()}

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
        UnsupportedBackbone: the model is unknown, or its tower is not a plain VisionTransformer with a class token.
    """
    architecture = find_architecture(model, None if random_weights else pretrained)
    with torch.device("meta"):  # neither memory nor random numbers for a tower that is filled or refused next
        visual = _build(architecture)
    _check_supported(visual, architecture.name)
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            visual = _build(architecture)
    else:
        _load(visual, architecture, read_checkpoint(find_checkpoint(model, pretrained, architecture)))
    return FrozenBackbone(visual, architecture, precision).to(device)


def _build(architecture: Architecture) -> nn.Module:
    if timm_name := architecture.vision.get("timm_model_name"):
        raise UnsupportedBackbone(f"{architecture.name}: its image tower is a TimmModel ({timm_name}); {_WHAT_WORKS}.")
    no_text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    clip = open_clip.CLIP(
        embed_dim=architecture.embed_dim,
        vision_cfg=open_clip.CLIPVisionCfg(**architecture.vision),
        text_cfg=no_text,  # open_clip has no public way to build the image tower alone
        quick_gelu=architecture.quick_gelu,
    )
    return clip.visual


def _check_supported(visual: nn.Module, name: str) -> None:
    """Only what `forward` computes: each departure is named after the class that makes it."""
    if type(visual) is not VisionTransformer:
        odd = f"a {type(visual).__name__}"
    elif visual.attn_pool is not None:
        odd = f"a VisionTransformer with an {type(visual.attn_pool).__name__}"
    elif visual.pool_type != "tok":
        odd = f"a VisionTransformer that pools by {visual.pool_type!r}, not by its class token"
    elif blocks := {type(block).__name__ for block in visual.transformer.resblocks} - {ResidualAttentionBlock.__name__}:
        odd = f"a VisionTransformer of {', '.join(sorted(blocks))}"
    elif visual.image_size[0] != visual.image_size[1]:
        odd = f"a VisionTransformer for images of {visual.image_size[0]} x {visual.image_size[1]}, not square"
    else:
        return
    raise UnsupportedBackbone(f"{name}: its image tower is {odd}; {_WHAT_WORKS}.")


def _load(visual: nn.Module, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Every weight of the tower from the checkpoint, and no weight left over."""
    check_activation(architecture, checkpoint)
    if differs := misfit(visual.state_dict(), checkpoint.weights):
        raise RandomWeightsRefused(f"{checkpoint.path} does not fit {architecture.name}: weights {differs}.")
    visual.load_state_dict(checkpoint.weights, strict=True, assign=True)


def _facts(visual: VisionTransformer, architecture: Architecture) -> BackboneFacts:
    attention = visual.transformer.resblocks[0].attn
    height, width = visual.grid_size
    return BackboneFacts(
        model=architecture.name,
        num_layers=len(visual.transformer.resblocks),
        width=attention.embed_dim,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        patch_size=visual.patch_size[0],
        image_size=visual.image_size[0],
        grid=(height, width),
        num_tokens=height * width + 1,
        embed_dim=visual.proj.shape[1],
        layer_norm_eps=visual.transformer.resblocks[0].ln_1.eps,
    )


def _embed_patches(visual: VisionTransformer, images: Tensor) -> Tensor:
    (h, w), (p, q) = visual.grid_size, visual.patch_size
    patches = rearrange(images[..., : h * p, : w * q], "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
    # The convolution conv1, as a matrix product: on a GPU torch runs convolutions in TF32 unless told otherwise.
    patches = F.linear(patches, visual.conv1.weight.flatten(1))  # (B, P, D)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    return _normed(visual.ln_pre, torch.cat([cls, patches], dim=1) + visual.positional_embedding)


def _run_block(block: ResidualAttentionBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output (B, N, D) with its queries and keys (B, H, N, d)."""
    B, N, D = x.shape
    attention = block.attn
    qkv = F.linear(_normed(block.ln_1, x), attention.in_proj_weight, attention.in_proj_bias)  # (B, N, 3*D)
    q, k, v = qkv.view(B, N, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
    x = x + block.ls_1(attention.out_proj(mixed))  # ls_1, ls_2: LayerScale, or nothing
    return x + block.ls_2(block.mlp(_normed(block.ln_2, x))), q, k


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm, or nothing where the model has none: always computed in float32."""
    return norm(x.float()).to(x.dtype)


def _cast_products(visual: VisionTransformer, dtype: torch.dtype) -> None:
    """All weights but those of LayerNorms."""
    for module in visual.modules():
        if not isinstance(module, nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
