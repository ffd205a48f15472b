"""ST-Adapter against its definition with a plain Conv3d, and its sizes against those of the official models."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vcache.heads.requirements import ClipFeatures
from vcache.heads.st_adapter import STAdapter, VolumeAdapter

odd = st.sampled_from([1, 3, 5])


def adapted(adapter: VolumeAdapter, x: torch.Tensor) -> torch.Tensor:
    """x + fc2(conv(fc1(x))) of the patches as a video, by torch's own convolution."""
    h, w = adapter.grid
    volume = adapter.fc1(x[:, :, 1:]).unflatten(2, (h, w)).movedim(-1, 1)
    added = adapter.fc2(adapter.conv(volume).movedim(1, -1).flatten(2, 3))
    return torch.cat([x[:, :, :1], x[:, :, 1:] + added], dim=2)


@settings(max_examples=40, deadline=None)
@given(st.tuples(odd, odd, odd), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
@example((3, 1, 1), 3, 2, 3, 7)  # the papers', which has a backward pass of its own
@example((3, 1, 1), 1, 1, 1, 8)
def test_the_adapter_is_a_convolution_of_the_patches_in_a_bottleneck(kernel, T, h, w, seed):
    torch.manual_seed(seed)
    config = STAdapter.Config(num_classes=2, num_frames=T, width=12, grid=(h, w), adapter_width=5, kernel=kernel)
    adapter = VolumeAdapter(config).double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, T, 1 + h * w, 12, dtype=torch.float64, requires_grad=True)
    got, expected = adapter(x), adapted(adapter, x)
    torch.testing.assert_close(got, expected)
    wanted, weights = [x, *adapter.parameters()], torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), wanted), torch.autograd.grad((expected * weights).sum(), wanted)
    )


def test_the_kernel_of_the_papers_convolves_half_precision_in_that(sizes):
    config = STAdapter.Config(num_classes=2, num_frames=5, width=12, grid=(2, 3))
    adapter = VolumeAdapter(config)
    torch.nn.init.normal_(adapter.conv.weight)
    h = torch.randn(2, 5, 6, 6, requires_grad=True)
    convolved = adapter.convolve(h.bfloat16())
    assert convolved.dtype == torch.bfloat16
    convolved.float().sum().backward()
    expected = F.conv3d(
        h.unflatten(2, (2, 3)).movedim(-1, 1), adapter.conv.weight, adapter.conv.bias, padding=(1, 0, 0), groups=6
    )
    torch.testing.assert_close(convolved.float(), expected.movedim(1, -1).flatten(2, 3), rtol=0.03, atol=0.03)
    assert adapter.conv.weight.grad is not None and adapter.conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("before", [{}, {"before_attention": True}, {"before_attention": True, "before_mlp": False}])
def test_it_is_the_frozen_backbone_at_initialisation_and_is_not_after(on_tail, make_features, frozen_tail, before):
    stem = make_features(()).stem
    expected = frozen_tail.embed(stem, 3)
    for drawn in (False, True):
        head = on_tail("st-adapter", blocks=3, drawn=drawn, **before)
        embedded = frozen_tail.ln_post(head.run_tail(ClipFeatures(stem=stem))[:, :, 0]) @ frozen_tail.proj
        assert torch.allclose(embedded, expected, atol=1e-5) != drawn


def test_the_last_cls_is_changed_by_attention_alone(on_tail, make_features, frozen_tail):
    """So an adapter before the MLP of the last block changes no logit, as in the official models."""
    stem = make_features(()).stem
    head = on_tail("st-adapter", blocks=3, drawn=True)
    before = head(ClipFeatures(stem=stem))
    torch.nn.init.normal_(head.adapters["2"].adapter_pre_mlp.fc2.weight)
    torch.testing.assert_close(head(ClipFeatures(stem=stem)), before, rtol=0, atol=0)
    torch.nn.init.normal_(head.adapters["1"].adapter_pre_mlp.fc2.weight)
    assert not torch.allclose(head(ClipFeatures(stem=stem)), before)


@pytest.mark.parametrize(
    ("num_classes", "both", "trained"),
    [
        (400, False, 7_417_744),  # clip_vit_base_patch16_adapter12x384 at b914b38
        (174, True, 14_354_094),  # clip_vit_base_patch16_adapter24x384
    ],
)
def test_trained_parameters_are_as_many_as_in_the_official_models(num_classes, both, trained):
    config = STAdapter.Config(num_classes=num_classes, blocks=12, before_attention=both)
    with torch.device("meta"):
        head = STAdapter(config)
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": (3, 2, 1)}, "kernel (3,2,1) must be three odd numbers: frames, rows, columns"),
        ({"kernel": (3, 1)}, "kernel (3,1) must be three odd numbers: frames, rows, columns"),
        ({"before_mlp": False}, "which leaves no adapter; set one of them"),
        ({"adapter_width": 0}, "adapter_width (0) must be at least 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words, refusal):
    assert words in refusal(STAdapter.Config(num_classes=2), settings)
