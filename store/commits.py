"""Commit records: a shard without one is not there.

`_commit/<pass>/<split>-view-<v>-<shard>.json` is written last, when the arrays it names are on disk under their final
names. A pass is one set of array names, so an extraction that adds arrays to a shard adds a record and leaves the old
one alone; what the shard holds is the union of its records. No record has a time in it: the same features give the
same bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from vcache.store.checksum import crc32c
from vcache.store.errors import CorruptStore
from vcache.store.findings import mend_command
from vcache.store.key import canonical_json
from vcache.store.layout import ArraySpec
from vcache.store.object_path import ObjectPath, StorePath, local, read_all
from vcache.store.parts import PartName

COMMITS = "_commit"
# Where a record's own checksum stands. Nothing else in a record looks like this: quotes within texts are escaped.
_CHECKSUM = re.compile(rb',"crc32c":(0|[1-9][0-9]*),"failures":')
# A store of 260,000 videos has thousands of records, and on a network each takes a millisecond to come.
_READ_THREADS = 8
_READ_AT_ONCE = 64


@dataclass(frozen=True)
class RowFailure:
    """A video that could not be extracted, or only in part: its row, why in a word (`kind`) and in a line (`reason`).

    The row is one of the part in a commit record, and one of the split from `FeatureStore.failures` and `.partial`.
    """

    row: int
    video_id: str
    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class StoredFile:
    """The shard file of one array.

    `chunks_crc32c` is the CRC32C of the chunk checksums in file order, which the writer has at hand. A CRC32C over the
    whole file would say nothing: bytes followed by their own CRC have a constant CRC, so all sound files with chunks of
    one size would share it.
    """

    spec: ArraySpec
    size_bytes: int
    index_crc32c: int
    chunks_crc32c: int


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """Which arrays of a shard are complete, which of its rows failed, and which are stored although their video is damaged."""

    split: PartName
    """The part; records say "split" as there were no parts when their form was settled."""
    view: int
    shard: int
    first_row: int
    num_rows: int
    files: tuple[StoredFile, ...]
    failures: tuple[RowFailure, ...]
    partial: tuple[RowFailure, ...] = ()
    """Rows with data of a damaged video, and what is wrong with it. A record without any has no such field, as before there
    were partial rows; a vcache of that time takes a record with some for a damaged one."""

    @property
    def failed_rows(self) -> frozenset[int]:
        return frozenset(failure.row for failure in self.failures)

    @property
    def stored_rows(self) -> tuple[int, ...]:
        """The rows that hold data, in their order in the files."""
        failed = self.failed_rows
        return tuple(row for row in range(self.first_row, self.first_row + self.num_rows) if row not in failed)

    @cached_property
    def arrays(self) -> frozenset[str]:
        return _pass_of(tuple(file.spec.name for file in self.files))[0]

    @property
    def relative_path(self) -> Path:
        return Path(*self._place)

    @property
    def _place(self) -> tuple[str, str, str]:
        _, name = _pass_of(tuple(file.spec.name for file in self.files))
        return COMMITS, name, f"{self.split}-view-{self.view}-{self.shard}.json"

    def encode(self) -> bytes:
        """Canonical JSON with a CRC32C of its own."""
        arrays = {
            file.spec.name: file.spec.to_json()
            | {
                "size_bytes": file.size_bytes,
                "index_crc32c": file.index_crc32c,
                "chunks_crc32c": file.chunks_crc32c,
            }
            for file in self.files
        }
        fields = {name: getattr(self, name) for name in ("split", "view", "shard", "first_row", "num_rows")}
        document = fields | {"arrays": arrays, "failures": [asdict(failure) for failure in self.failures]}
        if self.partial:
            document["partial"] = [asdict(row) for row in self.partial]
        checksum = crc32c(canonical_json(document).encode())
        return canonical_json(document | {"crc32c": checksum}).encode() + b"\n"


def pass_name(arrays: Iterable[str]) -> str:
    """Short digest of a set of array names."""
    return hashlib.sha256("\n".join(sorted(arrays)).encode()).hexdigest()[:12]


@lru_cache(maxsize=256)
def _pass_of(arrays: tuple[str, ...]) -> tuple[frozenset[str], str]:
    """The names as one object for all records of a pass, and the name of the pass."""
    return frozenset(arrays), pass_name(arrays)


def read_commits(store: StorePath, split: str, view: int) -> Iterator[CommitRecord]:
    """All records of one view of a split, ordered by pass and shard."""
    name = re.compile(rf"{re.escape(split)}-view-{view}-(\d+)\.json")
    for folder in sorted((store / COMMITS).glob("*/")):
        if isinstance(folder, ObjectPath):
            yield from _remote_commits(folder, name)
            continue
        found = sorted(
            (int(match[1]), entry.path) for entry in os.scandir(local(folder)) if (match := name.fullmatch(entry.name))
        )
        paths = [path for _, path in found]
        for path, data in zip(paths, _read_files(paths), strict=True):
            yield _decode_commit(data, path)


def _remote_commits(folder: ObjectPath, name: re.Pattern[str]) -> Iterator[CommitRecord]:
    found = sorted((int(match[1]), path) for path in folder.iterdir() if (match := name.fullmatch(path.name)))
    paths = [path for _, path in found]
    for path, data in zip(paths, read_all(paths), strict=True):
        yield _decode_commit(data, str(path))


def read_shard_commits(store: StorePath, split: str, view: int, shard: int) -> Iterator[CommitRecord]:
    """The records of one shard."""
    for path in sorted((store / COMMITS).glob(f"*/{split}-view-{view}-{shard}.json")):
        yield read_commit(path)


def read_commit(path: StorePath) -> CommitRecord:
    """Read one record.

    Raises:
        CorruptStore: the bytes are not those that were written, or belong to another place.
    """
    data = path.read_bytes() if isinstance(path, ObjectPath) else _read_file(str(path))
    return _decode_commit(data, str(path))


def _read_files(paths: Sequence[str]) -> Iterator[bytes]:
    """The bytes of the files, in order; many are read by several threads while the caller works on the first."""
    if len(paths) <= _READ_AT_ONCE:
        yield from map(_read_file, paths)
        return
    parts = [paths[start : start + _READ_AT_ONCE] for start in range(0, len(paths), _READ_AT_ONCE)]
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="store-records") as pool:
        for part in pool.map(lambda part: [_read_file(path) for path in part], parts):
            yield from part


def _read_file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (making a Path takes as long as reading the file)
        return file.read()


def _decode_commit(data: bytes, path: str) -> CommitRecord:
    try:
        document = json.loads(_checked(data))
        record = _record_of(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    if not path.endswith("/".join(record._place)):
        raise _damaged(path)
    return record


def _checked(data: bytes) -> bytes:
    """The bytes of a record, every one of them checked; raises ValueError.

    The checksum is of the record without it. So it is taken over the bytes before and after: encoding the parsed record
    again, to have them, takes ten times as long as all the rest.
    """
    found = _CHECKSUM.search(data)
    if found is None or data[-1:] != b"\n":
        raise ValueError("no checksum, or cut short")
    if crc32c(data[found.end(1) : -1], crc32c(data[: found.start()])) != int(found[1]):
        raise ValueError("the checksum does not match")
    return data


def _record_of(document: Mapping[str, Any]) -> CommitRecord:
    if document.keys() - {"partial"} != _FIELDS or document.get("partial") == []:
        raise ValueError(f"fields {sorted(document)}")
    files = tuple([_stored_file(name, entry) for name, entry in document["arrays"].items()])
    return CommitRecord(
        **{name: document[name] for name in ("split", "view", "shard", "first_row", "num_rows")},
        files=files,
        failures=tuple([RowFailure(**failure) for failure in document["failures"]]),
        partial=tuple([RowFailure(**row) for row in document.get("partial", ())]),
    )


_FIELDS = {field.name for field in fields(CommitRecord)} - {"files", "partial"} | {"arrays", "crc32c"}


def _stored_file(name: str, entry: Mapping[str, Any]) -> StoredFile:
    spec = _spec(name, tuple(entry["dims"]), tuple(entry["shape"]), tuple(entry["chunk"]), entry["dtype"])
    return StoredFile(spec, entry["size_bytes"], entry["index_crc32c"], entry["chunks_crc32c"])


@lru_cache(maxsize=1024)
def _spec(name: str, dims: tuple[str, ...], shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str) -> ArraySpec:
    """One spec for the thousands of records that name it."""
    return ArraySpec(name=name, dims=dims, shape=shape, chunk=chunk, dtype=dtype)


def _damaged(path: str) -> CorruptStore:
    store = path.rsplit(f"/{COMMITS}/", 1)[0]
    return CorruptStore(f"commit record {path} is damaged. {mend_command(store, path)}")
