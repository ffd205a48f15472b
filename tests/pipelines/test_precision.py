"""What the device makes of features is what the NumPy reference says, bit by bit; and back, within rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from vcache.pipelines.precision import dequantised, encoded
from vcache.store import quantise
from vcache.store.layout import widened_bfloat16

numbers = st.floats(-(2.0**22), 2.0**22, width=32, allow_subnormal=False)
features = nps.array_shapes(min_dims=2, max_dims=4, max_side=5).flatmap(
    lambda shape: st.tuples(
        nps.arrays(np.float32, shape, elements=numbers),
        nps.arrays(np.float32, shape[-1:], elements=st.floats(-100, 100, width=32, allow_subnormal=False)),
        nps.arrays(np.float32, shape[-1:], elements=st.floats(2.0**-10, 2.0**10, width=32)),
    )
)


@given(features)
def test_tokens_are_quantised_as_the_reference_does_bit_by_bit(drawn):
    x, mean, std = drawn
    constants = {"tokens_mean/3": torch.from_numpy(mean), "tokens_std/3": torch.from_numpy(std)}
    stored = encoded("tokens/3", torch.from_numpy(x), "int8", constants)
    if not np.isfinite(stored["tokens_scale/3"].numpy()).all():  # the writer refuses what the reference refuses
        with pytest.raises(quantise.NotFinite):
            quantise.quantise_tokens(x, mean, std)
        return
    q, scale = quantise.quantise_tokens(x, mean, std)
    np.testing.assert_array_equal(stored["tokens/3"].numpy(), q)
    np.testing.assert_array_equal(stored["tokens_scale/3"].numpy(), scale)
    back = dequantised(stored, "tokens/3", constants)
    expected = quantise.dequantise_tokens(q, scale, mean, std)
    largest = np.abs(expected).max() + np.abs(mean).max()
    np.testing.assert_allclose(back.numpy(), expected, rtol=0, atol=2.0**-22 * largest)


@given(features)
def test_queries_are_quantised_without_constants(drawn):
    x = drawn[0]
    stored = encoded("q/3", torch.from_numpy(x), "int8", {})
    q, scale = quantise.quantise(x)
    np.testing.assert_array_equal(stored["q/3"].numpy(), q)
    np.testing.assert_array_equal(stored["q_scale/3"].numpy(), scale)
    np.testing.assert_array_equal(dequantised(stored, "q/3", {}).numpy(), quantise.dequantise(q, scale))


@given(nps.arrays(np.float32, (3, 4), elements=numbers))
def test_bfloat16_rounds_to_the_nearest_and_ties_to_even(x):
    stored = encoded("cls/3", torch.from_numpy(x), "bfloat16", {})["cls/3"]
    bits = x.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(stored.numpy(), expected)
    back = dequantised({"cls/3": stored}, "cls/3", {})
    assert back.dtype == torch.bfloat16
    np.testing.assert_array_equal(back.float().numpy(), widened_bfloat16(expected))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_plain_floats_are_cast_and_read_as_they_are(dtype):
    x = torch.randn(3, 4)
    stored = encoded("cls/3", x, dtype, {})
    assert torch.equal(stored["cls/3"], x.to(getattr(torch, dtype)))
    assert dequantised(stored, "cls/3", {}) is stored["cls/3"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_scales(bad):
    x = torch.zeros(2, 3)
    x[1, 2] = bad
    finite = torch.isfinite(encoded("q/3", x, "int8", {})["q_scale/3"])
    assert finite.tolist() == [True, False]


def test_reading_leaves_what_was_read_as_it_was():
    stored = encoded("q/3", torch.randn(3, 4), "int8", {})
    before = {name: array.clone() for name, array in stored.items()}
    dequantised(stored, "q/3", {})
    torch.testing.assert_close(stored, before, rtol=0, atol=0)
