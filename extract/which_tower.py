"""Which image towers are run: builds one of open_clip's configuration, and refuses by name what `Tower` does not compute."""

from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from vcache.extract.clip_tower import ClipTower, clip_departure
from vcache.extract.timm_departure import timm_departure
from vcache.extract.timm_tower import TimmTower
from vcache.extract.tower import Tower
from vcache.extract.weights import Architecture, UnsupportedBackbone

WHAT_WORKS = (
    "vcache taps open_clip's VisionTransformer with a class token and plain attention blocks (ViT-B-32, ViT-B-16, ViT-L-14 and "
    "their kind, from OpenAI, LAION, DataComp, MetaCLIP or DFN), and of timm's towers EVA-CLIP (EVA01-*, EVA02-*), SigLIP and "
    "SigLIP2, MobileCLIP-B, MobileCLIP2-B and MobileCLIP2-L-14"
)


def build_tower(architecture: Architecture) -> nn.Module:
    """On the device of the context; its weights are random.

    Raises:
        UnsupportedBackbone: open_clip cannot build it.
    """
    no_text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    try:
        clip = open_clip.CLIP(
            embed_dim=architecture.embed_dim,
            vision_cfg=open_clip.CLIPVisionCfg(**architecture.vision),
            text_cfg=no_text,  # open_clip has no public way to build the image tower alone
            quick_gelu=architecture.quick_gelu,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UnsupportedBackbone(
            f"{architecture.name}: open_clip cannot build its image tower: {type(error).__name__} {error}."
        ) from error
    visual: nn.Module = clip.visual
    return visual


def tower_of(visual: nn.Module) -> Tower:
    """The parts of a tower that `check_supported` lets pass."""
    return TimmTower(visual) if isinstance(visual, TimmModel) else ClipTower(visual)


def check_supported(visual: nn.Module, architecture: Architecture) -> None:
    """
    Raises:
        UnsupportedBackbone: the tower computes something that `Tower` does not; the message names what.
    """
    if type(visual) is TimmModel:
        odd = timm_departure(visual)
        kind = f"a TimmModel ({architecture.vision.get('timm_model_name')})"
    elif type(visual) is VisionTransformer:
        odd, kind = clip_departure(visual), "a VisionTransformer"
    else:
        odd, kind = f"a {type(visual).__name__}", ""
    if odd:
        raise UnsupportedBackbone(f"{architecture.name}: its image tower is {f'{kind} {odd}'.strip()}; {WHAT_WORKS}.")


def fill_buffers(visual: Any) -> None:
    """Give memory and values to the buffers of a tower from the meta device that no checkpoint holds: EVA's rotation."""
    for module in visual.modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in empty.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if empty:
            module.init_non_persistent_buffers()
