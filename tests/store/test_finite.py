"""all_finite against np.isfinite."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.store.finite import all_finite
from vcache.store.layout import ArraySpec, widened_bfloat16

DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}


def exponent_bits(dtype: str) -> int | None:
    return ArraySpec(name="x", dims=(), shape=(), chunk=(), dtype=dtype).exponent_bits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_two_bytes(dtype):
    every = np.arange(2**16, dtype="<u2").view(DTYPES[dtype])
    with np.errstate(invalid="ignore"):  # widening a signalling NaN
        expected = np.isfinite(widened_bfloat16(every) if dtype == "bfloat16" else every)
    bits = exponent_bits(dtype)
    assert [all_finite(every[at : at + 1], bits) for at in range(2**16)] == expected.tolist()
    assert all_finite(every[expected], bits)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
def test_any_bits_of_longer_floats(dtype, data):
    exponent, size = exponent_bits(dtype), np.dtype(dtype).itemsize
    bits = st.integers(0, 2 ** (8 * size) - 1)
    near = st.sampled_from([sign + exponent + step for sign in (0, 1 << (8 * size - 1)) for step in (-1, 0, 1)])
    values = np.array(data.draw(st.lists(bits | near, max_size=7)), dtype=f"<u{size}").view(dtype)
    assert all_finite(values, exponent) == np.isfinite(values).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_bad_value_anywhere_in_an_array_of_any_strides(bad, dtype):
    values, bits = np.full((3, 4, 5), -1.5, dtype=dtype), exponent_bits(dtype)
    for view in (values, values[:, ::2], values.transpose(2, 0, 1), values[1, 2, 3, ...]):
        assert all_finite(view, bits)
    values[1, 2, 3] = bad
    for view in (values, values[:, ::2], values.transpose(2, 0, 1), values[1, 2, 3, ...]):
        assert not all_finite(view, bits)


def test_integers_are_finite():
    assert all_finite(np.array([-1, 2**63 - 1]), exponent_bits("int64"))
    assert all_finite(np.array([2**16 - 1], dtype=np.uint16), exponent_bits("uint16"))
