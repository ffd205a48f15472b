"""MixUp and CutMix of features: timm's on an image whose pixels are the patches, and what a mixed clip must satisfy."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data import mixup as timm_mixup
from torch import nn

from vcache.heads.aim import AIM, TemporalEmbedding
from vcache.heads.evl import EVL
from vcache.heads.linear import LinearHead
from vcache.heads.requirements import ClipFeatures, OnDemand, Recipe
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.losses import clip_losses
from vcache.pipelines.training.mixing import Box, Mix, Mixing, box_around, check_mixing, mixed_targets

B, T, h, w, D, K = 4, 3, 5, 6, 8, 7
RECIPE = Recipe(lr=0.02, weight_decay=0.05, steps=9, batch_size=B, mixup=0.8, cutmix=1.0)
BOX = Mix(1 - 6 / (h * w), Box(top=1, bottom=3, left=2, right=5))


def make_head(**settings: object) -> EVL:
    torch.manual_seed(1)
    head = EVL(
        EVL.Config(num_classes=K, num_frames=T, width=D, num_heads=2, grid=(h, w), layers=(-1,), **settings)  # type: ignore[arg-type]
    )
    for p in head.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.5)
    return head.eval()


def make_mixing(recipe: Recipe = RECIPE, seed: int = 0) -> Mixing:
    return Mixing(make_head(), recipe, torch.Generator().manual_seed(seed))


def make_features(dtype: torch.dtype = torch.float32) -> ClipFeatures:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return ClipFeatures(
        tokens={-1: draw(B, T, 1 + h * w, D)},
        cls={-1: draw(B, T, D)},
        maps={-1: (3 * draw(B, T - 1, 2, h * w, h * w)).softmax(dim=-1)},
        embed=draw(B, T, 9),
    )


def timm_mixed(
    image: torch.Tensor, labels: torch.Tensor, mix: Mix, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By timm, with the draw that is given."""
    mixer = timm_mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=K)
    edges = mix.box and (mix.box.top, mix.box.bottom, mix.box.left, mix.box.right)
    with (
        mock.patch.object(mixer, "_params_per_batch", lambda: (mix.share, mix.box is not None)),
        mock.patch.object(timm_mixup, "rand_bbox", lambda *args, **options: edges),
    ):
        return mixer(image.clone(), labels)


@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.9), BOX], ids=["0.3", "0.9", "box"])
def test_patches_and_targets_are_mixed_as_timm_mixes_pixels(mix: Mix) -> None:
    features, labels = make_features(), torch.tensor([3, 0, 3, 6])
    grid = features.tokens[-1][:, :, 1:].unflatten(2, (h, w))  # (B, T, h, w, D)
    image = grid.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, T*D, h, w)
    expected, timm_targets = timm_mixed(image, labels, mix, smoothing=0.1)
    found = make_mixing().features(features, mix).tokens[-1][:, :, 1:].unflatten(2, (h, w))
    torch.testing.assert_close(found.permute(0, 1, 4, 2, 3).flatten(1, 2), expected)
    logits = torch.randn(B, K, generator=torch.Generator().manual_seed(2))
    targets = mixed_targets(labels, mix, K)
    losses = clip_losses(logits, targets, label_smoothing=0.1, multi_label=False)
    torch.testing.assert_close(losses, -(timm_targets * logits.log_softmax(dim=1)).sum(dim=1))


def test_several_classes_are_mixed_as_timm_mixes_them() -> None:
    targets = (torch.rand(B, K, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    expected = timm_mixup.mixup_target(targets, K, lam=0.3, multi_label=True)
    torch.testing.assert_close(mixed_targets(targets, Mix(0.3), K), expected)


@given(share=st.floats(0, 1), height=st.integers(1, 16), width=st.integers(1, 16), data=st.data())
def test_boxes_are_timms(share: float, height: int, width: int, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    with mock.patch.object(np.random, "randint", mock.Mock(side_effect=[row, column])):
        expected = timm_mixup.rand_bbox((9, height, width), share)
    box = box_around((height, width), share, row, column)
    assert (box.top, box.bottom, box.left, box.right) == tuple(int(edge) for edge in expected)
    assert 0 <= box.area <= height * width


@pytest.mark.parametrize("mix", [Mix(0.3), BOX], ids=["mixup", "cutmix"])
def test_what_evls_decoder_attends_to_is_mixed_as_the_tokens_are(mix: Mix) -> None:
    """Y is affine in tokens and maps, patch by patch of the queries: mixing before and after it is the same."""
    head, mixing, features = make_head(), make_mixing(), make_features()

    def modulated(x: ClipFeatures) -> torch.Tensor:
        return head.decoder.modulate(0, x.tokens[-1], x.maps[-1]).detach()

    before = modulated(mixing.features(features, mix))
    after = mixing.features(ClipFeatures(tokens={-1: modulated(features)}), mix).tokens[-1]
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, modulated(features), atol=0.1)


@pytest.mark.parametrize("mix", [Mix(0.3), BOX], ids=["mixup", "cutmix"])
def test_rows_of_mixed_maps_sum_to_1_and_features_without_patches_are_averaged(mix: Mix) -> None:
    features = make_features()
    found = make_mixing().features(features, mix)
    torch.testing.assert_close(found.maps[-1].sum(dim=-1), torch.ones(B, T - 1, 2, h * w))
    assert features.embed is not None and found.embed is not None
    pairs = [(features.cls[-1], found.cls[-1]), (features.embed, found.embed)]
    for x, y in [*pairs, (features.tokens[-1][:, :, 0], found.tokens[-1][:, :, 0])]:
        torch.testing.assert_close(y, mix.share * x + (1 - mix.share) * x.flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_features_keep_their_dtype_and_those_given_are_not_written_to(dtype: torch.dtype) -> None:
    features, before = make_features(dtype), make_features(dtype)
    for mix in (Mix(0.3), BOX, Mix(1.0)):
        found = make_mixing().features(features, mix)
        for kind in ("tokens", "cls", "maps"):
            assert getattr(found, kind)[-1].dtype == dtype
            assert torch.equal(getattr(features, kind)[-1], getattr(before, kind)[-1])
        assert found.embed is not None and before.embed is not None
        assert torch.equal(features.embed, before.embed)  # type: ignore[arg-type]


def test_draws_follow_the_beta_distribution_and_the_switch() -> None:
    features, mixing = make_features(), make_mixing(replace(RECIPE, mix_switch=0.25))
    mixes = [mixing.draw(features) for _ in range(2000)]
    pasted = [mix for mix in mixes if mix.box is not None]
    assert len(pasted) / len(mixes) == pytest.approx(0.25, abs=0.04)
    shares = np.array([mix.share for mix in mixes if mix.box is None])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(0.8, 0.8)
    for mix in pasted:
        assert mix.box and mix.share == pytest.approx(1 - mix.box.area / (h * w))


def test_draws_are_those_of_the_generator_one_number_each() -> None:
    features = make_features()
    one, same, other = make_mixing(seed=3), make_mixing(seed=3), make_mixing(seed=4)
    for _ in range(4):
        one.draw(features)
        torch.randint(2**63 - 1, (), generator=same.generator)
    assert one.draw(features) == same.draw(features) != other.draw(features)


def test_one_of_both_is_the_only_one_drawn() -> None:
    features = make_features()
    only_mixup, only_cutmix = make_mixing(replace(RECIPE, cutmix=0.0)), make_mixing(replace(RECIPE, mixup=0.0))
    assert {only_mixup.draw(features).box is None for _ in range(9)} == {True}
    assert {only_cutmix.draw(features).box is None for _ in range(9)} == {False}


def test_cutmix_is_refused_where_there_are_no_patches_and_mixup_is_not() -> None:
    linear = LinearHead(LinearHead.Config(num_classes=K))
    with pytest.raises(
        SettingError, match=r"cutmix \(1\) pastes patches, and LinearHead .* reads none: .*--set cutmix=0"
    ):
        check_mixing(linear, RECIPE)
    with pytest.raises(SettingError, match="EVL with these settings reads none"):
        check_mixing(make_head(pooling="cls", temporal_cross_attention=False), RECIPE)
    check_mixing(linear, replace(RECIPE, cutmix=0.0))
    check_mixing(make_head(), RECIPE)


def test_a_grid_that_a_head_does_not_tell_is_square_or_refused() -> None:
    mixing, features = make_mixing(replace(RECIPE, mixup=0.0)), make_features()
    mixing.grid = None
    with pytest.raises(SettingError, match="how 30 of them lie in rows the head does not tell"):
        mixing.draw(features)
    square = ClipFeatures(tokens={-1: features.tokens[-1][:, :, :26]})
    assert mixing.draw(square).box
    found = mixing.features(square, BOX).tokens[-1][:, :, 1:].unflatten(2, (5, 5))
    expected = square.tokens[-1][:, :, 1:].unflatten(2, (5, 5)).clone()
    expected[:, :, 1:3, 2:5] = expected.flip(0)[:, :, 1:3, 2:5]
    assert torch.equal(found, expected)


PATCH = 3


def make_pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randint(256, (B, 2 * T, PATCH * h, PATCH * w, 3), dtype=torch.uint8, generator=generator)


def test_cutmix_pastes_the_pixels_of_the_patches_that_it_pastes():
    pixels = make_pixels()
    mixed = make_mixing().features(ClipFeatures(pixels=pixels), BOX).pixels
    assert mixed is not None and BOX.box is not None
    rows, columns = (
        slice(PATCH * a, PATCH * b) for a, b in ((BOX.box.top, BOX.box.bottom), (BOX.box.left, BOX.box.right))
    )
    expected = pixels.clone()
    expected[:, :, rows, columns] = pixels.flip(0)[:, :, rows, columns]
    assert torch.equal(mixed, expected) and not torch.equal(mixed, pixels)


def test_pixels_of_a_head_that_does_not_tell_its_grid_are_pasted_with_its_patches():
    """Of 3 x 3 patches of 4 x 4 pixels, the two in the lower right corner."""
    pixels = torch.arange(B, dtype=torch.uint8)[:, None, None, None, None].expand(B, 2, 12, 12, 3)
    mixing = Mixing(nn.Identity(), RECIPE, torch.Generator())
    box = Mix(7 / 9, Box(top=2, bottom=3, left=1, right=3))
    mixed = mixing.features(
        ClipFeatures(tokens={-1: torch.zeros(B, T, 1 + 9, D)}, pixels=pixels.contiguous()), box
    ).pixels
    expected = pixels.clone()
    expected[:, :, 8:12, 4:12] = expected[:, :, 8:12, 4:12].flip(0)
    assert torch.equal(mixed, expected)


def test_mixup_of_pixels_is_timms_to_half_a_step():
    pixels, mix = make_pixels(), Mix(0.3)
    mixed = make_mixing().features(ClipFeatures(pixels=pixels), mix).pixels
    images = pixels.float().flatten(0, 1).permute(0, 3, 1, 2).unflatten(0, (B, 2 * T)).flatten(1, 2)
    expected, _ = timm_mixed(images, torch.zeros(B, dtype=torch.int64), mix, 0.0)
    assert mixed is not None
    given = mixed.float().permute(0, 1, 4, 2, 3).flatten(1, 2)
    assert (given - expected).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("mix", [BOX, Mix(0.3)], ids=["cutmix", "mixup"])
def test_tokens_that_are_made_on_demand_are_mixed_on_demand(mix):
    features, made = make_features(), []

    def make(layer: int) -> torch.Tensor:
        made.append(layer)
        return features.tokens[layer].clone()

    mixed = make_mixing().features(ClipFeatures(tokens=OnDemand([-1], make)), mix).tokens
    made.clear()  # the type checks of the tests look in
    expected = make_mixing().features(features, mix).tokens[-1]
    assert torch.equal(mixed[-1], expected) and torch.equal(mixed[-1], expected)
    assert made == [-1, -1]


@pytest.mark.parametrize("mix", [Mix(0.3), BOX])
def test_the_stem_is_mixed_as_the_tokens_of_a_layer(mix: Mix) -> None:
    features = make_features()
    stem = replace(features, stem=features.tokens[-1], tokens={})
    mixed, as_tokens = (make_mixing().features(x, mix) for x in (stem, features))
    assert mixed.stem is not None and not torch.equal(mixed.stem, features.tokens[-1])
    torch.testing.assert_close(mixed.stem, as_tokens.tokens[-1], rtol=0, atol=0)


@pytest.mark.parametrize("temporal_embedding", ["cut", "stem"])
def test_cutmix_of_a_head_that_reads_the_stem_or_runs_it_on_pixels_is_allowed(
    temporal_embedding: TemporalEmbedding,
) -> None:
    sizes = {"num_classes": K, "num_frames": T, "width": D, "num_heads": 2, "num_layers": 2, "embed_dim": 9}
    config = AIM.Config(**sizes, blocks=2, grid=(h, w), temporal_embedding=temporal_embedding)
    head = AIM(config)
    asked = head.requires(config)
    assert (asked.stem, asked.tail_stem, asked.tokens) == (
        temporal_embedding == "cut",
        temporal_embedding == "stem",
        (),
    )
    check_mixing(head, RECIPE)
    drawn = {Mixing(head, RECIPE, torch.Generator().manual_seed(i)).draw(ClipFeatures()).box for i in range(9)}
    assert len(drawn) > 2
