"""AIM: the official block and network, the frozen CLIP at initialisation, and the paper's numbers of parameters."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

from vcache.heads.aim import AIM, BlockAdapters
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape, TowerBlock
from vcache.heads.tail_stem import StemShape, normalised

GOLDENS = Path(__file__).parents[1] / "goldens"
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return arrays, json.loads((GOLDENS / f"{name}.json").read_text())


def part_of(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def check_gradients(output: Tensor, module: nn.Module, wanted: dict[str, Tensor]) -> None:
    """Of sum(output**2), relative to the largest: they are sums over hundreds of tokens."""
    parameters = dict(module.named_parameters())
    got = torch.autograd.grad(output.square().sum(), [parameters[name] for name in wanted])
    for gradient, expected in zip(got, wanted.values(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["aim_block_k400", "aim_block_ssv2"])
def test_a_block_with_adapters_is_the_official_one(name: str) -> None:
    arrays, facts = read_golden(name)
    weights = part_of(arrays, "w/")
    C, T, B = (facts[letter] for letter in "CTB")
    block = TowerBlock(BlockShape(width=C, num_heads=facts["heads"], mlp_dim=4 * C)).requires_grad_(False)
    block.load_state_dict({n: x for n, x in weights.items() if "Adapter" not in n})
    config = AIM.Config(
        num_classes=2,
        width=C,
        num_heads=facts["heads"],
        temporal_adapters=facts["num_tadapter"],
        adapter_scale=facts["scale"],
    )
    adapters = BlockAdapters(config, 3).eval()
    adapters.load_state_dict({n: x for n, x in weights.items() if "Adapter" in n})
    y = adapters(block, arrays["in/x"].unflatten(1, (B, T)).permute(1, 2, 0, 3))
    torch.testing.assert_close(y.permute(2, 0, 1, 3).flatten(1, 2), arrays["out/y"], **CLOSE)
    check_gradients(y, adapters, part_of(arrays, "grad/"))


def official_tail(weights: dict[str, Tensor], facts: dict[str, Any]) -> FrozenTail:
    """Of the golden's backbone, which has no proj."""
    C, side = facts["C"], facts["resolution"] // facts["patch"]
    shape = TailShape(
        num_layers=facts["layers"],
        num_blocks=facts["layers"],
        block=BlockShape(width=C, num_heads=facts["heads"], mlp_dim=4 * C),
        embed_dim=None,
        stem=StemShape(patch_size=facts["patch"], grid=(side, side)),
    )
    of_blocks = part_of(weights, "backbone.transformer.resblocks.")
    named = {f"blocks.{name}": x for name, x in of_blocks.items() if "Adapter" not in name}
    backbone = part_of(weights, "backbone.")
    kept = ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
    named |= {f"stem.{name}": backbone[name] for name in kept}
    return FrozenTail.of(shape, named | {f"ln_post.{n}": x for n, x in part_of(backbone, "ln_post.").items()})


def our_name(name: str) -> str | None:
    """Of a weight that is trained."""
    if "Adapter" in name:
        return name.replace("backbone.transformer.resblocks.", "adapters.")
    trained = ("backbone.temporal_embedding", "backbone.ln_post", "cls_head")
    return name.replace("backbone.", "").replace("cls_head", "classifier") if name.startswith(trained) else None


def official_head(**fields: Any) -> tuple[AIM, dict[str, Tensor], dict[str, Any]]:
    """The golden's network with as many of its blocks as are run."""
    arrays, facts = read_golden("aim_end2end")
    weights, side = part_of(arrays, "w/"), facts["resolution"] // facts["patch"]
    sizes = {
        "width": facts["C"],
        "num_heads": facts["heads"],
        "num_layers": facts["layers"],
        "grid": (side, side),
        "patch_size": facts["patch"],
    }
    config = AIM.Config(num_classes=facts["num_classes"], num_frames=facts["T"], **sizes, **fields)
    head = AIM(config).eval()
    head.set_tail(official_tail(weights, facts))
    ours = {name: x for key, x in weights.items() if (name := our_name(key)) is not None}
    head.load_state_dict({name: ours[name] for name in head.state_dict()})
    return head, arrays, facts


def test_the_network_on_a_video_is_the_official_one(monkeypatch: pytest.MonkeyPatch) -> None:
    head, arrays, _ = official_head(blocks=2, temporal_embedding="stem")
    video = arrays["in/video"].permute(0, 2, 3, 4, 1)  # normalised already
    monkeypatch.setattr("vcache.heads.aim.normalised", lambda *_: video)
    pixels = torch.zeros(video.shape, dtype=torch.uint8)
    features = ClipFeatures(pixels=pixels)
    left = head.ln_post(head.run_tail(features)[:, :, 0])
    torch.testing.assert_close(left.transpose(1, 2), arrays["out/features"][..., 0, 0], **CLOSE)
    logits = head(features)
    torch.testing.assert_close(logits, arrays["out/logits"], **CLOSE)
    check_gradients(logits, head, {our_name(n) or n: x for n, x in part_of(arrays, "grad/").items()})


def test_above_the_cut_it_is_the_official_network_too() -> None:
    head, arrays, facts = official_head(blocks=1, temporal_embedding="none")
    entering = arrays["out/block0_out"].unflatten(1, (facts["B"], facts["T"])).permute(1, 2, 0, 3)
    logits = head(ClipFeatures(tokens={-2: entering}))
    torch.testing.assert_close(logits, arrays["out/logits"], **CLOSE)
    gradients = {our_name(n) or n: x for n, x in part_of(arrays, "grad/").items() if "temporal" not in n}
    assert len(gradients) == 2
    check_gradients(logits, head, gradients)


def test_pixels_are_normalised_as_the_backbone_has_them() -> None:
    pixels = torch.arange(2 * 1 * 2 * 3 * 3, dtype=torch.uint8).reshape(2, 1, 2, 3, 3)
    got = normalised(pixels, (0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
    assert got[1, 0, 1, 2, 2].item() == pytest.approx((35 / 255 - 0.3) / 0.2)
    assert got[0, 0, 1, 0, 1].item() == pytest.approx((10 / 255 - 0.2) / 0.25)


CONFIGS = st.fixed_dictionaries(
    {
        "spatial": st.booleans(),
        "temporal": st.booleans(),
        "joint": st.booleans(),
        "bottleneck": st.sampled_from([0.125, 0.25, 1.5]),
        "positions": st.sampled_from(["all", "every_second", "lower_half"]),
        "temporal_adapters": st.sampled_from([1, 2]),
        "adapter_scale": st.sampled_from([0.5, 1.0, 3.0]),
        "drop_path": st.sampled_from([0.0, 0.7]),
        "drop_path_of": st.sampled_from(["tokens", "clips"]),
        "checkpointing": st.booleans(),
        "blocks_and_embedding": st.sampled_from([(k, e) for k in (1, 2, 3) for e in ("cut", "none")] + [(3, "stem")]),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    fields=CONFIGS,
    cached=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kept=st.sampled_from([torch.float32, torch.float16]),
)
def test_at_initialisation_it_is_the_frozen_backbone_of_each_frame(
    fields, cached, kept, sizes, make_features, frozen_tail
) -> None:
    blocks, embedding = fields.pop("blocks_and_embedding")
    config = AIM.Config(
        num_classes=sizes.K,
        num_frames=sizes.T,
        width=sizes.D,
        num_layers=sizes.L,
        embed_dim=sizes.E,
        grid=(sizes.h, sizes.w),
        patch_size=sizes.p,
        num_heads=sizes.H,
        classifier="text",
        blocks=blocks,
        temporal_embedding=embedding,
        **fields,
    )
    tail = FrozenTail.of(frozen_tail.shape, frozen_tail.state_dict(), kept)
    head = AIM(config)
    head.set_tail(tail)
    features = make_features([-blocks - 1], cached)
    if embedding == "stem":
        features = ClipFeatures(pixels=features.pixels[:, ::2])
        stem, images = tail.stem, normalised(features.pixels, config.pixel_mean, config.pixel_std)
        entering = stem.ln_pre(stem.embed_patches(images))
    else:
        entering = features.stem if blocks == sizes.L else features.tokens[-blocks - 1]
    # In training mode, too: what is dropped, or scaled up, is zero.
    torch.testing.assert_close(
        head.embed(features), tail.embed(entering.float(), blocks).mean(dim=1), rtol=1e-5, atol=1e-5
    )


def tunable(**fields: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AIM(AIM.Config(**fields)).parameters())


K400 = {"num_classes": 400, "blocks": 12}
SSV2 = {"num_classes": 174, "adapter_scale": 1.0}
LARGE = {"width": 1024, "num_layers": 24, "num_heads": 16, "embed_dim": 768, "grid": (16, 16), "patch_size": 14}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_classes": 400, "blocks": 1}, 1_202_896),
        ({"num_classes": 400, "blocks": 2}, 2_090_512),
        ({"num_classes": 400, "blocks": 3}, 2_978_128),
        ({"num_classes": 400, "blocks": 6}, 5_640_976),  # Table 7, Top 6: 5.6 M
        ({**K400, "positions": "every_second"}, 5_640_976),  # Skip
        ({**K400, "positions": "lower_half"}, 5_640_976),  # Bottom 6
        (K400, 10_966_672),
        ({**K400, "temporal_embedding": "stem"}, 10_966_672),
        ({**K400, "num_frames": 32}, 10_985_104),
        ({**SSV2, "blocks": 12, "temporal_adapters": 2}, 14_343_342),
        ({**LARGE, "num_classes": 400, "blocks": 24}, 38_261_136),
        ({**LARGE, **SSV2, "blocks": 24}, 38_029_486),
        ({**LARGE, **SSV2, "blocks": 24, "temporal_adapters": 2}, 50_643_118),
    ],
)
def test_parameters_are_as_many_as_the_official_code_trains(fields: dict[str, Any], expected: int) -> None:
    assert tunable(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        # Table 1, whose rows are of Something-Something: two adapters in time.
        ({**SSV2, "blocks": 12, "temporal": False, "joint": False}, 3.7),
        ({**SSV2, "blocks": 12, "temporal_adapters": 2, "joint": False}, 10.8),
        ({**SSV2, "blocks": 12, "temporal_adapters": 2}, 14.3),
        # Table 8, of Kinetics-400, whose numbers are cut or rounded: 3, 5.6, 11, 21.
        ({**K400, "bottleneck": 0.0625}, 3.0),
        ({**K400, "bottleneck": 0.125}, 5.7),
        ({**K400, "bottleneck": 0.25}, 11.0),
        ({**K400, "bottleneck": 0.5}, 21.6),
    ],
)
def test_the_tables_of_the_paper_have_these_numbers_of_parameters(fields: dict[str, Any], millions: float) -> None:
    assert round(tunable(**fields) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("positions", "blocks", "layers"),
    [
        ("all", 3, (9, 10, 11)),
        ("every_second", 12, (1, 3, 5, 7, 9, 11)),
        ("every_second", 1, (11,)),
        ("lower_half", 12, (0, 1, 2, 3, 4, 5)),
        ("lower_half", 3, (9,)),
    ],
)
def test_positions_say_which_blocks_have_adapters(positions: str, blocks: int, layers: tuple[int, ...]) -> None:
    config = AIM.Config(num_classes=2, positions=positions, blocks=blocks)
    assert config.adapted_layers == layers
    assert set(AIM(config).adapters) == set(map(str, layers))


def test_drop_path_is_the_official_one_by_the_depth_in_the_whole_backbone(sizes, frozen_tail) -> None:
    """timm's DropPath on x of (tokens, clips * frames, width), with the same random numbers."""
    config = AIM.Config(num_classes=2, width=sizes.D, num_layers=sizes.L, blocks=2, drop_path=0.6)
    rates = torch.linspace(0, 0.6, sizes.L).tolist()
    head = AIM(config)
    for layer in config.layers_run:
        drop_path = head.adapters[str(layer)].drop_path
        assert drop_path.probability == pytest.approx(rates[layer])
        x = torch.randn(sizes.B, sizes.T, 1 + sizes.P, sizes.D)
        torch.manual_seed(3)
        got = drop_path(x)
        torch.manual_seed(3)
        official = TimmDropPath(rates[layer])(x.permute(2, 0, 1, 3).flatten(1, 2))
        torch.testing.assert_close(got.permute(2, 0, 1, 3).flatten(1, 2), official)
        assert not torch.equal(got, x)


@pytest.mark.parametrize("setting", ["temporal", "joint"])
def test_temporal_and_joint_adapters_are_left_out_alike_and_the_spatial_one_never(
    sizes, frozen_tail, setting: str
) -> None:
    """As the official block: with nearly everything left out, what is left is the block with the spatial adapter."""
    block, off = frozen_tail.top(1)[0], {"temporal": False, "joint": False}
    torch.manual_seed(5)
    x = torch.randn(sizes.B, sizes.T, 1 + sizes.P, sizes.D)

    def adapters(**settings: Any) -> BlockAdapters:
        config = AIM.Config(num_classes=2, width=sizes.D, num_layers=sizes.L, blocks=1, **settings)
        return BlockAdapters(config, sizes.L - 1).train()

    dropping, spatial = adapters(**{**off, setting: True}, drop_path=1 - 1e-6), adapters(**off)
    for parameter in dropping.parameters():
        torch.nn.init.normal_(parameter)
    spatial.load_state_dict(dropping.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(dropping(block, x), spatial(block, x), rtol=0, atol=0)
        assert not torch.equal(dropping.eval()(block, x), spatial(block, x))


def test_drop_path_of_clips_leaves_out_whole_clips() -> None:
    adapters = BlockAdapters(AIM.Config(num_classes=2, drop_path=0.5, drop_path_of="clips"), 11)
    torch.manual_seed(0)
    x = torch.ones(64, 2, 3, 5)
    kept = adapters.drop_path(x).flatten(1)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert (kept == kept[:, :1]).all()
    torch.testing.assert_close(adapters.eval().drop_path(x), x, rtol=0, atol=0)


def test_adapters_begin_as_the_official_ones() -> None:
    torch.manual_seed(0)
    head = AIM(AIM.Config(num_classes=3, blocks=2, temporal_adapters=2))
    for name, parameter in head.adapters.named_parameters():
        if name.endswith("D_fc1.weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
        else:
            assert not parameter.any()
    assert not head.temporal_embedding.any()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"positions": "top"}, r"positions \('top'\) must be one of 'all'"),
        ({"temporal_embedding": True}, r"temporal_embedding \(True\) must be one of 'cut', 'stem', 'none'"),
        ({"temporal_embedding": "stem"}, r"it needs blocks \(6\) to be 12"),
        ({"drop_path_of": "frames"}, r"drop_path_of \('frames'\)"),
        ({"drop_path": 1.0}, r"drop_path \(1.0\) must be in \[0, 1\)"),
        ({"temporal_adapters": 3}, r"temporal_adapters \(3\) must be 1 or 2"),
        ({"bottleneck": 1e-4}, "make at least one channel"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(
    fields: dict[str, Any], words: str, refusal: Callable[..., str]
) -> None:
    assert re.search(words, refusal(AIM.Config(num_classes=2), fields))


@pytest.fixture
def whole(sizes) -> dict[str, Any]:
    """The fields that fit `frozen_tail`, with its stem."""
    own = {"width": sizes.D, "num_layers": sizes.L, "num_heads": sizes.H, "embed_dim": sizes.E, "num_frames": sizes.T}
    place = {"grid": (sizes.h, sizes.w), "patch_size": sizes.p, "blocks": sizes.L, "temporal_embedding": "stem"}
    return {"num_classes": 3, **own, **place}


def test_a_tail_without_what_is_needed_is_refused(sizes, frozen_tail, whole) -> None:
    shape = frozen_tail.shape
    weights = {n: x for n, x in frozen_tail.state_dict().items() if not n.startswith("stem.")}
    bare = TailShape(num_layers=sizes.L, num_blocks=sizes.L, block=shape.block, embed_dim=sizes.E)
    with pytest.raises(ValueError, match="the patch embedding of the backbone, too, and the tail has none"):
        AIM(AIM.Config(**whole)).set_tail(FrozenTail.of(bare, weights))
    with pytest.raises(ValueError, match=r"for 3x5 patches of 3 pixels; the tail's patch embedding is for 3x5 of 2"):
        AIM(AIM.Config(**{**whole, "patch_size": 3})).set_tail(frozen_tail)
    no_proj = TailShape(num_layers=sizes.L, num_blocks=sizes.L, block=shape.block, embed_dim=None)
    del weights["proj"]
    tail = FrozenTail.of(no_proj, weights)
    with pytest.raises(ValueError, match="the classifier 'text' needs the backbone's proj"):
        AIM(AIM.Config(**{**whole, "temporal_embedding": "cut", "classifier": "text"})).set_tail(tail)
    with pytest.raises(ValueError, match="it makes no embeddings"):
        tail.embed(torch.zeros(1, 2, 4, sizes.D), 1)
    with pytest.raises(ValueError, match="a stem is below all 3 blocks, and the tail has 2"):
        TailShape(num_layers=3, num_blocks=2, block=shape.block, embed_dim=4, stem=shape.stem)


def test_pixels_of_other_frames_or_patches_are_refused(sizes, frozen_tail, whole, make_features) -> None:
    head, pixels = AIM(AIM.Config(**whole)), make_features([]).pixels
    head.set_tail(frozen_tail)
    with pytest.raises(ValueError, match="pixels must be those of 4 frames per clip, got 8"):
        head(ClipFeatures(pixels=pixels))
    with pytest.raises(ValueError, match=r"frames must be of 3x5 patches of 2 pixels, got 6 x 8 pixels"):
        head(ClipFeatures(pixels=pixels[:, ::2, :, :8]))
    # A border that is no whole patch is no part of the backbone's image either.
    wide = torch.cat([pixels[:, ::2], pixels[:, ::2, :, :1]], dim=3)
    head.eval()
    torch.testing.assert_close(head(ClipFeatures(pixels=wide)), head(ClipFeatures(pixels=pixels[:, ::2])))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", ["aim", "st-adapter", "finetune-top", "tokent1d", "shift"])
def test_that_only_cls_of_the_last_block_is_made_changes_nothing(name, blocks, on_tail, make_features, frozen_tail):
    head = on_tail(name, drawn=True, blocks=blocks).eval()
    features = make_features([] if blocks == 3 else [-blocks - 1])
    frames = head.run_tail(features)[:, :, 0]
    normed = head.ln_post(frames.mean(dim=1)) if head.mean_first else head.ln_post(frames).mean(dim=1)
    torch.testing.assert_close(head(features), head.classifier(normed), rtol=1e-5, atol=1e-5)
