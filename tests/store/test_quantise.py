"""int8 and back, against float64 arithmetic, on activations with outlier channels as CLIP has them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from vcache.store.errors import NotFinite
from vcache.store.layout import ArraySpec
from vcache.store.quantise import (
    ChannelMoments,
    constant_names,
    dequantise,
    dequantise_tokens,
    quantise,
    quantise_tokens,
    scale_name,
    scale_spec,
)

LARGEST_FLOAT16 = 65504.0
vectors = nps.arrays(
    np.float32,
    nps.array_shapes(min_dims=1, max_dims=3, max_side=5),
    elements=st.floats(-(2.0**22), 2.0**22, width=32, allow_subnormal=False),
)


def clip_like(num_tokens: int = 1500, width: int = 192, seed: int = 0) -> np.ndarray:
    """Log-normal channel scales, Student-t biases, six channels 50 to 100 times the others, a few register tokens."""
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0, 0.5, width)
    scale[rng.choice(width, 6, replace=False)] *= rng.uniform(50, 100, 6)
    tokens = (rng.normal(size=(num_tokens, width)) + rng.standard_t(4, width)) * scale
    tokens[rng.random(num_tokens) < 0.015] *= 3
    return tokens.astype(np.float32)


def standardised_error(x: np.ndarray, back: np.ndarray) -> float:
    std = x.astype(np.float64).std(axis=0)
    return float(np.linalg.norm((back - x.astype(np.float64)) / std) / np.linalg.norm(x / std))


@given(vectors)
def test_every_number_comes_back_to_half_a_step(x):
    q, scale = quantise(x)
    exact = np.abs(x.astype(np.float64))
    step = scale.astype(np.float64)[..., None]
    assert q.dtype == np.int8
    assert scale.dtype == np.float16
    assert np.abs(q.astype(int)).max() <= 127
    assert (np.abs(dequantise(q, scale) - x.astype(np.float64)) <= step / 2 + 2.0**-22 * exact).all()


@given(vectors)
def test_the_scale_is_the_smallest_float16_that_keeps_all_numbers_within_127_steps(x):
    scale = quantise(x)[1].astype(np.float64)
    largest = np.abs(x.astype(np.float64)).max(axis=-1)
    below = np.nextafter(scale.astype(np.float16), np.float16(0)).astype(np.float64)
    assert (scale * 127 >= largest * (1 - 2.0**-23)).all()
    assert ((below * 127 < largest * (1 + 2.0**-23)) | (scale == 0)).all()


@given(vectors)
def test_signs_and_zeros_are_exact(x):
    q, scale = quantise(x)
    np.testing.assert_array_equal(dequantise(*quantise(-x)), -dequantise(q, scale))
    assert not dequantise(q, scale)[x == 0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 128 * LARGEST_FLOAT16])
def test_what_int8_cannot_hold_is_refused(bad):
    x = np.zeros((2, 3), np.float32)
    x[1, 2] = bad
    with pytest.raises(NotFinite, match="cannot be stored as int8"):
        quantise(x)
    quantise(np.full((2, 3), 127 * LARGEST_FLOAT16, np.float32))


def test_outlier_channels_ruin_plain_int8_and_not_ours():
    calibrate, x = clip_like(seed=1)[:1000], clip_like(seed=1)[1000:]
    moments = ChannelMoments()
    moments.add(calibrate)
    constants = moments.constants()
    ours = dequantise_tokens(*quantise_tokens(x, *constants), *constants)
    plain = dequantise(*quantise(x))
    assert standardised_error(x, ours) < 0.012
    assert standardised_error(x, plain) > 0.1


def test_tokens_come_back_as_float64_arithmetic_says():
    x = clip_like(num_tokens=60, width=24, seed=2).reshape(3, 4, 5, 24)
    moments = ChannelMoments()
    moments.add(x)
    mean, std = moments.constants()
    q, scale = quantise_tokens(x, mean, std)
    standardised = (x.astype(np.float64) - mean) / std
    expected = np.rint(standardised / scale.astype(np.float64)[..., None])
    assert np.mean(q != expected) < 1e-3  # a tie may fall to the other side in float32
    assert np.abs(q - expected).max() <= 1
    exact = q.astype(np.float64) * scale.astype(np.float64)[..., None] * std + mean
    np.testing.assert_allclose(dequantise_tokens(q, scale, mean, std), exact, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_moments_do_not_depend_on_the_pieces(sizes, seed):
    rng = np.random.default_rng(seed)
    offset, spread = rng.normal(size=5) * 1e4, rng.lognormal(size=5)
    pieces = [(offset + spread * rng.normal(size=(size, 3, 5))).astype(np.float32) for size in sizes]
    moments = ChannelMoments()
    for piece in pieces:
        moments.add(piece)
    together = np.concatenate(pieces).reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(moments.mean, together.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(moments.variance), together.std(axis=0), rtol=1e-6)


def test_a_channel_that_never_changes_has_deviation_one_and_comes_back_exactly():
    x = np.random.default_rng(3).normal(size=(50, 4)).astype(np.float32)
    x[:, 2] = 1234.5678
    moments = ChannelMoments()
    moments.add(x)
    mean, std = moments.constants()
    assert std[2] == 1
    np.testing.assert_array_equal(dequantise_tokens(*quantise_tokens(x, mean, std), mean, std)[:, 2], x[:, 2])


def test_moments_of_what_is_not_finite_are_refused():
    moments = ChannelMoments()
    moments.add(np.array([[0.0, 1.0], [np.nan, 2.0]], np.float32))
    with pytest.raises(NotFinite, match="NaN or infinity"):
        moments.constants()


def test_scales_have_a_chunk_for_each_frame_as_their_tokens_have():
    tokens = ArraySpec(
        name="tokens/8", dims=("frame", "token", "channel"), shape=(4, 5, 6), chunk=(1, 5, 6), dtype="int8"
    )
    head = ArraySpec(
        name="q/8", dims=("frame", "head", "token", "dim"), shape=(4, 2, 5, 3), chunk=(1, 2, 5, 3), dtype="int8"
    )
    scales = scale_spec(tokens), scale_spec(head)
    assert (
        [scale.name for scale in scales]
        == ["tokens_scale/8", "q_scale/8"]
        == [scale_name("tokens/8"), scale_name("q/8")]
    )
    assert [scale.shape for scale in scales] == [(4, 5), (4, 2, 5)]
    assert all(scale.by_frame and scale.dtype == "float16" for scale in scales)
    assert constant_names("tokens/8") == ("tokens_mean/8", "tokens_std/8")
    assert constant_names("q/8") == ()
