"""The taps of timm's towers are those of timm's own forward, of every kind that vcache runs; the others are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny_timm
import torch
from torch import Tensor, nn

from vcache.extract.backbone import FrozenBackbone, UnsupportedBackbone, check_backbone, load_backbone

B, L, H, D, N, E = 2, tiny_timm.DEPTH, tiny_timm.HEADS, tiny_timm.WIDTH, 17, tiny_timm.EMBED
ALL = tuple(range(L))
KINDS = ["tiny_eva01", "tiny_eva02", "tiny_eva02_e", "tiny_eva_scaled", "tiny_clip", "tiny_siglip", "tiny_mci"]
ClipFolder = Callable[..., Path]


@pytest.fixture(scope="module", params=KINDS)
def tower(request: pytest.FixtureRequest, clip_folder: ClipFolder) -> FrozenBackbone:
    return load(request.param, clip_folder)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(8))


def load(name: str, clip_folder: ClipFolder, **settings: Any) -> FrozenBackbone:
    """Through the file of a checkpoint, with no weight as it is initialised."""
    vision = tiny_timm.vision(name, **settings)
    embed = D if name == "tiny_siglip" else E
    like = build(vision, embed).state_dict()
    generator = torch.Generator().manual_seed(6)
    weights = {
        key: like[key] + 0.1 * torch.randn(like[key].shape, generator=generator)
        if like[key].is_floating_point() and "running_var" not in key
        else like[key]
        for key in sorted(like)
    }
    return load_backbone(f"local-dir:{clip_folder(vision, weights, embed_dim=embed, quick_gelu=False)}", None)


def build(vision: dict[str, Any], embed: int) -> nn.Module:
    text = open_clip.CLIPTextCfg(context_length=3, vocab_size=5, width=8, heads=2, layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return open_clip.CLIP(embed, open_clip.CLIPVisionCfg(**vision), text).visual.eval()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def own(tower: FrozenBackbone) -> bool:
    return tower.facts.class_token == "own"


@torch.no_grad()
def test_tokens_and_embedding_are_those_of_timms_own_forward(tower: FrozenBackbone, images: Tensor) -> None:
    taps = tower(images, tokens=ALL)
    close(taps.embed, tower.visual(images))
    found = tower.visual.trunk.forward_intermediates(
        images, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for layer in ALL:
        patches, prefix = found[layer] if own(tower) else (found[layer], None)
        close(taps.tokens[layer][:, 1:], patches if torch.is_tensor(patches) else patches[0])
        if prefix is not None:
            close(taps.tokens[layer][:, :1], prefix)
    assert taps.tokens[0].shape == (B, N, D) == (B, tower.facts.num_tokens, tower.facts.width)


@torch.no_grad()
def test_queries_and_keys_are_those_of_timms_attention(
    tower: FrozenBackbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what timm gives to softmax, seen where it calls it."""
    given: list[tuple[Tensor, Tensor]] = []
    fused = nn.functional.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        given.append((q, k))
        return fused(q, k, v, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", seen)
        tower.visual(images)
    taps = tower(images, qk=ALL)
    first = 0 if own(tower) else 1
    for layer in ALL:
        close(taps.q[layer][:, :, first:], given[layer][0])
        close(taps.k[layer][:, :, first:], given[layer][1])
        assert taps.q[layer].shape == (B, H, N, D // H)


def test_a_tower_without_a_class_token_has_the_mean_of_its_patches_first(
    clip_folder: ClipFolder, images: Tensor
) -> None:
    tower = load("tiny_siglip", clip_folder)
    assert tower.facts.class_token == "mean of patches"
    taps = tower(images, tokens=ALL, qk=ALL, inputs=ALL)
    for stored in (*taps.tokens.values(), *taps.q.values(), *taps.k.values(), *taps.inputs.values()):
        close(stored[..., 0, :], stored[..., 1:, :].mean(dim=-2))


@pytest.mark.parametrize("kind", ["tiny_eva01", "tiny_clip", "tiny_siglip", "tiny_mci"])
def test_what_enters_a_block_gives_its_queries_and_keys_where_nothing_rotates_them(
    kind: str, clip_folder: ClipFolder, images: Tensor
) -> None:
    tower = load(kind, clip_folder)
    taps = tower(images, qk=ALL, inputs=ALL)
    for layer in ALL:
        ln_weight, ln_bias, weight, bias = tower.query_key_weights(layer)
        h = nn.functional.layer_norm(taps.inputs[layer], (D,), ln_weight, ln_bias, tower.facts.layer_norm_eps)
        q, k = (h @ weight.T + bias).view(B, N, 2, H, D // H).transpose(1, 3).unbind(dim=2)
        close(q[:, :, 1:], taps.q[layer][:, :, 1:])
        close(k[:, :, 1:], taps.k[layer][:, :, 1:])


@pytest.mark.parametrize(("kind", "why"), [("tiny_eva02", "are rotated"), ("tiny_eva02_e", "normalise what attention")])
def test_derive_is_refused_where_queries_are_no_projection_of_the_normed_input(
    kind: str, why: str, clip_folder: ClipFolder
) -> None:
    folder = clip_folder(tiny_timm.vision(kind), {"none": torch.zeros(1)}, quick_gelu=False)
    check_backbone(f"local-dir:{folder}", None)
    with pytest.raises(UnsupportedBackbone, match=f"--cross-frame derive: {kind}-.*{why}.*Say --cross-frame qk"):
        check_backbone(f"local-dir:{folder}", None, derive=True)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near_full_precision(
    kind: str, precision: str, clip_folder: ClipFolder, images: Tensor
) -> None:
    folder = clip_folder(tiny_timm.vision(kind), {}, embed_dim=D if kind == "tiny_siglip" else E, quick_gelu=False)
    whole, half = (
        load_backbone(f"local-dir:{folder}", None, random_weights=True, precision=name)
        for name in ("float32", precision)
    )
    taps, full = (backbone(images, tokens=ALL, qk=ALL) for backbone in (half, whole))
    assert half.weights_sha256 == whole.weights_sha256
    for mine, theirs in ((taps.embed, full.embed), (taps.tokens[2], full.tokens[2]), (taps.q[1], full.q[1])):
        assert mine.dtype == getattr(torch, precision)
        assert 0 < float((mine.double() - theirs.double()).norm() / theirs.double().norm()) < 2e-2


@pytest.mark.parametrize(
    ("kind", "culprit"),
    [
        ("tiny_registers", "with register tokens"),
        ("tiny_qk_norm", "that normalises queries and keys"),
        ("tiny_glu", "of blocks with GluMlp"),
        ("tiny_mixed_rope", "with RotaryEmbeddingMixed"),
    ],
)
def test_blocks_that_are_not_plain_are_refused_by_name(kind: str, culprit: str, clip_folder: ClipFolder) -> None:
    folder = clip_folder(tiny_timm.vision(kind), {"none": torch.zeros(1)}, quick_gelu=False)
    with pytest.raises(UnsupportedBackbone, match=rf"a TimmModel \({kind}\) {culprit}; vcache taps"):
        load_backbone(f"local-dir:{folder}", None)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"timm_pool": "avg"}, "that pools by 'avg', not by its class token"),
        ({"timm_proj": "linear"}, "with a projection of open_clip's behind it"),
        ({"image_size": 40}, "for images of 32 x 32, not a fixed square of 40"),
    ],
)
def test_other_settings_of_open_clip_are_refused_by_name(
    settings: dict[str, Any], culprit: str, clip_folder: ClipFolder
) -> None:
    folder = clip_folder(tiny_timm.vision("tiny_clip", **settings), {"none": torch.zeros(1)}, quick_gelu=False)
    with pytest.raises(UnsupportedBackbone, match=culprit):
        load_backbone(f"local-dir:{folder}", None)
