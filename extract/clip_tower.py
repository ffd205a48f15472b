"""open_clip's own VisionTransformer: CLIP's image tower, block by block.

images -> patches, CLS, positions, ln_pre
    block i:  h = ln_1(x);  q, k, v = W h + b   ->  q[i], k[i]     (before 1/sqrt(d), all tokens)
              x = x + out_proj(softmax(q k' / sqrt(d)) v)
              x = x + mlp(ln_2(x))              ->  tokens[i]      (before ln_post)
embed = ln_post(x[cls]) @ proj                                     (not normalised)
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.extract.tower import BackboneFacts, Tower, activation_name, is_layer_norm, normed


class ClipTower(Tower):
    def __init__(self, visual: VisionTransformer) -> None:
        self.visual: Any = visual

    def facts(self, model: str) -> BackboneFacts:
        visual, block = self.visual, self.visual.transformer.resblocks[0]
        height, width = visual.grid_size
        return BackboneFacts(
            model=model,
            num_layers=len(visual.transformer.resblocks),
            width=block.attn.embed_dim,
            num_heads=block.attn.num_heads,
            head_dim=block.attn.head_dim,
            patch_size=visual.patch_size[0],
            image_size=visual.image_size[0],
            grid=(height, width),
            num_tokens=height * width + 1,
            embed_dim=visual.proj.shape[1],
            layer_norm_eps=block.ln_1.eps,
        )

    def enter(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        visual = self.visual
        patches = project_patches(images, visual.conv1, visual.grid_size)
        cls = visual.class_embedding.expand(images.shape[0], 1, -1)
        return normed(visual.ln_pre, torch.cat([cls, patches], dim=1) + visual.positional_embedding)

    def run_block(
        self, layer: int, x: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B H N d"], Float[Tensor, "B H N d"]]:
        B, N, D = x.shape
        block = self.visual.transformer.resblocks[layer]
        attention = block.attn
        qkv = F.linear(normed(block.ln_1, x), attention.in_proj_weight, attention.in_proj_bias)  # (B, N, 3*D)
        q, k, v = qkv.view(B, N, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + block.ls_1(attention.out_proj(mixed))  # ls_1, ls_2: LayerScale, or nothing
        return x + block.ls_2(block.mlp(normed(block.ln_2, x))), q, k

    def embed(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return normed(self.visual.ln_post, x[:, 0]) @ self.visual.proj

    def query_key_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block = self.visual.transformer.resblocks[layer]
        weight, bias = (
            tensor[: 2 * block.attn.embed_dim] for tensor in (block.attn.in_proj_weight, block.attn.in_proj_bias)
        )
        return block.ln_1.weight, block.ln_1.bias, weight, bias

    def tail_facts(self) -> dict[str, Any]:
        block = self.visual.transformer.resblocks[0]
        return {
            "mlp_dim": block.mlp.c_fc.out_features,
            "activation": activation_name(block.mlp.gelu),
            "layer_scale": not isinstance(block.ls_1, nn.Identity),
        }

    def tail_weights(self, first: int) -> dict[str, Tensor]:
        visual = self.visual
        weights = {
            f"blocks.{layer}.{name}": tensor
            for layer, block in enumerate(visual.transformer.resblocks)
            if layer >= first
            for name, tensor in block.state_dict().items()
        }
        weights |= {f"ln_post.{name}": tensor for name, tensor in visual.ln_post.state_dict().items()}
        return {**weights, "proj": visual.proj.data}

    def stem_weights(self) -> dict[str, Tensor]:
        visual = self.visual
        embeddings = {name: getattr(visual, name).data for name in ("class_embedding", "positional_embedding")}
        weights = {"conv1.weight": visual.conv1.weight.data, **embeddings}
        return weights | {f"ln_pre.{name}": tensor for name, tensor in visual.ln_pre.state_dict().items()}


def project_patches(images: Tensor, conv: nn.Conv2d, grid: tuple[int, int]) -> Tensor:
    """The convolution of patches (B, P, D) as a matrix product: on a GPU torch runs them in TF32 unless told otherwise."""
    (h, w), (p, q) = grid, conv.kernel_size
    patches = rearrange(images[..., : h * p, : w * q], "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
    return F.linear(patches, conv.weight.flatten(1), conv.bias)


def clip_departure(visual: VisionTransformer) -> str:
    """What of a VisionTransformer `ClipTower` does not compute, named after what makes it; empty if it computes all of it."""
    blocks, (height, width) = list(visual.transformer.resblocks), visual.image_size
    other_blocks = sorted({type(block).__name__ for block in blocks} - {ResidualAttentionBlock.__name__})
    if visual.attn_pool is not None:
        return f"with an {type(visual.attn_pool).__name__}"
    if visual.pool_type != "tok":
        return f"that pools by {visual.pool_type!r}, not by its class token"
    if other_blocks:
        return f"of {', '.join(other_blocks)}"
    if height != width or visual.patch_size[0] != visual.patch_size[1]:
        shown = visual.image_size if height != width else visual.patch_size
        return f"for {'images' if height != width else 'patches'} of {shown[0]} x {shown[1]}, not square"
    if not all(is_layer_norm(norm) for norm in (visual.ln_post, blocks[0].ln_1, blocks[0].ln_2)):
        return "whose LayerNorms have no weights"
    if not activation_name(blocks[0].mlp.gelu):
        return f"with the activation {type(blocks[0].mlp.gelu).__name__}"
    return ""
