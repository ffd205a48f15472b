"""The cached tail is the full forward: of every kind of backbone, from every layer, and from what enters block 0."""

import json
from dataclasses import fields
from typing import Any

import pytest
import tiny_timm
import torch
from torch import Tensor

from vcache.extract.backbone import FrozenBackbone, UnsupportedBackbone, load_backbone
from vcache.heads.aim import AIM
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape

L, D, E, SIZE = 3, 48, 20, 32
CLIP = {"image_size": SIZE, "patch_size": 8, "width": D, "layers": L, "head_width": 12, "norm_kwargs": {"eps": 1e-4}}
TIMM = ["tiny_eva01", "tiny_eva02", "tiny_eva02_e", "tiny_eva_scaled", "tiny_clip", "tiny_siglip", "tiny_mci"]
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "quick_gelu": (CLIP, True),
    "gelu": (CLIP, False),
    "gelu_tanh": ({**CLIP, "act_kwargs": {"approximate": "tanh"}}, False),
    "layer_scale": ({**CLIP, "ls_init_value": 0.3}, True),
    "no_ln_pre": ({**CLIP, "no_ln_pre": True}, True),
    **{name: (tiny_timm.vision(name), False) for name in TIMM},
}


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenBackbone:
    """With no weight as it is initialised."""
    vision, quick_gelu = KINDS[request.param]
    embed = D if request.param == "tiny_siglip" else E
    folder = tmp_path_factory.mktemp("clip")
    config = {"model_cfg": {"embed_dim": embed, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": {}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    made = load_backbone(f"local-dir:{folder}", None, random_weights=True)
    generator = torch.Generator().manual_seed(4)
    for parameter in made.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """2 clips of 3 frames."""
    return torch.randn(2, 3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(8))


def shape_of(backbone: FrozenBackbone, num_blocks: int) -> TailShape:
    facts, of_block = backbone.tail_facts(), {field.name for field in fields(BlockShape)}
    block = BlockShape(**{name: fact for name, fact in facts.items() if name in of_block})
    of_tail = {name: fact for name, fact in facts.items() if name not in of_block}
    return TailShape(num_blocks=num_blocks, block=block, **of_tail)


def tail_of(backbone: FrozenBackbone, num_blocks: int) -> FrozenTail:
    return FrozenTail.of(shape_of(backbone, num_blocks), backbone.tail_weights(num_blocks))


def cached(backbone: FrozenBackbone, clips: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the top blocks, what leaves them, and the embedding."""
    first = L - num_blocks
    taps = backbone(clips.flatten(0, 1), tokens=(L - 1,), inputs=(first,))
    entering, left, embed = (
        x.unflatten(0, clips.shape[:2]) for x in (taps.inputs[first], taps.tokens[L - 1], taps.embed)
    )
    return entering, left, embed


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_the_cached_tail_is_the_full_forward(backbone: FrozenBackbone, clips: Tensor, num_blocks: int) -> None:
    entering, left, embed = cached(backbone, clips, num_blocks)
    tail = tail_of(backbone, num_blocks)
    x = entering
    for block in tail.top(num_blocks):
        x = block(x)
    scale = left.abs().max().item()
    torch.testing.assert_close(x, left, rtol=1e-5, atol=1e-5 * max(1, scale))
    torch.testing.assert_close(tail.embed(entering, num_blocks), embed, rtol=1e-5, atol=1e-5 * max(1, scale))


def test_a_larger_tail_serves_fewer_blocks(backbone: FrozenBackbone, clips: Tensor) -> None:
    entering, _, embed = cached(backbone, clips, 1)
    torch.testing.assert_close(tail_of(backbone, 3).embed(entering, 1), embed, rtol=1e-5, atol=1e-4)


def test_a_head_that_text_classifies_begins_with_the_backbones_own_embedding(
    backbone: FrozenBackbone, clips: Tensor
) -> None:
    """Of a projection with a bias too; without a projection there is none, and the head says so."""
    entering, _, embed = cached(backbone, clips, 2)
    facts = backbone.facts
    config = AIM.Config(
        num_classes=5,
        num_frames=3,
        width=D,
        num_layers=L,
        embed_dim=facts.embed_dim,
        grid=(4, 4),
        blocks=2,
        classifier="text",
    )
    head = AIM(config).eval()
    if facts.class_token == "own":
        head.set_tail(tail_of(backbone, 2))
        features = ClipFeatures(tokens={-3: entering})
        torch.testing.assert_close(head.embed(features), embed.mean(dim=1), rtol=1e-5, atol=1e-4)
    else:
        with pytest.raises(
            ValueError, match="no class token that is projected .* choose another classifier than 'text'"
        ):
            head.set_tail(tail_of(backbone, 2))


def test_attention_over_time_is_that_of_one_place_in_all_frames(backbone: FrozenBackbone, clips: Tensor) -> None:
    """Of rotated queries and keys too: all frames of a token are at one place, and no rotation is between them."""
    entering, _, _ = cached(backbone, clips, 1)
    (block,) = tail_of(backbone, 1).top(1)
    h = block.ln_1(entering)
    over_time = block.attend_over_time(h)
    assert over_time.shape == h.shape
    place, frames = 5, h[:, :, 5]
    table, block.attn.rope = (
        block.attn.rope,
        None,
    )  # as a sequence of its own, with the mean first where the kind wants one
    sequence = frames if block.shape.class_token else torch.cat([frames.mean(1, keepdim=True), frames], dim=1)
    expected = block.attend(sequence)[:, -3:]
    block.attn.rope = table
    torch.testing.assert_close(over_time[:, :, place], expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_of_every_kind_may_be_kept_in_half_precision(backbone: FrozenBackbone, clips: Tensor) -> None:
    entering, _, embed = cached(backbone, clips, 3)
    weights, shape = backbone.tail_weights(3), shape_of(backbone, 3)
    half = FrozenTail.of(shape, weights, torch.bfloat16)
    norms = {x.dtype for name, x in half.state_dict().items() if ".ln" in f".{name}"}
    assert norms == {torch.float32}
    assert all(x.dtype == torch.float32 for name, x in half.state_dict().items() if name.endswith("rope"))
    assert half.state_dict()["blocks.0.attn.in_proj_weight"].dtype == torch.bfloat16
    difference = (half.embed(entering, 3) - embed).norm() / embed.norm()
    assert 0 < difference < 3e-2


def test_a_patch_embedding_is_given_where_it_is_clips_and_refused_by_name_elsewhere(backbone: FrozenBackbone) -> None:
    if backbone.tower.libraries:
        with pytest.raises(UnsupportedBackbone, match=f"{backbone.facts.model}: .* is not CLIP's patch embedding"):
            backbone.tail_weights(L, stem=True)
    else:
        assert "stem.conv1.weight" in backbone.tail_weights(L, stem=True)
