"""Every model of open_clip is tapped or refused by name, without weights and without memory."""

import json

import open_clip
import pytest

from vcache.extract.backbone import UnsupportedBackbone, check_backbone

OWN, MEAN = "own", "mean of patches"
# blocks, width, heads, patch, image, channels of the embedding, what is first
TAPPED = {
    "ViT-B-32": (12, 768, 12, 32, 224, 512, OWN),
    "ViT-B-32-plus-256": (12, 896, 14, 32, 256, 640, OWN),
    "ViT-B-16": (12, 768, 12, 16, 224, 512, OWN),
    "ViT-L-14": (24, 1024, 16, 14, 224, 768, OWN),
    "ViT-L-14-336": (24, 1024, 16, 14, 336, 768, OWN),
    "ViT-H-14": (32, 1280, 16, 14, 224, 1024, OWN),
    "ViT-bigG-14": (48, 1664, 16, 14, 224, 1280, OWN),
    "ViT-M-16-alt": (12, 512, 8, 16, 224, 384, OWN),
    "xlm-roberta-base-ViT-B-32": (12, 768, 12, 32, 224, 512, OWN),
    "coca_base": (12, 768, 12, 18, 288, 512, OWN),
    "EVA01-g-14": (40, 1408, 16, 14, 224, 1024, OWN),
    "EVA02-B-16": (12, 768, 12, 16, 224, 512, OWN),
    "EVA02-L-14-336": (24, 1024, 16, 14, 336, 768, OWN),
    "EVA02-E-14-plus": (64, 1792, 16, 14, 224, 1024, OWN),
    "MobileCLIP-B": (12, 768, 12, 16, 224, 512, OWN),
    "MobileCLIP2-L-14": (24, 1024, 16, 14, 224, 768, OWN),
    "ViT-B-16-SigLIP": (12, 768, 12, 16, 224, 768, MEAN),
    "ViT-B-32-SigLIP2-256": (12, 768, 12, 32, 256, 768, MEAN),
    "ViT-SO400M-14-SigLIP-384": (27, 1152, 16, 14, 384, 1152, MEAN),
    "ViT-gopt-16-SigLIP2-384": (40, 1536, 16, 16, 384, 1536, MEAN),
}
REFUSED = {
    "RN50-quickgelu": "a ModifiedResNet",
    "coca_ViT-B-32": "a VisionTransformer with an AttentionalPooler",
    "ViT-L-14-CLIPA": "a VisionTransformer that pools by 'avg', not by its class token",
    "convnext_tiny": "a TimmModel (convnext_tiny) that is a ConvNeXt",
    "MobileCLIP-S1": "a TimmModel (fastvit_mci1) that is a FastVit",
    "swin_base_patch4_window7_224": "a TimmModel (swin_base_patch4_window7_224) that is a SwinTransformer",
    "vit_relpos_medium_patch16_cls_224": "that is a VisionTransformerRelPos",
    "vit_medium_patch16_gap_256": "without a class token that pools by 'avg'",
    "ViTamin-S": "a TimmModel (vitamin_small_224) without a class token",
    "PE-Core-T-16-384": "a TimmModel (vit_pe_core_tiny_patch16_384) that pools by 'map', not by its class token",
}
# Models of one of these differ in sizes alone, or in the text tower.
FAMILIES = ("convnext_", "fastvit_", "vitamin_", "vit_pe_core_")


@pytest.mark.parametrize("model", TAPPED)
def test_sizes_of_a_model_are_known_without_its_weights(model: str) -> None:
    facts = check_backbone(model, None)
    sizes = (facts.num_layers, facts.width, facts.num_heads, facts.patch_size, facts.image_size, facts.embed_dim)
    assert (facts.model, *sizes, facts.class_token) == (model, *TAPPED[model])
    side = facts.image_size // facts.patch_size
    assert (facts.grid, facts.num_tokens, facts.head_dim * facts.num_heads) == (
        (side, side),
        side**2 + 1,
        facts.width,
    )


@pytest.mark.parametrize("model", REFUSED)
def test_other_image_towers_are_refused_by_name(model: str) -> None:
    with pytest.raises(UnsupportedBackbone) as error:
        check_backbone(model, None)
    assert str(error.value).startswith(f"{model}: its image tower is ")
    assert REFUSED[model] in str(error.value) and "; vcache taps open_clip's VisionTransformer" in str(error.value)


def kind(model: str) -> str:
    """What of the configuration decides, without sizes."""
    vision = open_clip.get_model_config(model)["vision_cfg"]
    name = vision.get("timm_model_name")
    if name:
        return next((family for family in FAMILIES if name.startswith(family)), name)
    sizes = (
        "image_size",
        "width",
        "patch_size",
        "head_width",
        "mlp_ratio",
        *(() if _is_resnet(vision) else ("layers",)),
    )
    return json.dumps({key: value for key, value in vision.items() if key not in sizes}, sort_keys=True)


def _is_resnet(vision: dict[str, object]) -> bool:
    return isinstance(vision.get("layers"), list)


def test_every_kind_of_model_in_open_clip_is_looked_at() -> None:
    """One that a new release of open_clip brings is to be put into one of the tables."""
    seen = {kind(model) for model in (*TAPPED, *REFUSED)}
    unseen = {model for model in open_clip.list_models() if kind(model) not in seen}
    families = ("eva_giant", "eva02_", "vit_base_mci", "siglip")
    assert {m for m in unseen if not any(family in kind(m) for family in families) and "[" not in kind(m)} == set()


@pytest.mark.slow
@pytest.mark.parametrize("model", open_clip.list_models())
def test_every_model_is_tapped_or_refused_with_a_reason(model: str) -> None:
    try:
        facts = check_backbone(model, None)
    except UnsupportedBackbone as error:
        assert str(error).startswith(f"{model}: its image tower is a ")
    else:
        assert facts.num_tokens == facts.grid[0] * facts.grid[1] + 1
