"""TokenT1D against sums over frames, and as the shift and the identity that it can begin with."""

import pytest
import torch

from vcache.heads.requirements import ClipFeatures
from vcache.heads.shift import shift_frames
from vcache.heads.tokent1d import TokenConv, TokenT1D


def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """CLS of frame t as the sum over frames t-1, t and t+1, channel by channel."""
    out = x.clone()
    for t in range(x.shape[1]):
        near = [(tap, t + tap - 1) for tap in range(3) if 0 <= t + tap - 1 < x.shape[1]]
        out[:, t, 0] = sum(weight[:, 0, tap] * x[:, source, 0] for tap, source in near)
    return out


def conv_of(**settings: object) -> TokenConv:
    return TokenConv(TokenT1D.Config(num_classes=2, width=12, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_cls_is_convolved_over_its_frames_and_patches_stay(num_frames):
    conv, x = conv_of(), torch.randn(2, num_frames, 4, 12)
    torch.nn.init.normal_(conv.conv.weight)
    torch.testing.assert_close(conv(x), convolved(x, conv.conv.weight))


@pytest.mark.parametrize("shift_div", [2, 3, 4])
def test_it_begins_as_a_shift_of_cls(shift_div):
    x = torch.randn(2, 5, 4, 12)
    expected = shift_frames(x, slice(0, 1), 12 // shift_div)
    torch.testing.assert_close(conv_of(shift_div=shift_div)(x), expected)


def test_the_same_convolution_stands_before_attention_and_before_the_mlp(on_tail, make_features):
    head, x = on_tail("tokent1d", blocks=3), make_features(()).stem
    torch.manual_seed(2)
    for parameter in head.control_points.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    got = head.run_tail(ClipFeatures(stem=x))
    for layer, block in head.blocks.items():
        weight = head.control_points[layer].conv.weight
        x = convolved(x, weight)
        x = x + block.attn(block.ln_1(x))
        x = convolved(x, weight)
        x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-4)


def test_of_what_it_convolves_only_cls_is_kept_for_the_backward_pass():
    conv, x = conv_of(), torch.randn(2, 5, 40, 12, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.untyped_storage().nbytes()) or saved, lambda saved: saved
    ):
        conv(x)
    assert 0 < sum(kept) <= 2 * x[:, :, 0].nbytes


@pytest.mark.parametrize(("init", "same"), [("identity", True), ("shift", False)])
def test_only_the_identity_is_the_backbone_at_initialisation(on_tail, make_features, init, same):
    features = make_features(range(-4, 0))
    head, plain = on_tail("tokent1d", init=init, blocks=2), on_tail("finetune-top", blocks=2)
    assert torch.allclose(head.run_tail(features), plain.run_tail(features), atol=1e-5) == same


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init": "normal"}, "init ('normal') must be one of 'shift', 'identity'"),
        ({"shift_div": 0}, "shift_div (0) must be between 2 and the width (768)"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words, refusal):
    assert refusal(TokenT1D.Config(num_classes=2), settings) == words
