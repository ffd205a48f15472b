"""The measured error is what float64 arithmetic over all the vectors says, and the bound tells a sound scheme from a bad one."""

import math

import numpy as np
import pytest
import torch

from vcache.heads.cross_frame import cross_frame_maps
from vcache.pipelines.precision import dequantised, encoded
from vcache.pipelines.precision_error import MAX_ERROR, ErrorSums, PrecisionRefused, check_error, maps_moved
from vcache.store.layout import ArraySpec
from vcache.store.quantise import ChannelMoments

T, N, D, H, d = 4, 50, 64, 3, 5
TOKENS = ArraySpec(name="tokens/8", dims=("frame", "token", "channel"), shape=(T, N, D), chunk=(1, N, D), dtype="int8")
Q = ArraySpec(name="q/8", dims=("frame", "head", "token", "dim"), shape=(T, H, N, d), chunk=(1, H, N, d), dtype="int8")


def clip_like(seed: int) -> torch.Tensor:
    """Activations whose channels have log-normal scales and heavy-tailed biases, three of them 50 to 100 times the others."""
    channels, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    scale = channels.lognormal(0, 0.5, D)
    scale[[5, 17, 40]] *= channels.uniform(50, 100, 3)
    bias = channels.standard_t(4, D)
    return torch.from_numpy(((rng.normal(size=(T, N, D)) + bias) * scale).astype(np.float32))


def standard(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """The same numbers, straight from their definitions; channels are the last axis."""
    x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
    std = x.std(dim=0, correction=0)
    cosines = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
    return {
        "relative": ((y - x).norm() / x.norm()).item(),
        "relative_standardised": (((y - x) / std).norm() / (x / std).norm()).item(),
        "min_cosine": cosines.min().item(),
    }


def measured(spec: ArraySpec, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    sums = ErrorSums(spec)
    for x, y in pairs:
        sums.add(x, y, None)
    return sums.result()


def test_the_error_of_tokens_is_taken_over_all_clips_at_once():
    clips = [clip_like(seed) for seed in range(3)]
    pairs = [(x, x + 0.01 * torch.randn(x.shape, generator=torch.manual_seed(0)) * x) for x in clips]
    expected = standard(*(torch.cat(side) for side in zip(*pairs, strict=True)))
    error = measured(TOKENS, pairs)
    assert error.pop("videos") == 3
    assert error == pytest.approx(expected, rel=1e-3)


def test_a_channel_of_queries_is_a_dim_of_a_head_and_a_vector_one_head_of_a_token():
    x = torch.randn(T, H, N, d, generator=torch.manual_seed(1)) * torch.logspace(0, 2, H)[:, None, None]
    y = x + 0.02 * torch.randn(x.shape, generator=torch.manual_seed(2))
    error = measured(Q, [(x, y)])
    together = standard(*(side.transpose(1, 2).flatten(2) for side in (x, y)))
    assert error["relative_standardised"] == pytest.approx(together["relative_standardised"], rel=1e-3)
    assert error["min_cosine"] == pytest.approx(standard(x, y)["min_cosine"], abs=1e-6)


def test_what_is_equal_has_no_error_and_zeros_have_no_direction():
    x = clip_like(0)
    x[0, 0] = 0
    assert measured(TOKENS, [(x, x)]) == {
        "relative": 0.0, "relative_standardised": 0.0, "min_cosine": 1.0, "videos": 1,
    }  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    x = clip_like(0)
    y = x.clone()
    y[1, 2, 3] = bad
    with pytest.raises(PrecisionRefused, match="tokens/8 would lose too much"):
        check_error(TOKENS, measured(TOKENS, [(x, y)]), MAX_ERROR)


def test_the_bound_passes_ours_and_refuses_plain_int8_on_outlier_channels():
    moments = ChannelMoments()
    for seed in range(8):
        moments.add(clip_like(seed).numpy())
    ours = [torch.from_numpy(values) for values in moments.constants()]
    plain = [torch.zeros(D), torch.ones(D)]
    x, errors = clip_like(100), []
    for mean, std in (ours, plain):
        constants = {"tokens_mean/8": mean, "tokens_std/8": std}
        back = dequantised(encoded("tokens/8", x, "int8", constants), "tokens/8", constants)
        errors.append(measured(TOKENS, [(x, back)]))
    assert errors[0]["relative_standardised"] < 0.012
    assert errors[1]["relative_standardised"] > 0.1
    check_error(TOKENS, errors[0], MAX_ERROR)
    with pytest.raises(PrecisionRefused, match=r"tokens/8 would lose too much as int8: .* --dtype float16"):
        check_error(TOKENS, errors[1], MAX_ERROR)


def test_a_single_vector_that_turns_too_far_is_refused():
    x = clip_like(0)
    y = x.clone()
    y[1, 2] = x[1, 2].roll(1)
    error = measured(TOKENS, [(x, y)]) | {"relative_standardised": 0.001}
    with pytest.raises(PrecisionRefused, match="smallest cosine"):
        check_error(TOKENS, error, MAX_ERROR)


def test_maps_move_by_the_share_of_weight_that_lies_elsewhere():
    generator = torch.manual_seed(4)
    exact = {name: torch.randn(T, H, N, d, generator=generator) for name in ("q/8", "k/8")}
    back = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in exact.items()}
    one, other = (cross_frame_maps(side["q/8"][None], side["k/8"][None]) for side in (exact, back))
    expected = torch.minimum(one, other).sum(-1).neg().add(1).mean().item()
    assert maps_moved(exact, back, {}) == pytest.approx({"q/8": expected, "k/8": expected}, rel=1e-4)
    assert maps_moved({"maps/8": one}, {"maps/8": other}, {}) == pytest.approx({"maps/8": expected}, rel=1e-4)
