"""A writer of stores from docs/format.md alone: one process, float arrays, no partial rows, neither vcache nor Zarr imported."""

import fcntl
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from format_reader import NOTHING, canonical, crc32c

Axes = tuple[str, ...]


def create(path: Path, manifest: dict[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> None:
    """A store without arrays. `manifest` lacks format_version, key, rows of the splits and checksum; tables are by split."""
    key = hashlib.sha256(canonical(manifest["spec"])).hexdigest()[:16]
    splits = [[split, len(table["label"])] for split, table in tables.items()]
    document = {**manifest, "format_version": 1, "key": key, "splits": splits, "constants": {}}
    document["crc32c"] = crc32c(canonical(document))
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    _put(temporary / "zarr.json", _group({"vcache": document}))
    _put(temporary / "_commit" / "zarr.json", _group({}))
    for split, table in tables.items():
        _write_table(temporary / split, table)
    for folder, _, _ in os.walk(temporary, topdown=False):
        _sync(Path(folder))
    temporary.rename(path)
    _sync(path.parent)


def write_view(path: Path, part: str, view: int, arrays: Mapping[str, tuple[Axes, list[np.ndarray | None]]]) -> None:
    """All shards of the arrays: of each its axes and its rows, None where a video failed; chunks are single frames."""
    rows_per_shard = json.loads((path / "zarr.json").read_bytes())["attributes"]["vcache"]["rows_per_shard"]
    with (path / "_commit" / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = path / part / f"view-{view}"
        _put(folder / "zarr.json", _group({}))
        for name, (axes, rows) in arrays.items():
            if "/" in name:
                _put((folder / name).parent / "zarr.json", _group({}))
            _put(folder / name / "zarr.json", _declaration(axes, rows, rows_per_shard))
        num_rows = len(next(iter(arrays.values()))[1])
        for shard in range(-(-num_rows // rows_per_shard)):
            _write_shard(path, part, view, shard, rows_per_shard, arrays)


def _write_shard(path: Path, part: str, view: int, shard: int, rows_per_shard: int, arrays: Mapping[str, Any]) -> None:
    described, first = {}, shard * rows_per_shard
    for name, (axes, rows) in arrays.items():
        shape, dtype = _row(rows)
        data = _shard_file([*rows[first : first + rows_per_shard]], rows_per_shard, shape)
        target = (path / part / f"view-{view}" / name).joinpath("c", str(shard), *("0" for _ in shape))
        _put(target, data)
        count = sum(row is not None for row in rows[first : first + rows_per_shard])
        seal = len(data) - 8 - 16 * rows_per_shard * shape[0]
        assert count == 0 or seal > 0
        described[name] = {
            "dims": list(axes),
            "shape": list(shape),
            "chunk": [1, *shape[1:]],
            "dtype": dtype.name,
            "size_bytes": len(data),
            "index_crc32c": struct.unpack("<I", data[-4:])[0],
            "chunks_crc32c": struct.unpack_from("<I", data, seal)[0],
        }
    of_all = next(iter(arrays.values()))[1][first : first + rows_per_shard]
    ids = [f"{part}-{row}" for row in range(first, first + len(of_all))]
    record = {
        "split": part,
        "view": view,
        "shard": shard,
        "first_row": first,
        "num_rows": len(of_all),
        "arrays": described,
        "failures": [
            {"row": first + i, "video_id": ids[i], "path": f"{ids[i]}.mp4", "kind": "missing", "reason": "not there"}
            for i, row in enumerate(of_all)
            if row is None
        ],
    }
    record["crc32c"] = crc32c(canonical(record))
    names = "\n".join(sorted(described))
    folder = path / "_commit" / hashlib.sha256(names.encode()).hexdigest()[:12]
    _put(folder / f"{part}-view-{view}-{shard}.json", canonical(record) + b"\n")
    _sync(path / "_commit")


def _shard_file(rows: list[np.ndarray | None], rows_per_shard: int, shape: tuple[int, ...]) -> bytes:
    data, seal, entries = b"", 0, []
    for row in rows:
        for frame in range(shape[0]):
            if row is None:
                entries += [NOTHING, NOTHING]
                continue
            chunk = row[frame].tobytes()
            checksum = struct.pack("<I", crc32c(chunk))
            entries += [len(data), len(chunk) + 4]
            data, seal = data + chunk + checksum, crc32c(checksum, seal)
    entries += [NOTHING] * (2 * rows_per_shard * shape[0] - len(entries))
    index = struct.pack(f"<{len(entries)}Q", *entries)
    return data + struct.pack("<I", seal) + index + struct.pack("<I", crc32c(index))


def _row(rows: list[np.ndarray | None]) -> tuple[tuple[int, ...], np.dtype]:
    row = next(row for row in rows if row is not None)
    return row.shape, row.dtype


def _declaration(axes: Axes, rows: list[np.ndarray | None], rows_per_shard: int) -> bytes:
    shape, dtype = _row(rows)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = little if dtype.itemsize > 1 else {"name": "bytes"}
    sharding = {
        "chunk_shape": [1, 1, *shape[1:]],
        "codecs": [inner, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    whole = {"name": "regular", "configuration": {"chunk_shape": [rows_per_shard, *shape]}}
    integer = None if dtype.kind == "f" else np.iinfo(dtype)
    fill = "NaN" if integer is None else int(integer.min if dtype.kind == "i" else integer.max)
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _array([len(rows), *shape], dtype.name, whole, fill, codecs, ["video", *axes])


def _write_table(folder: Path, table: Mapping[str, Any]) -> None:
    joined = [_text(text) for text in (*table["video_id"], *table["path"])]
    label = np.asarray(table["label"], "<i8")
    value = crc32c(label.tobytes(), crc32c(b"".join(joined)))
    _put(folder / "zarr.json", _group({"vcache_table_crc32c": value}))
    for name in ("video_id", "path"):
        texts = b"".join(_text(text) for text in table[name])
        _put_table_array(folder / name, struct.pack("<I", len(label)) + texts, "string", "", "vlen-utf8", len(label))
    _put_table_array(folder / "label", label.tobytes(), "int64", -(2**63), "bytes", len(label))


def _put_table_array(folder: Path, data: bytes, dtype: str, fill: Any, codec: str, num_rows: int) -> None:
    codecs = [{"name": codec, "configuration": {"endian": "little"} if codec == "bytes" else {}}, {"name": "crc32c"}]
    chunk = {"name": "regular", "configuration": {"chunk_shape": [num_rows]}}
    _put(folder / "zarr.json", _array([num_rows], dtype, chunk, fill, codecs, ["video"]))
    _put(folder / "c" / "0", data + struct.pack("<I", crc32c(data)))


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def _array(shape: list[int], dtype: str, grid: Any, fill: Any, codecs: list[Any], axes: list[str]) -> bytes:
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": grid,
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "dimension_names": axes,
        "attributes": {},
    }
    return json.dumps(document).encode()


def _group(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def _put(path: Path, data: bytes) -> None:
    """A file that is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
