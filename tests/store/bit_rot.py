"""Damage to files at rest: which bytes of a store there are, and what can happen to them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcache.store.layout import CRC_BYTES, ArraySpec


@dataclass(frozen=True)
class Place:
    """A run of bytes of one class in one file."""

    kind: str
    file: Path
    start: int
    stop: int
    array: str | None = None
    shard: int | None = None


def places(store: Path, specs: tuple[ArraySpec, ...], rows_per_shard: int) -> dict[str, list[Place]]:
    """All the bytes of a store, by class."""
    found: dict[str, list[Place]] = {}
    for file in sorted(path for path in store.rglob("*") if path.is_file()):
        for place in _places_in(store, file, {spec.name: spec for spec in specs}, rows_per_shard):
            found.setdefault(place.kind, []).append(place)
    return found


def _places_in(store: Path, file: Path, specs: dict[str, ArraySpec], rows_per_shard: int) -> list[Place]:
    name, size = file.relative_to(store).as_posix(), file.stat().st_size
    if "/view-0/" in name and "/c/" in name:
        array, shard = name.split("/view-0/")[1].split("/c/")
        return _places_in_shard(file, size, specs[array], int(shard.split("/")[0]), rows_per_shard)
    kind = "table"
    if name.startswith("_commit/") and not name.endswith("zarr.json"):
        kind = "record"
    elif name == "zarr.json":
        kind = "manifest"
    elif name.endswith("zarr.json") and name.split("/")[1] not in ("video_id", "path", "label"):
        kind = "array metadata" if '"array"' in file.read_text() else "group metadata"
    array = next((array for array in specs if f"/view-0/{array}/" in name), None)
    return [Place(kind, file, 0, size, array)]


def _places_in_shard(file: Path, size: int, spec: ArraySpec, shard: int, rows_per_shard: int) -> list[Place]:
    step, index = spec.chunk_bytes + CRC_BYTES, size - spec.index_bytes(rows_per_shard)
    places = [Place("seal", file, index - CRC_BYTES, index, spec.name, shard)]
    places += [Place("index", file, index, size - CRC_BYTES, spec.name, shard)]
    places += [Place("index crc", file, size - CRC_BYTES, size, spec.name, shard)]
    for start in range(0, index - CRC_BYTES, step):
        places.append(Place("data", file, start, start + spec.chunk_bytes, spec.name, shard))
        places.append(Place("chunk crc", file, start + spec.chunk_bytes, start + step, spec.name, shard))
    return places


Restore = Callable[[], None]
"""Undoes one damage."""


def flip(place: Place, rng: random.Random, store: Path) -> Restore:
    """One bit."""
    data = bytearray(before := place.file.read_bytes())
    data[rng.randrange(place.start, place.stop)] ^= 1 << rng.randrange(8)
    return _replace(place.file, before, bytes(data))


def overwrite(place: Place, rng: random.Random, store: Path) -> Restore:
    """A range of bytes that begins in the place, with noise or with zeros."""
    before = place.file.read_bytes()
    start = rng.randrange(place.start, place.stop)
    stop = min(len(before), start + rng.choice((2, 16, 200, 4096)))
    noise = rng.choice((bytes(stop - start), rng.randbytes(stop - start)))
    return _replace(place.file, before, before[:start] + noise + before[stop:])


def truncate(place: Place, rng: random.Random, store: Path) -> Restore:
    """All that comes after some byte of the place."""
    before = place.file.read_bytes()
    return _replace(place.file, before, before[: rng.randrange(place.start, place.stop)])


def extend(place: Place, rng: random.Random, store: Path) -> Restore:
    """More bytes at the end: a few, or the file once more."""
    before = place.file.read_bytes()
    return _replace(place.file, before, before + rng.choice((b"\0", b" x", rng.randbytes(64), before)))


def delete(place: Place, rng: random.Random, store: Path) -> Restore:
    """The file."""
    before = place.file.read_bytes()
    place.file.unlink()
    return lambda: _write(place.file, before)


def swap(place: Place, rng: random.Random, store: Path) -> Restore:
    """The file with another of its kind, which may have the same size."""
    others = sorted(_like(place, store) - {place.file})
    other = rng.choice(others)
    one, two = place.file.read_bytes(), other.read_bytes()
    place.file.write_bytes(two)
    other.write_bytes(one)

    def restore() -> None:
        place.file.write_bytes(one)
        other.write_bytes(two)

    return restore


FAULTS = (flip, overwrite, truncate, extend, delete, swap)


def _like(place: Place, store: Path) -> set[Path]:
    if place.kind == "record":
        return set(store.glob("_commit/*/*-*.json"))
    if place.shard is not None:
        return {path for path in store.glob("train/view-0/**/c/**/*") if path.is_file()}
    if place.kind == "table":
        return set(store.glob("/".join(("train/*", *place.file.relative_to(store / "train").parts[1:]))))
    return set(store.rglob("zarr.json"))


def _replace(file: Path, before: bytes, after: bytes) -> Restore:
    file.write_bytes(after)
    return lambda: _write(file, before)


def _write(file: Path, data: bytes) -> Any:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
