"""timm's VisionTransformer and Eva as open_clip's image towers: EVA-CLIP, SigLIP, MobileCLIP's ViTs, block by block.

    images -> patches, class token if there is one, positions, norm_pre
        block i:  h = norm1(x);  q, k, v = W h + b, no bias of k in EVA;  q, k rotated by the patch's place in EVA-02
                  x = x + proj(norm(softmax(q k' / sqrt(d)) v))        norm: EVA-02 alone
                  x = x + mlp(norm2(x))
    embed = head(norm(x)[cls]), or of SigLIP, which has no class token, its attention pool over norm(x)

The post-norm blocks of EVA02-E have x + norm1(attention(x)) and x + norm2(mlp(x)). Checked against timm's own forward.
"""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.extract.clip_tower import project_patches
from vcache.extract.timm_names import attention_pool_weights, block_facts, block_weights, is_post_norm, qkv_weights
from vcache.extract.tower import BackboneFacts, Tower, normed


class TimmTower(Tower):
    libraries = ("timm",)

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.trunk: Any = visual.trunk
        self.rope: Any = getattr(self.trunk, "rope", None)
        self.class_token = "own" if self.trunk.num_prefix_tokens else "mean of patches"
        self.post_norm = is_post_norm(self.trunk.blocks[0])
        if self.rope is not None:
            self.underivable = "its queries and keys are rotated by the place of the patch"
        elif self.post_norm:
            self.underivable = "its blocks normalise what attention gives, not what it reads"

    def facts(self, model: str) -> BackboneFacts:
        trunk, attention = self.trunk, self.trunk.blocks[0].attn
        image_size, (height, width) = trunk.patch_embed.img_size, trunk.patch_embed.grid_size
        return BackboneFacts(
            model=model,
            num_layers=len(trunk.blocks),
            width=trunk.embed_dim,
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            patch_size=image_size[0] // height,
            image_size=image_size[0],
            grid=(height, width),
            num_tokens=height * width + 1,
            embed_dim=trunk.head.out_features if isinstance(trunk.head, nn.Linear) else trunk.embed_dim,
            layer_norm_eps=trunk.norm.eps,
            class_token=self.class_token,
        )

    def enter(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        trunk, embed = self.trunk, self.trunk.patch_embed
        if type(embed).__name__ == "PatchEmbed":
            x = project_patches(images, embed.proj, embed.grid_size)
        else:
            with torch.backends.cudnn.flags(allow_tf32=False):  # as project_patches
                x = embed(images)
        x = trunk._pos_embed(x)
        return normed(trunk.norm_pre, x[0] if isinstance(x, tuple) else x)

    def run_block(
        self, layer: int, x: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B H N d"], Float[Tensor, "B H N d"]]:
        block = self.trunk.blocks[layer]
        if self.post_norm:
            mixed, q, k = self._attend(block.attn, x)
            x = x + normed(block.norm1, mixed)
            return x + normed(block.norm2, _feed_forward(block.mlp, x)), q, k
        mixed, q, k = self._attend(block.attn, normed(block.norm1, x))
        x = x + _scaled(block, 1, mixed)
        return x + _scaled(block, 2, _feed_forward(block.mlp, normed(block.norm2, x))), q, k

    def embed(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        trunk = self.trunk
        if self.class_token == "own":
            return trunk.head(normed(trunk.norm, x[:, 0]))
        return trunk.head(_attention_pool(trunk.attn_pool, normed(trunk.norm, x)))

    def query_key_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block = self.trunk.blocks[layer]
        weight, bias = (tensor[: 2 * self.trunk.embed_dim] for tensor in qkv_weights(block.attn))
        return block.norm1.weight, block.norm1.bias, weight, bias

    def tail_facts(self) -> dict[str, Any]:
        return {
            **block_facts(self.trunk.blocks[0]),
            "rope": 0 if self.rope is None else len(self._rotation()),
            "class_token": self.class_token == "own",
            "proj_bias": isinstance(self.trunk.head, nn.Linear) and self.trunk.head.bias is not None,
        }

    def tail_weights(self, first: int) -> dict[str, Tensor]:
        trunk, head = self.trunk, self.trunk.head
        weights = {
            f"blocks.{layer}.{name}": tensor
            for layer in range(first, len(trunk.blocks))
            for name, tensor in block_weights(trunk.blocks[layer]).items()
        }
        if self.rope is not None:  # a copy for each block: files of weights hold no tensor twice
            weights |= {f"blocks.{i}.attn.rope": self._rotation().clone() for i in range(first, len(trunk.blocks))}
        weights |= {f"ln_post.{name}": tensor for name, tensor in trunk.norm.state_dict().items()}
        if self.class_token != "own":
            weights |= {f"pool.{name}": tensor for name, tensor in attention_pool_weights(trunk.attn_pool).items()}
        if not isinstance(head, nn.Linear):  # the pool's output is the embedding
            return {**weights, "proj": torch.eye(trunk.embed_dim, device=trunk.norm.weight.device)}
        bias = {} if head.bias is None else {"proj_bias": head.bias.data}
        return {**weights, "proj": head.weight.data.T.contiguous(), **bias}

    def _rotation(self) -> Float[Tensor, "P both"]:
        """Sines, then cosines, of each patch."""
        table: Tensor = self.rope.get_embed()
        return table

    def _attend(self, attention: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, D = h.shape
        q, k, v = (part.view(B, N, attention.num_heads, -1).transpose(1, 2) for part in _project(attention, h))
        if self.rope is not None:
            q, k = (torch.cat([x[:, :, :1], apply_rot_embed_cat(x[:, :, 1:], self._rotation())], dim=2) for x in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        return attention.proj(normed(attention.norm, mixed)), q, k


def _project(attention: Any, h: Tensor) -> tuple[Tensor, ...]:
    if attention.qkv is None:
        return attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv(h).chunk(3, dim=-1)
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    return F.linear(h, attention.qkv.weight, bias).chunk(3, dim=-1)


def _feed_forward(mlp: Any, h: Tensor) -> Tensor:
    hidden = mlp.act(mlp.fc1_g(h)) * mlp.fc1_x(h) if hasattr(mlp, "fc1_g") else mlp.act(mlp.fc1(h))
    return mlp.fc2(normed(mlp.norm, hidden))


def _scaled(block: Any, part: int, x: Tensor) -> Tensor:
    """With the LayerScale that the block may have: ls1 in timm's ViT, gamma_1 in its EVA."""
    if hasattr(block, "ls1"):
        return getattr(block, f"ls{part}")(x)
    gamma = getattr(block, f"gamma_{part}")
    return x if gamma is None else gamma * x


def _attention_pool(pool: Any, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B D"]:
    """One learnt query attends to all patches; then an MLP (SigLIP's "map" head)."""
    B, P, D = x.shape
    q = pool.q(pool.latent.expand(B, -1, -1)).view(B, 1, pool.num_heads, -1).transpose(1, 2)
    k, v = pool.kv(x).view(B, P, 2, pool.num_heads, -1).permute(2, 0, 3, 1, 4)
    pooled = pool.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, D))
    return (pooled + _feed_forward(pool.mlp, normed(pool.norm, pooled)))[:, 0]
