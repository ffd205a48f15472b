"""What of a timm tower `TimmTower` does not compute: it is refused by name, before weights are looked for.

Taps need a residual stream of tokens with plain blocks: LayerNorms, softmax attention of its own queries and keys, and an MLP.
"""

from typing import Any

from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vcache.extract.tower import activation_name, is_layer_norm

_BLOCKS = {Block: Attention, EvaBlock: EvaAttention, EvaBlockPostNorm: EvaAttention}
_PATCHES = ("PatchEmbed", "HybridEmbed")


def timm_departure(visual: Any) -> str:
    """Words that go behind "a TimmModel (its name)"; empty if `TimmTower` computes all of the tower."""
    trunk = visual.trunk
    if type(trunk) not in (VisionTransformer, Eva):
        return f"that is a {type(trunk).__name__}"
    behind = "with a projection of open_clip's behind it" if len(visual.head) else ""
    return _stem_departure(visual) or _pool_departure(trunk) or _block_departure(trunk.blocks) or behind


def _stem_departure(visual: Any) -> str:
    trunk = visual.trunk
    embed, rope, size = trunk.patch_embed, getattr(trunk, "rope", None), tuple(visual.image_size)
    if type(embed).__name__ not in _PATCHES or not isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity):
        return f"whose patches are made by a {type(embed).__name__}"
    if getattr(trunk, "reg_token", None) is not None:
        return "with register tokens"
    if rope is not None and (type(rope) is not RotaryEmbeddingCat or getattr(rope, "pos_embed", None) is None):
        return f"with {type(rope).__name__}"
    if size != tuple(embed.img_size) or size[0] != size[1] or trunk.dynamic_img_size:
        return f"for images of {embed.img_size[0]} x {embed.img_size[1]}, not a fixed square of {size[0]}"
    return ""


def _pool_departure(trunk: Any) -> str:
    pool, has_class_token = trunk.attn_pool, trunk.cls_token is not None
    if has_class_token and trunk.global_pool != "token":
        return f"that pools by {trunk.global_pool!r}, not by its class token"
    if not has_class_token and (trunk.global_pool != "map" or not _is_plain_pool(pool)):
        return f"without a class token that pools by {trunk.global_pool!r}"
    if not is_layer_norm(trunk.norm) or not isinstance(trunk.fc_norm, nn.Identity):
        return "without a LayerNorm behind its last block"
    return ""


def _is_plain_pool(pool: Any) -> bool:
    """One query behind a projection, an output and an MLP."""
    return (
        type(pool) is AttentionPoolLatent
        and (pool.latent_len, pool.pool) == (1, "token")
        and pool.pos_embed is None
        and all(isinstance(norm, nn.Identity) for norm in (pool.q_norm, pool.k_norm))
        and isinstance(pool.q, nn.Linear)
        and pool.mlp is not None
        and is_layer_norm(pool.norm)
    )


def _block_departure(blocks: Any) -> str:
    kinds = {type(block) for block in blocks}
    if len(kinds) > 1 or not kinds <= _BLOCKS.keys():
        return f"of {', '.join(sorted(kind.__name__ for kind in kinds))}"
    (kind,) = kinds
    attentions = {type(block.attn) for block in blocks}
    if attentions != {_BLOCKS[kind]}:
        return f"of blocks with {', '.join(sorted(attention.__name__ for attention in attentions))}"
    return _attention_departure(blocks[0].attn) or _mlp_departure(blocks[0])


def _attention_departure(attention: Any) -> str:
    if not all(isinstance(norm, nn.Identity) for norm in (attention.q_norm, attention.k_norm)):
        return "that normalises queries and keys"
    if getattr(attention, "gate", None) is not None or getattr(attention, "rotate_half", False):
        return "with gated attention or another rotation"
    if attention.num_heads * attention.head_dim != attention.proj.out_features or attention.proj.bias is None:
        return "whose heads are not as wide as its tokens, or have no biases"
    return ""


def _mlp_departure(block: Any) -> str:
    mlp, inner = block.mlp, (block.attn.norm, block.mlp.norm)
    if type(mlp) not in (Mlp, SwiGLU):
        return f"of blocks with {type(mlp).__name__}"
    if type(mlp) is Mlp and not activation_name(mlp.act):
        return f"with the activation {type(mlp.act).__name__}"
    norms = [block.norm1, block.norm2, *(norm for norm in inner if not isinstance(norm, nn.Identity))]
    if not all(map(is_layer_norm, norms)):
        return f"with {', '.join(sorted({type(norm).__name__ for norm in norms}))} for LayerNorm"
    if any(layer.bias is None for layer in mlp.children() if isinstance(layer, nn.Linear)):
        return "of blocks without biases"
    return ""
