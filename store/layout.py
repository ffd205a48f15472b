"""The bytes of one array: Zarr v3 metadata, shard file names, and the index at the end of a shard.

A shard file holds `rows_per_shard` rows, each cut into inner chunks, in C order, so that a row is one contiguous read:

    | chunk 0 | crc | chunk 1 | crc | ... | seal | index: (offset, size) as uint64 for every chunk of the shard | its crc |

The seal is the crc of all the chunks' crcs in file order. The commit record holds it too, so that a shard file put in the
place of another is noticed, whose index is the same. No chunk is there: other Zarr readers go by the index and pass over it.
All integers and floats are little-endian and every crc is CRC32C (Zarr v3 sharding_indexed, bytes and crc32c codecs).
A chunk that was never written has offset and size 2**64 - 1, and other Zarr readers show the fill value for it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcache.store.checksum import crc32c
from vcache.store.errors import UnsupportedFormat

CRC_BYTES = 4
ENTRY_BYTES = 16
MISSING = 2**64 - 1
METADATA = "zarr.json"
# Zarr v3 has no bfloat16: its bits are stored as uint16, which any reader opens, and an attribute says what they are.
BFLOAT16 = "bfloat16"
DTYPE_ATTRIBUTE = "vcache_dtype"
# The bits of the exponent: all of them are set in NaN and infinity, and in no other number.
_EXPONENTS = {"float16": 0x7C00, BFLOAT16: 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}
_DTYPES = (*(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), *_EXPONENTS)
# A component "c" would look like the folder in which Zarr keeps the shards.
_NAME = re.compile(r"(?!c(/|$))[A-Za-z0-9_]+(/(?!c(/|$))[A-Za-z0-9_]+)*")


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a view, described by one row of it: the array itself has an axis "video" in front.

    ArraySpec(name="tokens/8", dims=("frame", "token", "channel"), shape=(8, 197, 768), chunk=(1, 197, 768), ...)
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    """Of one row; () for one number per video."""
    chunk: tuple[int, ...]
    """The piece that has a checksum and can be read alone; divides the shape, and is one contiguous run of the row."""
    dtype: str
    """A NumPy name, or "bfloat16", which is read and written as the uint16 of its bits."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"array name {self.name!r} must be like 'cls' or 'tokens/8': letters, digits and '_', not 'c'"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if not len(self.dims) == len(self.shape) == len(self.chunk):
            raise ValueError(
                f"{self.name}: dims {self.dims}, shape {self.shape} and chunk {self.chunk} differ in length"
            )
        if any(size < 1 or part < 1 or size % part for size, part in zip(self.shape, self.chunk, strict=True)):
            raise ValueError(f"{self.name}: chunk {self.chunk} must divide shape {self.shape}, all sizes at least 1")
        first_long = next((axis for axis, part in enumerate(self.chunk) if part > 1), len(self.chunk))
        if self.chunk[first_long + 1 :] != self.shape[first_long + 1 :]:
            raise ValueError(
                f"{self.name}: chunk {self.chunk} is not one contiguous run of a row of shape {self.shape}; "
                "split the leading axes and leave the others whole"
            )

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.stored_dtype).newbyteorder("<")

    @property
    def stored_dtype(self) -> str:
        """What Zarr calls it."""
        return "uint16" if self.dtype == BFLOAT16 else self.dtype

    @property
    def exponent_bits(self) -> int | None:
        """A number in the array is NaN or infinite if all these bits are set; None where there is no such number."""
        return _EXPONENTS.get(self.dtype)

    @property
    def attributes(self) -> dict[str, str]:
        """What the array's zarr.json says beyond Zarr's own fields."""
        return {DTYPE_ATTRIBUTE: self.dtype} if self.dtype != self.stored_dtype else {}

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.numpy_dtype.itemsize

    @property
    def chunks_per_row(self) -> int:
        return self.row_bytes // self.chunk_bytes

    @property
    def by_frame(self) -> bool:
        """Whether single frames can be read."""
        return self.dims[:1] in (("frame",), ("pixel_frame",)) and self.chunk[0] == 1

    @property
    def fill_value(self) -> float | int:
        """What other Zarr readers show for a row without data: NaN, the lowest signed, the highest unsigned integer (which is a
        NaN of bfloat16)."""
        if self.numpy_dtype.kind == "f":
            return math.nan
        limits = np.iinfo(self.numpy_dtype)
        return int(limits.min if self.numpy_dtype.kind == "i" else limits.max)

    def index_bytes(self, rows_per_shard: int) -> int:
        return rows_per_shard * self.chunks_per_row * ENTRY_BYTES + CRC_BYTES

    def shard_bytes(self, num_rows: int, rows_per_shard: int) -> int:
        """Size of a shard file that holds `num_rows` rows; rows that failed take none."""
        chunks = num_rows * self.chunks_per_row
        return chunks * (self.chunk_bytes + CRC_BYTES) + CRC_BYTES + self.index_bytes(rows_per_shard)

    def shard_path(self, shard: int) -> Path:
        """Relative to the folder of the view: tokens/8/c/3/0/0/0."""
        return Path(self.name, "c", str(shard), *("0" for _ in self.shape))

    def to_json(self) -> dict[str, Any]:
        """All fields but the name."""
        return {
            "dims": list(self.dims),
            "shape": list(self.shape),
            "chunk": list(self.chunk),
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, name: str, document: Mapping[str, Any]) -> "ArraySpec":
        axes = {field: tuple(document[field]) for field in ("dims", "shape", "chunk")}
        return cls(name=name, dtype=document["dtype"], **axes)


def array_metadata(spec: ArraySpec, num_rows: int, rows_per_shard: int) -> dict[str, Any]:
    """The zarr.json of the array."""
    # Zarr knows no byte order for one-byte types.
    little = {"name": "bytes"} | ({"configuration": {"endian": "little"}} if spec.numpy_dtype.itemsize > 1 else {})
    sharding = {
        "chunk_shape": [1, *spec.chunk],
        "codecs": [little, {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_rows, *spec.shape],
        "data_type": spec.stored_dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows_per_shard, *spec.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if math.isnan(spec.fill_value) else spec.fill_value,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["video", *spec.dims],
        "attributes": spec.attributes,
    }


def without_remarks(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with no attributes but those that `array_metadata` writes: anyone may leave a remark there."""
    attributes = metadata.get("attributes")
    if not isinstance(attributes, Mapping):
        return dict(metadata)
    return {**metadata, "attributes": {name: attributes[name] for name in attributes if name == DTYPE_ATTRIBUTE}}


def spec_of_metadata(name: str, metadata: Mapping[str, Any], num_rows: int, rows_per_shard: int) -> ArraySpec:
    """Back from a zarr.json to the spec.

    Raises:
        UnsupportedFormat: the array is laid out in a way that `array_metadata` never writes.
    """
    try:
        spec = ArraySpec(
            name=name,
            dims=tuple(metadata["dimension_names"][1:]),
            shape=tuple(metadata["shape"][1:]),
            chunk=tuple(metadata["codecs"][0]["configuration"]["chunk_shape"][1:]),
            dtype=_dtype(metadata),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UnsupportedFormat(f"array {name} is not laid out as vcache does it: {error!r}") from error
    expected, found = array_metadata(spec, num_rows, rows_per_shard), without_remarks(metadata)
    for field in expected:
        if found.get(field) != expected[field]:
            raise UnsupportedFormat(
                f"array {name} is not laid out as vcache does it: {field} is {found.get(field)}, not {expected[field]}"
            )
    return spec


def _dtype(metadata: Mapping[str, Any]) -> str:
    """What an attribute of ours says, else Zarr's data type."""
    attributes = metadata.get("attributes")
    return (attributes if isinstance(attributes, Mapping) else {}).get(DTYPE_ATTRIBUTE, metadata["data_type"])


def widened_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The uint16 bits of bfloat16 numbers as float32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def group_metadata(attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, indent=2).encode() + b"\n"


def encode_index(entries: np.ndarray) -> bytes:
    """Entries (rows, chunks, 2) uint64 as stored, with the CRC32C at the end."""
    data = entries.astype("<u8").tobytes()
    return data + crc32c(data).to_bytes(CRC_BYTES, "little")


def decode_index(data: bytes, chunks_per_row: int) -> np.ndarray:
    """Back to entries (rows, chunks, 2); raises ValueError if the checksum does not match."""
    if crc32c(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError("the shard index does not match its checksum")
    return np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(-1, chunks_per_row, 2)
