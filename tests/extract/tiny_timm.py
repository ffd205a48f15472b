"""Tiny timm towers that open_clip builds by name, one of each kind that vcache runs: 3 blocks on images of 32 pixels."""

from functools import partial
from typing import Any

from timm.layers import HybridEmbed, LayerNorm
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

EMBED, DEPTH, WIDTH, HEADS = 20, 3, 48, 4
_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.5}
TOKEN, MAP = {"timm_pool": "token", "timm_proj": None}, {"timm_pool": "map", "timm_proj": "none"}
"""open_clip's settings of EVA-CLIP, and of SigLIP."""


@register_model
def tiny_eva01(pretrained: bool = False, **kwargs: Any) -> Eva:
    """As EVA01-g-14: no bias of k."""
    return _tower(Eva, kwargs)


@register_model
def tiny_eva02(pretrained: bool = False, **kwargs: Any) -> Eva:
    """As EVA02-B-16 and -L-14: SwiGLU, inner norms, rotation scaled to another grid."""
    inner = {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    return _tower(Eva, kwargs, **inner, qkv_fused=False, use_rot_pos_emb=True, ref_feat_shape=(3, 3))


@register_model
def tiny_eva02_e(pretrained: bool = False, **kwargs: Any) -> Eva:
    """As EVA02-E-14: norms behind attention and MLP."""
    return _tower(Eva, kwargs, use_post_norm=True)


@register_model
def tiny_eva_scaled(pretrained: bool = False, **kwargs: Any) -> Eva:
    """With LayerScale."""
    return _tower(Eva, kwargs, init_values=0.3)


@register_model
def tiny_clip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As MobileCLIP2-L-14, and with LayerScale."""
    return _tower(VisionTransformer, kwargs, pre_norm=True, norm_layer=partial(LayerNorm, eps=1e-5), init_values=0.3)


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As ViT-gopt-16-SigLIP2: no class token, attention pool, tanh GELU."""
    return _tower(VisionTransformer, kwargs, class_token=False, act_layer="gelu_tanh")


@register_model
def tiny_mci(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As MobileCLIP-B: patches from a stack of convolutions."""
    stem = ConvStem(depth=2, channels=(12, WIDTH), stride=(4, 2), kernel_size=(4, 2), padding=0, act_layer=nn.GELU)
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    return _tower(VisionTransformer, kwargs, embed_layer=embed, no_embed_class=True, patch_size=1)


@register_model
def tiny_registers(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    return _tower(VisionTransformer, kwargs, reg_tokens=2)


@register_model
def tiny_qk_norm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    return _tower(VisionTransformer, kwargs, qk_norm=True)


@register_model
def tiny_glu(pretrained: bool = False, **kwargs: Any) -> Eva:
    return _tower(Eva, kwargs, swiglu_mlp=True)


@register_model
def tiny_mixed_rope(pretrained: bool = False, **kwargs: Any) -> Eva:
    return _tower(Eva, kwargs, use_rot_pos_emb=True, rope_type="mixed")


def vision(name: str, **settings: Any) -> dict[str, Any]:
    """The vision_cfg of open_clip."""
    pool = MAP if name == "tiny_siglip" else TOKEN
    return {"timm_model_name": name, "image_size": 32, **pool, **settings}


def _tower(kind: Any, given: dict[str, Any], **settings: Any) -> Any:
    of_call = {name: given[name] for name in ("num_classes", "global_pool") if name in given}
    tower = kind(**{**_SIZES, **settings, **of_call})
    tower.default_cfg = {}  # which open_clip looks into
    return tower
