"""The taps are those of the official EVL, of open_clip and of transformers, with the same weights."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vcache.extract.backbone import BackboneFacts, FrozenBackbone, Taps, UnsupportedBackbone, load_backbone
from vcache.extract.layers import LayerError
from vcache.extract.weights import find_architecture

PACKAGED_CLIP = Path(__file__).parents[2] / "pipelines" / "demo" / "tiny_clip"

# batch, blocks, heads, head width, tokens (4 x 4 patches and CLS), embedding: all different
B, L, H, D_HEAD, N, E = 5, 3, 4, 12, 17, 20
D = H * D_HEAD
VISION = {"image_size": 32, "patch_size": 8, "width": D, "layers": L, "head_width": D_HEAD}
ALL = range(L)

GoldenClip = Callable[..., tuple[Path, dict[str, np.ndarray]]]


def draw_weights(like: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """No weight as it is initialised: a LayerNorm of ones and biases of zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: like[name] + 0.1 * torch.randn(like[name].shape, generator=generator) for name in sorted(like)}


def seeded_weights(quick_gelu: bool) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        like = build_visual(VISION, quick_gelu=quick_gelu).state_dict()
    return draw_weights(like, seed=6)


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def quick_gelu(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def backbone(quick_gelu: bool, clip_folder: Callable[..., Path]) -> FrozenBackbone:
    """3 blocks of width 48 on images of 32 pixels."""
    folder = clip_folder(VISION, seeded_weights(quick_gelu), embed_dim=E, quick_gelu=quick_gelu)
    return load_backbone(f"local-dir:{folder}", None)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(8))


def build_visual(vision: dict[str, object], *, quick_gelu: bool) -> VisionTransformer:
    text = open_clip.CLIPTextCfg(context_length=3, vocab_size=5, width=8, heads=2, layers=1)
    return open_clip.CLIP(E, open_clip.CLIPVisionCfg(**vision), text, quick_gelu=quick_gelu).visual.eval()


def run_all(backbone: FrozenBackbone, images: Tensor) -> Taps:
    return backbone(images, tokens=tuple(ALL), qk=tuple(ALL))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_enters_a_block_and_its_weights_give_its_queries_and_keys(
    backbone: FrozenBackbone, images: Tensor
) -> None:
    taps = backbone(images, tokens=[0, 1], qk=ALL, inputs=ALL)
    for layer in ALL:
        if layer:
            assert torch.equal(taps.inputs[layer], taps.tokens[layer - 1])
        ln_weight, ln_bias, weight, bias = backbone.query_key_weights(layer)
        h = nn.functional.layer_norm(taps.inputs[layer], (D,), ln_weight, ln_bias, backbone.facts.layer_norm_eps)
        projected = (h @ weight.T + bias).view(B, N, 2, H, D_HEAD)
        close(projected[:, :, 0].transpose(1, 2), taps.q[layer])
        close(projected[:, :, 1].transpose(1, 2), taps.k[layer])


def test_official_evl_backbone_gives_the_same_tokens_queries_keys_and_embedding(golden_clip: GoldenClip) -> None:
    folder, golden = golden_clip("evl_backbone_taps")
    backbone = load_backbone(f"local-dir:{folder}", None)
    taps = run_all(backbone, torch.from_numpy(golden["in/image"]))
    for layer in ALL:
        close(taps.tokens[layer], torch.from_numpy(golden[f"out/block{layer}/out"]))
        for name, tap in (("q", taps.q[layer]), ("k", taps.k[layer])):
            close(
                tap.transpose(1, 2), torch.from_numpy(golden[f"out/block{layer}/{name}"])
            )  # the golden is (B, N, H, d)
    close(taps.embed, torch.from_numpy(golden["out/clip_image_embedding"]))


def test_a_clip_of_the_official_video_is_a_batch_of_its_frames(golden_clip: GoldenClip) -> None:
    folder, golden = golden_clip("evl_end2end", prefix="w/clip.visual.")
    backbone = load_backbone(f"local-dir:{folder}", None)
    video = torch.from_numpy(golden["in/video"]).transpose(1, 2)  # (B, T, 3, S, S)
    taps = backbone(video.flatten(0, 1), tokens=(1, 2), qk=(1, 2))
    frame = backbone(video[1, 2][None], tokens=(1, 2), qk=(1, 2))
    assert taps.tokens[2].shape == (2 * 4, 10, 64)
    close(taps.tokens[1][1 * 4 + 2], frame.tokens[1][0])
    close(taps.q[2][1 * 4 + 2], frame.q[2][0])


def test_tokens_and_embedding_are_those_of_open_clips_own_forward(backbone: FrozenBackbone, images: Tensor) -> None:
    taps = run_all(backbone, images)
    with torch.no_grad():
        own = backbone.visual.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
        close(taps.embed, backbone.visual(images))
    close(taps.embed, own["image_features"])
    for layer in ALL:
        close(taps.tokens[layer][:, 1:], own["image_intermediates"][layer])
        close(taps.tokens[layer][:, :1], own["image_intermediates_prefix"][layer])


def test_queries_and_keys_are_those_of_open_clips_attention(backbone: FrozenBackbone, images: Tensor) -> None:
    """Against the maps that nn.MultiheadAttention itself returns, and the projections of what it was given."""
    given: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
        for block in backbone.visual.transformer.resblocks
    ]
    with torch.no_grad():
        backbone.visual(images)
    for hook in hooks:
        hook.remove()
    taps = run_all(backbone, images)
    for layer, block in enumerate(backbone.visual.transformer.resblocks):
        W_q, W_k, _ = block.attn.in_proj_weight.chunk(3)
        b_q, b_k, _ = block.attn.in_proj_bias.chunk(3)
        close(taps.q[layer], (given[layer] @ W_q.T + b_q).view(B, N, H, D_HEAD).transpose(1, 2))
        close(taps.k[layer], (given[layer] @ W_k.T + b_k).view(B, N, H, D_HEAD).transpose(1, 2))
        with torch.no_grad():
            _, maps = block.attn(*[given[layer]] * 3, average_attn_weights=False)
        close((taps.q[layer] @ taps.k[layer].transpose(2, 3) / D_HEAD**0.5).softmax(-1), maps)


def test_taps_are_those_of_transformers(backbone: FrozenBackbone, quick_gelu: bool, images: Tensor) -> None:
    model = as_transformers(backbone.visual, quick_gelu=quick_gelu)
    with torch.no_grad():
        out = model(images, output_hidden_states=True)
    taps = run_all(backbone, images)
    close(taps.embed, out.image_embeds)
    vision = model.vision_model
    for layer in ALL:
        close(taps.tokens[layer], out.hidden_states[layer + 1])  # hidden_states[0] is the input of block 0
        block = vision.encoder.layers[layer]
        with torch.no_grad():
            normed = block.layer_norm1(out.hidden_states[layer])
            for tap, project in ((taps.q[layer], block.self_attn.q_proj), (taps.k[layer], block.self_attn.k_proj)):
                close(tap, project(normed).view(B, N, H, D_HEAD).transpose(1, 2))


def as_transformers(visual: VisionTransformer, *, quick_gelu: bool) -> CLIPVisionModelWithProjection:
    """The same weights in transformers' model."""
    config = CLIPVisionConfig(
        hidden_size=D,
        intermediate_size=4 * D,
        num_hidden_layers=L,
        num_attention_heads=H,
        image_size=32,
        patch_size=8,
        projection_dim=E,
        hidden_act="quick_gelu" if quick_gelu else "gelu",
        layer_norm_eps=1e-5,
    )
    ours = visual.state_dict()
    state = {"visual_projection.weight": ours.pop("proj").T}
    plain = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    renamed = {
        "ln_pre.": "pre_layrnorm.",
        "ln_post.": "post_layernorm.",
        "transformer.resblocks.": "encoder.layers.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".attn.": ".self_attn.",
        ".c_fc.": ".fc1.",
        ".c_proj.": ".fc2.",
    }
    for name, tensor in ours.items():
        target = plain.get(name, name)
        for old, new in renamed.items():
            target = target.replace(old, new)
        if "in_proj_" in target:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state["vision_model." + target.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            state["vision_model." + target] = tensor
    model = CLIPVisionModelWithProjection(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"ls_init_value": 0.3, "no_ln_pre": True, "norm_kwargs": {"eps": 1e-3}, "patch_dropout": 0.5},
        {"act_kwargs": {"approximate": "tanh"}, "final_ln_after_pool": True},
        {"pos_embed_type": "sin_cos_2d", "mlp_ratio": 2.5, "block_type": "default"},
    ],
)
def test_settings_of_the_vision_config_follow_open_clip(
    settings: dict[str, object], clip_folder: Callable[..., Path], images: Tensor
) -> None:
    vision = {**VISION, **settings}
    weights = draw_weights(build_visual(vision, quick_gelu=False).state_dict(), seed=9)
    backbone = load_backbone(f"local-dir:{clip_folder(vision, weights, embed_dim=E, quick_gelu=False)}", None)
    close(run_all(backbone, images).embed, backbone.visual(images))


def test_every_setting_of_open_clips_vision_config_is_followed_or_refused() -> None:
    """A new release may add one, which would else pass unseen."""
    sizes = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
    followed = {"ls_init_value", "no_ln_pre", "pos_embed_type", "final_ln_after_pool", "act_kwargs", "norm_kwargs"}
    of_custom_blocks = {"qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"}
    refused = {"attentional_pool", "pool_type", "block_type", *of_custom_blocks}
    of_the_pooler, of_training = {"attn_pooler_queries", "attn_pooler_heads"}, {"patch_dropout", "output_tokens"}
    timm = {
        f"timm_{name}" for name in ("model_name", "model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")
    }
    names = {field.name for field in dataclasses.fields(open_clip.CLIPVisionCfg)}
    assert names <= sizes | followed | refused | of_the_pooler | of_training | timm


def test_weights_of_a_file_are_preprocessed_as_the_tags_of_their_timm_tower(tmp_path: Path) -> None:
    config = load_preprocessing("ViT-B-32-SigLIP2-256", str(tmp_path / "weights.safetensors"))
    assert (config["mean"], config["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")
    assert load_preprocessing("ViT-B-32", str(tmp_path / "weights.safetensors")) == {}


def load_preprocessing(model: str, pretrained: str) -> dict[str, object]:
    return find_architecture(model, pretrained).preprocess


def test_a_row_does_not_depend_on_its_neighbours(backbone: FrozenBackbone, images: Tensor) -> None:
    batch = run_all(backbone, images)
    for row in range(B):
        alone = run_all(backbone, images[row : row + 1])
        for kind in ("tokens", "q", "k"):
            for layer in ALL:
                pair = getattr(alone, kind)[layer][0], getattr(batch, kind)[layer][row]
                torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.embed[0], batch.embed[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "qk"), [((), ()), ((2,), (0,)), ((1, 0), ()), ((), (2, 1))])
def test_only_what_was_asked_is_kept_and_asking_changes_nothing(
    backbone: FrozenBackbone, images: Tensor, tokens: Sequence[int], qk: Sequence[int]
) -> None:
    taps, everything = backbone(images, tokens=tokens, qk=qk), run_all(backbone, images)
    assert (set(taps.tokens), set(taps.q), set(taps.k)) == (set(tokens), set(qk), set(qk))
    for layer in tokens:
        assert torch.equal(taps.tokens[layer], everything.tokens[layer])
    for layer in qk:
        assert torch.equal(taps.q[layer], everything.q[layer]) and torch.equal(taps.k[layer], everything.k[layer])
    assert torch.equal(taps.embed, everything.embed)


HALF = {"float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_taps_are_those_of_open_clips_own_half_precision_model(
    precision: str, quick_gelu: bool, clip_folder: Callable[..., Path], images: Tensor
) -> None:
    weights = seeded_weights(quick_gelu)
    folder = clip_folder(VISION, weights, embed_dim=E, quick_gelu=quick_gelu)
    half = load_backbone(f"local-dir:{folder}", None, precision=precision)
    dtype = getattr(torch, precision)
    text = open_clip.CLIPTextCfg(context_length=3, vocab_size=5, width=8, heads=2, layers=1)
    clip = open_clip.CLIP(E, open_clip.CLIPVisionCfg(**VISION), text, quick_gelu=quick_gelu, cast_dtype=dtype).eval()
    clip.visual.load_state_dict(weights)
    open_clip.model.convert_weights_to_lp(clip, dtype)
    tokens: list[Tensor] = []
    for block in clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: tokens.append(output))

    with torch.no_grad():
        embed = clip.visual(images.to(dtype))
    taps = run_all(half, images)

    for layer in ALL:
        assert taps.tokens[layer].dtype == taps.q[layer].dtype == taps.k[layer].dtype == taps.embed.dtype == dtype
        assert relative(taps.tokens[layer], tokens[layer]) < HALF[precision]
    assert relative(taps.embed, embed) < HALF[precision]


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_is_near_full_precision_and_keeps_layer_norms_and_the_digest(
    precision: str, clip_folder: Callable[..., Path], images: Tensor
) -> None:
    folder = clip_folder(VISION, seeded_weights(True), embed_dim=E, quick_gelu=True)
    half, whole = (load_backbone(f"local-dir:{folder}", None, precision=name) for name in (precision, "float32"))

    taps, full = run_all(half, images), run_all(whole, images)

    assert half.weights_sha256 == whole.weights_sha256
    assert all(norm.weight.dtype == torch.float32 for norm in half.modules() if isinstance(norm, nn.LayerNorm))
    for layer in ALL:
        for kind in ("tokens", "q", "k"):
            assert 0 < relative(getattr(taps, kind)[layer], getattr(full, kind)[layer]) < HALF[precision]


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return difference.item()


def test_the_backbone_stays_frozen(backbone: FrozenBackbone, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    given = images.clone()
    model = nn.Sequential(backbone).train().requires_grad_(False)
    assert not any(module.training for module in model[0].modules())
    taps = run_all(backbone, images.requires_grad_())
    assert not taps.embed.requires_grad and not taps.tokens[0].requires_grad
    torch.testing.assert_close(images.detach_(), given, rtol=0, atol=0)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    # A head may train on them: tensors of inference mode could not be saved for backward.
    (taps.embed @ torch.ones(E, 2, requires_grad=True)).sum().backward()


def test_facts_are_those_of_the_configuration(backbone: FrozenBackbone) -> None:
    assert backbone.facts == BackboneFacts(
        model=backbone.facts.model,
        num_layers=L,
        width=D,
        num_heads=H,
        head_dim=D_HEAD,
        patch_size=8,
        image_size=32,
        grid=(4, 4),
        num_tokens=N,
        embed_dim=E,
        layer_norm_eps=1e-5,
    )
    assert backbone.device == torch.device("cpu")


def test_facts_of_named_models_agree_with_open_clip() -> None:
    facts = load_backbone("ViT-B/32", None, random_weights=True).facts
    assert (facts.model, facts.num_layers, facts.width, facts.num_heads) == ("ViT-B-32", 12, 768, 12)
    assert (facts.grid, facts.num_tokens, facts.embed_dim, facts.head_dim) == ((7, 7), 50, 512, 64)


def test_only_the_image_tower_is_kept(tiny_clip: Path) -> None:
    backbone = load_backbone(f"local-dir:{tiny_clip}", None)
    whole = open_clip.create_model(f"local-dir:{tiny_clip}")
    assert set(backbone.state_dict()) == {f"visual.{name}" for name in whole.visual.state_dict()}
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in backbone.parameters()} == {"cpu"}


def test_weights_and_preprocessing_are_those_that_open_clip_loads(tiny_clip: Path, images: Tensor) -> None:
    backbone = load_backbone(f"local-dir:{tiny_clip}", None)
    whole = open_clip.create_model(f"local-dir:{tiny_clip}").eval()
    assert backbone.preprocess_config == whole.visual.preprocess_cfg
    assert backbone.preprocess_config["mean"] == [0.5, 0.4, 0.3] and backbone.preprocess_config["size"] == (32, 32)
    torch.testing.assert_close(dict(backbone.visual.state_dict()), dict(whole.visual.state_dict()), rtol=0, atol=0)
    with torch.no_grad():
        close(backbone(images).embed, whole.encode_image(images))


def test_a_folder_keeps_its_model_name_when_it_moves_and_changes_it_with_the_configuration(
    tiny_clip: Path, tmp_path: Path
) -> None:
    def name(folder: str, **changes: object) -> str:
        config = json.loads((tiny_clip / "open_clip_config.json").read_text())
        config["model_cfg"] |= changes
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "open_clip_config.json").write_text(json.dumps(config))
        return load_backbone(f"local-dir:{tmp_path / folder}", None, random_weights=True).facts.model

    first = name("first")
    assert first.startswith("ViT-8-32px-")
    assert name("second") == first
    assert name("third", quick_gelu=False) != first  # the weights do not tell these two apart
    assert (
        name("fourth", vision_cfg={"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16})
        != first
    )


def test_images_of_another_size_and_relative_layers_are_refused(backbone: FrozenBackbone, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images \(1, 3, 40, 40\) must be \(B, 3, 32, 32\) for ViT-8-32px"):
        backbone(torch.zeros(1, 3, 40, 40))
    for layer in (-1, 3):
        with pytest.raises(LayerError, match=f"layer {layer} must be absolute, 0 to 2 of ViT-8-32px"):
            backbone(images, tokens=(0, layer))


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"qk_norm": True}, "a VisionTransformer of CustomResidualAttentionBlock"),
        ({"scaled_cosine_attn": True}, "a VisionTransformer of CustomResidualAttentionBlock"),
        ({"scale_heads": True}, "a VisionTransformer of CustomResidualAttentionBlock"),
        ({"scale_attn_inner": True}, "a VisionTransformer of CustomResidualAttentionBlock"),
        ({"scale_attn": True}, "a VisionTransformer of CustomResidualAttentionBlock"),
        ({"scale_fc": True}, "a VisionTransformer of CustomResidualAttentionBlock"),
        ({"block_type": "custom"}, "a VisionTransformer of CustomResidualAttentionBlock"),
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "with an AttentionalPooler"),
        ({"attentional_pool": "parallel", "attn_pooler_heads": 4}, "with an AttentionalPooler"),
        ({"pool_type": "avg"}, "pools by 'avg', not by its class token"),
        ({"pool_type": "none"}, "pools by 'none', not by its class token"),
        ({"image_size": [32, 16]}, "images of 32 x 16, not square"),
        ({"patch_size": [8, 4]}, "patches of 8 x 4, not square"),
        ({"norm_kwargs": {"elementwise_affine": False}}, "whose LayerNorms have no weights"),
        ({"norm_kwargs": {"bias": False}}, "whose LayerNorms have no weights"),
        ({"act_kwargs": {"approximate": "tanh"}}, "open_clip cannot build its image tower: TypeError"),
        ({"width": 50}, "open_clip cannot build its image tower: AssertionError"),
        ({"layers": [1, 1, 1, 1]}, "its image tower is a ModifiedResNet"),
    ],
)
def test_other_blocks_and_shapes_are_refused_by_name(
    change: dict[str, object], culprit: str, clip_folder: Callable[..., Path]
) -> None:
    folder = clip_folder({**VISION, **change}, {"proj": torch.zeros(1)})  # refused before the weights are looked at
    with pytest.raises(UnsupportedBackbone, match=culprit):
        load_backbone(f"local-dir:{folder}", None)


def test_the_packaged_tiny_clip_loads() -> None:
    backbone = load_backbone(f"local-dir:{PACKAGED_CLIP}", None)
    taps = backbone(torch.zeros(2, 3, 64, 64), tokens=(3,), qk=(3,))
    assert backbone.facts.num_layers == 4 and taps.tokens[3].shape == (2, 65, 128) and taps.q[3].shape == (2, 4, 65, 32)
    assert backbone.preprocess_config["std"] == [0.25, 0.25, 0.25]
