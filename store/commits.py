"""Commit records: a shard without one is not there.

`_commit/<pass>/<split>-view-<v>-<shard>.json` is written last, when the arrays it names are on disk under their final
names. A pass is one set of array names, so an extraction that adds arrays to a shard adds a record and leaves the old
one alone; what the shard holds is the union of its records. No record has a time in it: the same features give the
same bytes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vcache.store.checksum import crc32c
from vcache.store.errors import CorruptStore
from vcache.store.findings import mend_command
from vcache.store.key import canonical_json
from vcache.store.layout import ArraySpec
from vcache.store.parts import PartName

COMMITS = "_commit"


@dataclass(frozen=True)
class RowFailure:
    """A video that could not be extracted: its row, why in a word (`kind`) and in a line (`reason`).

    The row is one of the part in a commit record, and one of the split from `FeatureStore.failures`.
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
    """Which arrays of a shard are complete, and which of its rows failed."""

    split: PartName
    """The part; records say "split" as there were no parts when their form was settled."""
    view: int
    shard: int
    first_row: int
    num_rows: int
    files: tuple[StoredFile, ...]
    failures: tuple[RowFailure, ...]

    @property
    def arrays(self) -> frozenset[str]:
        return frozenset(file.spec.name for file in self.files)

    @property
    def relative_path(self) -> Path:
        return Path(COMMITS, pass_name(self.arrays), f"{self.split}-view-{self.view}-{self.shard}.json")

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
        checksum = crc32c(canonical_json(document).encode())
        return canonical_json(document | {"crc32c": checksum}).encode() + b"\n"


def pass_name(arrays: Iterable[str]) -> str:
    """Short digest of a set of array names."""
    return hashlib.sha256("\n".join(sorted(arrays)).encode()).hexdigest()[:12]


def read_commits(store: Path, split: str, view: int) -> Iterator[CommitRecord]:
    """All records of one view of a split, ordered by pass and shard."""
    name = re.compile(rf"{re.escape(split)}-view-{view}-(\d+)\.json")
    for folder in sorted((store / COMMITS).glob("*/")):
        shards = sorted(int(match[1]) for path in folder.iterdir() if (match := name.fullmatch(path.name)))
        for shard in shards:
            yield read_commit(folder / f"{split}-view-{view}-{shard}.json")


def read_shard_commits(store: Path, split: str, view: int, shard: int) -> Iterator[CommitRecord]:
    """The records of one shard."""
    for path in sorted((store / COMMITS).glob(f"*/{split}-view-{view}-{shard}.json")):
        yield read_commit(path)


def read_commit(path: Path) -> CommitRecord:
    """Read one record.

    Raises:
        CorruptStore: the bytes are not those that were written, or belong to another place.
    """
    data = path.read_bytes()
    try:
        record = _decode(json.loads(data))
        encoded = record.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    # Encoding again covers the checksum and every byte that JSON would forgive.
    if encoded != data or record.relative_path != path.relative_to(path.parents[2]):
        raise _damaged(path)
    return record


def _decode(document: Mapping[str, Any]) -> CommitRecord:
    files = tuple(
        StoredFile(ArraySpec.from_json(name, entry), entry["size_bytes"], entry["index_crc32c"], entry["chunks_crc32c"])
        for name, entry in document["arrays"].items()
    )
    return CommitRecord(
        **{name: document[name] for name in ("split", "view", "shard", "first_row", "num_rows")},
        files=files,
        failures=tuple(RowFailure(**failure) for failure in document["failures"]),
    )


def _damaged(path: Path) -> CorruptStore:
    return CorruptStore(f"commit record {path} is damaged. {mend_command(path.parents[2])}")
