"""The two formulations of EVL, absorbed and plain, are one head: same outputs, same gradients, in every configuration."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vcache.heads.evl import EVL
from vcache.heads.requirements import ClipFeatures

ALL_ON = EVL.Config(num_classes=3, num_frames=4, width=24, num_heads=3, grid=(2, 5), layers=(-2, -1), qkv_dim=12)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Settings, not a Config: the checker of its annotations draws random numbers, which strategies must not."""
    pooling = draw(st.sampled_from(["none", "none", "cls", "spatial_mean", "temporal_mean"]))
    heads = draw(st.integers(1, 4))
    return dict(
        num_classes=draw(st.integers(1, 4)),
        num_frames=draw(st.integers(1, 5)),
        width=draw(st.sampled_from([8, 12, 20])),
        num_heads=heads,
        qkv_dim=heads * draw(st.integers(1, 5)),
        grid=draw(st.tuples(st.integers(1, 4), st.integers(1, 6))),
        layers=tuple(draw(st.lists(st.sampled_from([-3, -2, -1]), min_size=1, max_size=3))),  # repeats among them
        temporal_conv=draw(st.booleans()),
        temporal_pos_embed=draw(st.booleans()),
        temporal_cross_attention=pooling != "cls" and draw(st.booleans()),
        tca_gain=draw(st.sampled_from([1.0, 2.5])),
        pooling=pooling,
        query_init="normal",
    )


def make_case(config: EVL.Config, clips: int, seed: int, scale: float = 1.0) -> tuple[EVL, ClipFeatures]:
    """A head with no parameter at zero, and features of any size, with outlier channels of `scale`."""
    generator = torch.Generator().manual_seed(seed)
    head, P = EVL(config).eval(), config.grid[0] * config.grid[1]
    for parameter in head.parameters():
        spread = 0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    outliers = torch.ones(config.width).index_fill(0, torch.tensor([1, 5]), scale)
    x = {layer: torch.randn(clips, config.num_frames, 1 + P, config.width, generator=generator) * outliers
         for layer in dict.fromkeys(config.layers)}  # fmt: skip
    maps = {layer: torch.randn(clips, config.num_frames - 1, 2, P, P, generator=generator).mul(3).softmax(dim=-1)
            for layer in x if config.temporal_cross_attention}  # fmt: skip
    if config.pooling == "cls":
        return head, ClipFeatures(cls={layer: tokens[:, :, 0] for layer, tokens in x.items()})
    return head, ClipFeatures(tokens=x, maps=maps)


def as_plain(head: EVL) -> EVL:
    plain = EVL(dataclasses.replace(head.config, formulation="plain")).eval()
    plain.load_state_dict(head.state_dict())
    return plain


def results(head: EVL, features: ClipFeatures) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter."""
    head.zero_grad()
    logits = head(features)
    weights = torch.linspace(-1, 1, logits.numel() + 1)[1:].view_as(
        logits
    )  # no square: it would carry errors of the logits
    (logits.float() * weights).sum().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in head.named_parameters()}


def worst_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference: of a gradient relative to the largest gradient of all, of the logits to the largest or 1."""
    largest = max(expected[name].abs().max().item() for name in expected if name != "logits")
    errors = {name: (got[name] - value).abs().max().item() / largest for name, value in expected.items()}
    errors["logits"] *= largest / max(1.0, expected["logits"].abs().max().item())
    return max(errors.values())


@given(config=configurations(), clips=st.integers(1, 3), seed=st.integers(0, 99), split=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_absorbed_and_plain_are_equal_in_outputs_and_all_gradients(config, clips, seed, split):
    head, features = make_case(EVL.Config(**config), clips, seed)
    with pytest.MonkeyPatch.context() as patch:
        if split:  # clip by clip, as at full size
            patch.setattr("vcache.heads.modulated_pooling._CPU_CHUNK_ELEMENTS", 1)
        got = results(head, features)
    assert worst_error(got, results(as_plain(head), features)) < 1e-5


@given(config=configurations(), clips=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_both_formulations_in_bfloat16_stay_within_two_percent_of_float32(config, clips, seed):
    head, features = make_case(EVL.Config(**config), clips, seed)
    expected = results(head, features)
    for model in (head, as_plain(head)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = results(model, features)
        assert worst_error(got, expected) < 0.02
        assert all(value.dtype == torch.float32 for name, value in got.items() if name != "logits")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.005), (torch.bfloat16, 0.02)], ids=str)
def test_channels_of_hundreds_neither_overflow_nor_spoil_mixed_precision(dtype, bound):  # as CLIP has them
    head, features = make_case(ALL_ON, clips=3, seed=0, scale=100.0)
    assert features.tokens[-1].abs().max() > 200  # the squares of these are beyond float16
    expected = results(head, features)
    with torch.autocast("cpu", dtype=dtype):
        assert worst_error(results(head, features), expected) < bound


def saved_of_the_size_of_y(head: EVL, features: ClipFeatures) -> list[Tensor]:
    """What the graph of a forward pass keeps that is as large as the tokens of a layer and is not the tokens."""
    tokens, saved = {x.data_ptr() for x in features.tokens.values()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        head(features)
    size = features.tokens[-1].numel()
    return [x for x in saved if x.numel() >= size and x.data_ptr() not in tokens]


def test_y_is_kept_only_with_cross_attention_and_in_the_dtype_of_autocast():
    head, features = make_case(ALL_ON, clips=5, seed=0)
    assert [x.dtype for x in saved_of_the_size_of_y(head, features)] == [torch.float32] * 2  # one a layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [x.dtype for x in saved_of_the_size_of_y(head, features)] == [torch.bfloat16] * 2
    head, features = make_case(dataclasses.replace(ALL_ON, temporal_cross_attention=False), clips=5, seed=0)
    assert saved_of_the_size_of_y(head, features) == []


def test_a_second_backward_pass_through_the_same_graph_gives_the_same():
    head, features = make_case(ALL_ON, clips=2, seed=0)
    loss, parameters = head(features).sum(), list(head.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), first, rtol=0, atol=0)


@pytest.mark.parametrize("formulation", ["absorbed", "plain"])
@pytest.mark.parametrize("pooling", ["none", "spatial_mean", "temporal_mean"])
def test_of_no_clip_there_are_no_logits_and_gradients_of_zero(formulation, pooling):
    config = dataclasses.replace(ALL_ON, formulation=formulation, pooling=pooling)
    head, features = make_case(config, clips=2, seed=0)
    none = ClipFeatures(
        tokens={layer: x[:0] for layer, x in features.tokens.items()},
        maps={layer: x[:0] for layer, x in features.maps.items()},
    )
    logits = head(none)
    assert logits.shape == (0, config.num_classes)
    assert [weights.shape[0] for _, weights in head.attention(none)] == [0] * len(config.layers)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_features_that_want_a_gradient_get_that_of_the_plain_formulation():
    head, features = make_case(dataclasses.replace(ALL_ON, layers=(-1,)), clips=2, seed=0)
    x = features.tokens[-1].requires_grad_()
    got, expected = (torch.autograd.grad(model(features).sum(), x)[0] for model in (head, as_plain(head)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


TRAINED_ALONE = [
    "cls_token",
    "decoder_layers.0.attn.q_proj.weight",
    "decoder_layers.1.norm3.weight",
    "temporal_conv.0.weight",
    "temporal_conv.1.bias",
    "temporal_pos_embed.0",
    "cross_attention.0.w1",
    "cross_attention.1.w2",
]


@pytest.mark.parametrize("name", TRAINED_ALONE)
def test_a_parameter_that_is_trained_alone_gets_the_gradient_it_gets_among_all(name):
    head, features = make_case(ALL_ON, clips=2, seed=0)
    expected = results(head, features)[f"decoder.{name}"].clone()
    head.requires_grad_(False).zero_grad()
    parameter = head.decoder.get_parameter(name).requires_grad_()
    got = {key: value for key, value in results(head, features).items() if value is not None}
    assert got.keys() == {"logits", f"decoder.{name}"}
    torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("formulation", ["absorbed", "plain"])
@pytest.mark.parametrize("terms", [True, False])
def test_features_of_half_precision_are_read_as_their_float32_values(formulation, terms):
    modules = dict.fromkeys(("temporal_conv", "temporal_pos_embed", "temporal_cross_attention"), terms)
    head, features = make_case(dataclasses.replace(ALL_ON, formulation=formulation, **modules), clips=2, seed=0)
    half = ClipFeatures(
        tokens={layer: x.half() for layer, x in features.tokens.items()},
        maps={layer: x.half() for layer, x in features.maps.items()},
    )
    exact = ClipFeatures(
        tokens={layer: x.float() for layer, x in half.tokens.items()},
        maps={layer: x.float() for layer, x in half.maps.items()},
    )
    assert worst_error(results(head, half), results(head, exact)) < 1e-5


@pytest.mark.parametrize("formulation", ["absorbed", "plain"])
def test_maps_that_want_a_gradient_are_refused(formulation):
    head, features = make_case(dataclasses.replace(ALL_ON, layers=(-1,), formulation=formulation), clips=2, seed=0)
    features.maps[-1].requires_grad_()
    with pytest.raises(ValueError, match="maps must not require a gradient"):
        head(features)


def test_multiply_adds_of_the_plain_formulation_are_counted_on_the_meta_device():
    config = dataclasses.replace(ALL_ON, formulation="plain", layers=(-1,))
    T, D, Q, K, P = 4, 24, 12, 3, 10
    S = T * (1 + P)
    attention = 2 * D * Q + 2 * S * D * Q + 2 * S * Q  # query and output, keys and values, scores and mix
    expected = attention + 3 * S * D + 2 * (T - 1) * P * P * D + 2 * D * 4 * D + D * K
    with torch.device("meta"):
        head = EVL(config)
        features = ClipFeatures(
            tokens={-1: torch.empty(1, T, 1 + P, D)}, maps={-1: torch.empty(1, T - 1, 2, P, P)}
        )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        head(features)
    assert counter.get_total_flops() == 2 * expected
