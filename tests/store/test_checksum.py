"""The checksum is CRC32C, by the standard's own vectors and by another implementation."""

import crc32c as other
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.store.checksum import crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_vectors_of_rfc_3720_and_of_the_crc_catalogue(data, expected):
    assert crc32c(data) == expected


@given(st.binary(max_size=40_000), st.integers(0, 40_000), st.integers(0, 70))
def test_any_bytes_whole_in_parts_and_inside_a_buffer_as_by_another_implementation(data, cut, before):
    assert crc32c(data) == other.crc32c(data)
    assert crc32c(data[cut:], crc32c(data[:cut])) == other.crc32c(data)
    assert crc32c(memoryview(bytearray(before) + data)[before:]) == other.crc32c(data)
