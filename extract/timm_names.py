"""The weights of timm's blocks under CLIP's names, which the tail of a backbone has.

norm1, norm2 -> ln_1, ln_2, and of post-norm blocks ln_attended, ln_fed
                                attn.norm -> attn.ln_inner      mlp.fc1, fc2 -> mlp.c_fc, c_proj
ls1, gamma_1 -> ls_1.gamma      mlp.norm  -> mlp.ln             mlp.fc1_x, fc1_g -> mlp.c_fc, c_gate
"""

from typing import Any

import torch
from torch import Tensor, nn

from vcache.extract.tower import activation_name


def is_post_norm(block: nn.Module) -> bool:
    return type(block).__name__ == "EvaBlockPostNorm"


def qkv_weights(attention: Any) -> tuple[Tensor, Tensor]:
    """One projection (3*D, D) to queries, keys and values with its bias (3*D,): zeros where there is none."""
    if attention.qkv is None:
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [part.bias if part.bias is not None else torch.zeros_like(part.weight[:, 0]) for part in parts]
        return torch.cat([part.weight for part in parts]).detach(), torch.cat(biases).detach()
    weight = attention.qkv.weight.detach()
    if getattr(attention, "q_bias", None) is not None:
        q, v = attention.q_bias.detach(), attention.v_bias.detach()
        return weight, torch.cat([q, torch.zeros_like(q), v])
    bias = attention.qkv.bias
    return weight, torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()


def block_facts(block: Any) -> dict[str, Any]:
    """What the weights do not tell of how the block is run."""
    gated = hasattr(block.mlp, "fc1_g")
    return {
        "mlp_dim": block.mlp.fc2.in_features,
        "activation": "silu" if gated else activation_name(block.mlp.act),
        "layer_scale": bool(_layer_scales(block)),
        "gated": gated,
        "mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "attention_norm": not isinstance(block.attn.norm, nn.Identity),
        "post_norm": is_post_norm(block),
    }


def block_weights(block: Any) -> dict[str, Tensor]:
    in_proj_weight, in_proj_bias = qkv_weights(block.attn)
    norms = ("ln_attended", "ln_fed") if is_post_norm(block) else ("ln_1", "ln_2")
    return {
        **_named(norms[0], block.norm1),
        **_named(norms[1], block.norm2),
        "attn.in_proj_weight": in_proj_weight,
        "attn.in_proj_bias": in_proj_bias,
        **_named("attn.ln_inner", block.attn.norm),
        **_named("attn.out_proj", block.attn.proj),
        **_mlp_weights(block.mlp, "mlp."),
        **_layer_scales(block),
    }


def attention_pool_weights(pool: Any) -> dict[str, Tensor]:
    """Of AttentionPoolLatent: its query is a constant, and here it is behind its projection."""
    query = pool.q(pool.latent[0]).detach()  # (1, D)
    return {
        "query": query,
        **_named("kv", pool.kv),
        **_named("out_proj", pool.proj),
        **_named("ln", pool.norm),
        **_mlp_weights(pool.mlp, "mlp."),
    }


def _mlp_weights(mlp: Any, prefix: str) -> dict[str, Tensor]:
    gated = hasattr(mlp, "fc1_g")
    return {
        **_named(f"{prefix}c_fc", mlp.fc1_x if gated else mlp.fc1),
        **(_named(f"{prefix}c_gate", mlp.fc1_g) if gated else {}),
        **_named(f"{prefix}ln", mlp.norm),
        **_named(f"{prefix}c_proj", mlp.fc2),
    }


def _layer_scales(block: Any) -> dict[str, Tensor]:
    """Of timm's ViT in ls1 and ls2, of its EVA in gamma_1 and gamma_2; empty where the block has none."""
    if isinstance(getattr(block, "ls1", None), nn.Module):
        found = {"ls_1": getattr(block.ls1, "gamma", None), "ls_2": getattr(block.ls2, "gamma", None)}
    else:
        found = {"ls_1": getattr(block, "gamma_1", None), "ls_2": getattr(block, "gamma_2", None)}
    return {f"{name}.gamma": gamma.detach() for name, gamma in found.items() if gamma is not None}


def _named(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
