"""Shifts over time against an index for every frame, channel and token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.heads.requirements import ClipFeatures
from vcache.heads.shift import Shift, shift_frames

T, N, D = 4, 3, 10


def shifted(x: torch.Tensor, tokens: range, channels: int) -> torch.Tensor:
    """Value by value."""
    out = x.clone()
    for t in range(x.shape[1]):
        for d in range(2 * channels):
            source = t + 1 if d < channels else t - 1
            for n in tokens:
                out[:, t, n, d] = x[:, source, n, d] if 0 <= source < x.shape[1] else 0.0
    return out


@pytest.mark.parametrize(("tokens", "span"), [(slice(0, 1), range(1)), (slice(1, None), range(1, N))], ids=str)
@settings(max_examples=15, deadline=None)
@given(num_frames=st.integers(1, T), channels=st.integers(0, D // 2))
def test_first_channels_come_from_the_next_frame_and_the_next_ones_from_that_before(tokens, span, num_frames, channels):
    x = torch.randn(2, num_frames, N, D, generator=torch.Generator().manual_seed(num_frames))
    torch.testing.assert_close(shift_frames(x, tokens, channels), shifted(x, span, channels), rtol=0, atol=0)


def test_its_gradient_is_right():
    x = torch.randn(2, T, N, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_frames(x, slice(1, None), 3), x)


def test_patches_are_shifted_once_before_a_block_by_an_eighth(on_tail, make_features, sizes):
    head, x = on_tail("shift", blocks=3), make_features(()).stem
    got = head.run_tail(ClipFeatures(stem=x))
    for block in head.blocks.values():
        x = block(shifted(x, range(1, 1 + sizes.P), sizes.D // 8))
    torch.testing.assert_close(got, x)


def test_cls_is_shifted_before_attention_and_before_the_mlp_by_a_quarter(on_tail, make_features, sizes):
    head, x = on_tail("shift", tokens="cls", blocks=3), make_features(()).stem
    got = head.run_tail(ClipFeatures(stem=x))
    for block in head.blocks.values():
        x = shifted(x, range(1), sizes.D // 4)
        x = x + block.attn(block.ln_1(x))
        x = shifted(x, range(1), sizes.D // 4)
        x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize("tokens", ["patches", "cls"])
def test_a_shift_has_no_parameters_and_is_not_the_backbone(on_tail, make_features, tokens):
    features = make_features(range(-4, 0))
    head, plain = on_tail("shift", tokens=tokens, blocks=2), on_tail("finetune-top", blocks=2)
    assert head.state_dict().keys() == plain.state_dict().keys()
    assert not torch.allclose(head.run_tail(features), plain.run_tail(features), atol=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": "all"}, "tokens ('all') must be one of 'patches', 'cls'"),
        ({"shift_div": 1}, "shift_div (1) must be between 2 and the width (768)"),
        ({"shift_div": 769}, "shift_div (769) must be between 2 and the width (768)"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words, refusal):
    assert refusal(Shift.Config(num_classes=2), settings) == words
