"""A reader of stores written from docs/format.md alone: it imports nothing of vcache, no Zarr library and no CRC32C of others."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NOTHING = 2**64 - 1
_FIELDS = {
    *("format_version", "key", "spec", "dataset", "class_names", "rows_per_shard", "splits", "constants", "facts"),
    *("versions", "created", "crc32c"),
}
_RECORD_FIELDS = {"split", "view", "shard", "first_row", "num_rows", "arrays", "failures", "crc32c"}


class NotAsSpecified(Exception):
    """Something of the store is not what the page says."""


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()


def crc32c(data: bytes, before: int = 0) -> int:
    value = before ^ 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def check(condition: bool, what: str) -> None:
    if not condition:
        raise NotAsSpecified(what)


def checksummed(document: dict[str, Any], what: str) -> dict[str, Any]:
    """The object, whose field crc32c must be the checksum of the others."""
    others = {name: value for name, value in document.items() if name != "crc32c"}
    check(document["crc32c"] == crc32c(canonical(others)), f"checksum of {what}")
    return document


class Store:
    """A store of a local folder; every byte that is read is checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        document = json.loads((path / "zarr.json").read_bytes())
        check(document["zarr_format"] == 3 and document["node_type"] == "group", "the store is a Zarr v3 group")
        self.manifest = document["attributes"]["vcache"]
        check(self.manifest["format_version"] == 1, "format version")
        check(self.manifest.keys() == _FIELDS, "fields of the manifest")
        checksummed(self.manifest, "the manifest")
        digest = hashlib.sha256(canonical(self.manifest["spec"])).hexdigest()
        check(self.manifest["key"] == digest[:16], "the key is the digest of the spec")
        self.parts = dict(self.manifest["splits"])

    def rows_of_split(self, split: str) -> Iterator[tuple[str, int]]:
        """(part, row of the part) for each row of the split."""
        for part, num_rows in self.parts.items():
            if part.partition("+")[0] == split:
                yield from ((part, row) for row in range(num_rows))

    def table(self, part: str) -> dict[str, Any]:
        """The video table: lists of text, and arrays."""
        attributes = json.loads((self.path / part / "zarr.json").read_bytes())["attributes"]
        columns = attributes.get("vcache_table_columns", [])
        table = {
            name: self._column(self.path / part / name, self.parts[part])
            for name in ("video_id", "path", "label", *columns)
        }
        value = crc32c(_joined([*table["video_id"], *table["path"]]))
        value = crc32c(table["label"].astype("<i8").tobytes(), value)
        for name in sorted(columns):
            text = isinstance(table[name], list)
            dtype, shape = ("string", (len(table[name]),)) if text else (table[name].dtype.name, table[name].shape)
            value = crc32c(f"{name} {dtype} {shape}".encode(), value)
            value = crc32c(_joined(table[name]) if text else table[name].tobytes(), value)
        check(value == attributes["vcache_table_crc32c"], f"checksum of the table of {part}")
        return table

    def _column(self, folder: Path, num_rows: int) -> Any:
        values = _one_chunk(folder)
        check(len(values) == num_rows, f"rows of {folder.name}")
        return values

    def constant(self, name: str) -> np.ndarray:
        values = _one_chunk(self.path / "constants" / name)
        check(isinstance(values, np.ndarray), f"constant {name}")
        value = crc32c(f"{values.dtype.name}{values.shape}".encode(), crc32c(values.tobytes()))
        check(value == self.manifest["constants"][name], f"checksum of constant {name}")
        return values

    def records(self, part: str, view: int) -> Iterator[dict[str, Any]]:
        for path in sorted((self.path / "_commit").glob(f"*/{part}-view-{view}-*.json")):
            if not path.name.startswith("."):
                yield self._record(path, part, view)

    def _record(self, path: Path, part: str, view: int) -> dict[str, Any]:
        data = path.read_bytes()
        record = checksummed(json.loads(data), path.name)
        check(data == canonical(record) + b"\n", f"{path.name} is canonical JSON")
        check(record.keys() - {"partial"} == _RECORD_FIELDS and record.get("partial") != [], f"fields of {path.name}")
        names = "\n".join(sorted(record["arrays"]))
        check(path.parent.name == hashlib.sha256(names.encode()).hexdigest()[:12], f"pass of {path.name}")
        check(path.name == f"{record['split']}-view-{record['view']}-{record['shard']}.json", f"place of {path.name}")
        check((record["split"], record["view"]) == (part, view), f"place of {path.name}")
        rows = self.manifest["rows_per_shard"]
        check(record["first_row"] == record["shard"] * rows, f"first row of {path.name}")
        check(record["num_rows"] == min(rows, self.parts[part] - record["first_row"]), f"rows of {path.name}")
        return record

    def read(self, part: str, view: int, name: str) -> dict[int, np.ndarray]:
        """The rows of an array that hold data, by row of the part; bfloat16 as float32."""
        rows: dict[int, np.ndarray] = {}
        for record in self.records(part, view):
            if name in record["arrays"]:
                failed = {failure["row"] for failure in record["failures"]}
                stored = [row for row in range(record["num_rows"]) if record["first_row"] + row not in failed]
                shard = ShardFile(self, part, view, name, record)
                for row in stored:
                    check(record["first_row"] + row not in rows, f"{name} is committed once")
                    rows[record["first_row"] + row] = shard.row(row)
        return rows


class ShardFile:
    """One shard file of one array, checked against the record that committed it."""

    def __init__(self, store: Store, part: str, view: int, name: str, record: dict[str, Any]) -> None:
        self.file, self.name = record["arrays"][name], name
        shape, chunk, rows = self.file["shape"], self.file["chunk"], store.manifest["rows_per_shard"]
        folder = store.path / part / f"view-{view}" / name
        self.dtype = _declared_dtype(
            json.loads((folder / "zarr.json").read_bytes()), self.file, store.parts[part], rows
        )
        self.chunk_bytes = int(np.prod(chunk, dtype=np.int64)) * self.dtype.itemsize
        self.chunks = int(np.prod(shape, dtype=np.int64) // np.prod(chunk, dtype=np.int64))
        self.data = folder.joinpath("c", str(record["shard"]), *("0" for _ in shape)).read_bytes()
        check(len(self.data) == self.file["size_bytes"], f"size of {name}")
        index, end = self.data[-16 * rows * self.chunks - 4 : -4], self.data[-4:]
        check(end == struct.pack("<I", self.file["index_crc32c"]), f"index of {name} is the committed one")
        check(end == struct.pack("<I", crc32c(index)), f"checksum of the index of {name}")
        self.entries = struct.unpack(f"<{2 * rows * self.chunks}Q", index)
        self._check_seal(len(index))

    def _check_seal(self, index_bytes: int) -> None:
        offsets = sorted(offset for offset in self.entries[::2] if offset != NOTHING)
        checksums = b"".join(self.data[offset + self.chunk_bytes :][:4] for offset in offsets)
        seal = struct.pack("<I", crc32c(checksums))
        check(seal == struct.pack("<I", self.file["chunks_crc32c"]), f"{self.name} holds what was committed")
        if len(self.data) == len(offsets) * (self.chunk_bytes + 4) + 4 + index_bytes + 4:
            check(self.data[-index_bytes - 8 : -index_bytes - 4] == seal, f"seal of {self.name}")

    def row(self, row: int) -> np.ndarray:
        pieces = []
        for place in range(row * self.chunks, (row + 1) * self.chunks):
            offset, size = self.entries[2 * place : 2 * place + 2]
            check(size == self.chunk_bytes + 4, f"size of a chunk of {self.name}")
            chunk, checksum = self.data[offset : offset + size - 4], self.data[offset + size - 4 : offset + size]
            check(checksum == struct.pack("<I", crc32c(chunk)), f"checksum of a chunk of {self.name}")
            pieces.append(chunk)
        values = np.frombuffer(b"".join(pieces), self.dtype).reshape(self.file["shape"])
        return (values.astype(np.uint32) << 16).view(np.float32) if self.file["dtype"] == "bfloat16" else values


def _declared_dtype(declared: dict[str, Any], file: dict[str, Any], num_rows: int, rows_per_shard: int) -> np.dtype:
    """The data type on disk; what the array's zarr.json says must be what the record says."""
    sharding = declared["codecs"][0]["configuration"]
    check(declared["shape"] == [num_rows, *file["shape"]], "shape of the array")
    check(declared["chunk_grid"]["configuration"]["chunk_shape"] == [rows_per_shard, *file["shape"]], "shard shape")
    check(declared["codecs"][0]["name"] == "sharding_indexed" and len(declared["codecs"]) == 1, "codecs")
    check(sharding["chunk_shape"] == [1, *file["chunk"]] and sharding["index_location"] == "end", "inner chunks")
    check([codec["name"] for codec in sharding["codecs"]] == ["bytes", "crc32c"], "inner codecs")
    check(declared["dimension_names"] == ["video", *file["dims"]], "axes")
    told = declared["attributes"].get("vcache_dtype", declared["data_type"])
    check(told == file["dtype"], "dtype")
    return np.dtype(declared["data_type"]).newbyteorder("<")


def _one_chunk(folder: Path) -> Any:
    """The values of an array of one chunk: a list of texts, or an array."""
    array = json.loads((folder / "zarr.json").read_bytes())
    codec = "vlen-utf8" if array["data_type"] == "string" else "bytes"
    check([one["name"] for one in array["codecs"]] == [codec, "crc32c"], f"codecs of {folder.name}")
    data = folder.joinpath("c", *("0" for _ in array["shape"])).read_bytes()
    check(data[-4:] == struct.pack("<I", crc32c(data[:-4])), f"checksum of {folder.name}")
    if codec == "vlen-utf8":
        return _split_texts(data[:-4])
    return np.frombuffer(data[:-4], np.dtype(array["data_type"]).newbyteorder("<")).reshape(array["shape"])


def _split_texts(data: bytes) -> list[str]:
    (count,), place, texts = struct.unpack_from("<I", data), 4, []
    for _ in range(count):
        (size,) = struct.unpack_from("<I", data, place)
        texts.append(data[place + 4 : place + 4 + size].decode())
        place += 4 + size
    check(place == len(data), "texts")
    return texts


def _joined(texts: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
