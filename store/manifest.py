"""What is in a store: its manifest, kept in the attributes of the Zarr group, and the table of videos of a split."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from vcache.store.checksum import crc32c
from vcache.store.errors import CorruptStore, StoreNotFound, UnsupportedFormat
from vcache.store.key import canonical_json
from vcache.store.layout import METADATA
from vcache.store.object_path import StorePath
from vcache.store.parts import PartName, group_parts

FORMAT_VERSION = 1
ATTRIBUTE = "vcache"
TABLE_ARRAYS = ("video_id", "path", "label")
"""The arrays that every video table has; the others are its columns."""
# "c" would look like the folder in which Zarr keeps chunks.
_COLUMN_NAME = re.compile(r"(?!c$)[a-z][a-z0-9_]*")
_COLUMN_DTYPES = tuple(np.dtype(name) for name in ("int64", "float64", "uint8", "bool"))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a store that is not an array."""

    key: str
    """`cache_key(spec)`."""
    spec: dict[str, Any]
    """What changes a stored value, and nothing else."""
    dataset: str
    class_names: tuple[str, ...]
    rows_per_shard: int
    """Rows in one shard file of any array; the last shard of a split may hold fewer."""
    splits: dict[PartName, int]
    """Part -> number of videos, in the order the parts were added; `FeatureStore.splits` has whole splits."""
    constants: dict[str, int] = field(default_factory=dict)
    """Arrays of the whole store by name (constants.py), each with the checksum of its values."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Free-form JSON for whoever reads the features."""
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    """ISO 8601 time, by the caller."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard ({self.rows_per_shard}) must be at least 1")
        group_parts(self.splits)

    def to_json(self) -> dict[str, Any]:
        """The attribute as stored: the fields and a checksum of them, so that a damaged manifest is noticed."""
        document = asdict(self) | {"class_names": list(self.class_names), "splits": list(self.splits.items())}
        return document | {"crc32c": _checksum(document)}

    @classmethod
    def from_json(cls, document: object, *, source: str) -> "Manifest":
        """Read what `to_json` gave; `source` names the store in errors.

        Raises:
            UnsupportedFormat: not a manifest, or one of a later format version.
            CorruptStore: fields are missing or the checksum does not match.
        """
        if not isinstance(document, Mapping) or type(document.get("format_version")) is not int:
            raise UnsupportedFormat(
                f"{source} is a Zarr group but not a vcache store: it has no attribute {ATTRIBUTE!r} with a "
                "format_version. Name a folder that `vcache extract` made."
            )
        if document["format_version"] != FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{source} has format version {document['format_version']}; this vcache reads version "
                f"{FORMAT_VERSION}. Read it with the vcache that wrote it or a later one:  pip install --upgrade vcache"
            )
        values = {name: value for name, value in document.items() if name != "crc32c"}
        names = {field.name for field in fields(cls)}
        if values.keys() != names or document.get("crc32c") != _checksum(values):
            raise CorruptStore(
                f"the manifest of {source} is damaged: its fields do not match their checksum. "
                "Restore zarr.json from a copy; the arrays are not affected."
            )
        return cls(**values | {"class_names": tuple(values["class_names"]), "splits": dict(values["splits"])})


@dataclass(frozen=True, eq=False)
class VideoTable:
    """The videos of a split, one row each: ids (unique), paths relative to the dataset's root, class labels (int64)."""

    ids: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """More of each video, by name: (rows,) or (rows, k) int64, float64, uint8 or bool, or (rows,) text (NumPy's StringDType)."""

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.paths) == len(self.labels) or self.labels.ndim != 1:
            raise ValueError(
                f"a video table needs as many ids, paths and labels; got {len(self.ids)}, {len(self.paths)} and "
                f"labels of shape {self.labels.shape}"
            )
        if self.labels.dtype != np.int64:
            raise ValueError(f"labels must be int64, got {self.labels.dtype}")
        if len(set(self.ids)) < len(self.ids):
            twice, _ = Counter(self.ids).most_common(1)[0]
            raise ValueError(f"video id {twice!r} is there twice; ids must be unique in a split")
        for name, values in self.columns.items():
            self._check_column(name, values)

    def _check_column(self, name: str, values: np.ndarray) -> None:
        if not _COLUMN_NAME.fullmatch(name) or name in TABLE_ARRAYS:
            raise ValueError(
                f"column name {name!r} must be lower-case letters, digits and '_', and not {', '.join(TABLE_ARRAYS)}"
            )
        text = values.dtype.kind == "T"
        if not text and values.dtype not in _COLUMN_DTYPES:
            raise ValueError(f"column {name!r} must be int64, float64, uint8, bool or text, got {values.dtype}")
        if values.shape[:1] != (len(self),) or values.ndim > (1 if text else 2) or 0 in values.shape[1:]:
            raise ValueError(f"column {name!r} must have {len(self)} rows along 1 or 2 axes, got {values.shape}")

    def __len__(self) -> int:
        return len(self.ids)


def read_manifest(path: StorePath) -> Manifest:
    """The manifest of the store at `path`.

    Raises:
        StoreNotFound, UnsupportedFormat, CorruptStore: nothing there, no store, or damaged.
    """
    try:
        metadata = json.loads((path / METADATA).read_bytes())
    except FileNotFoundError as error:
        if path.exists():
            raise UnsupportedFormat(
                f"{path} is not a vcache store: it has no {METADATA}. Name a store, or a path where there is nothing yet."
            ) from error
        raise StoreNotFound(
            f"there is no store at {path}. Make one with:  vcache extract --store {path} ..."
        ) from error
    except NotADirectoryError as error:
        raise UnsupportedFormat(f"{path} is a file, not a store.") from error
    except ValueError as error:
        raise CorruptStore(f"{path / METADATA} is damaged: {error}. Restore it from a copy.") from error
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    return Manifest.from_json(attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None, source=str(path))


def _checksum(document: Mapping[str, Any]) -> int:
    try:
        return crc32c(canonical_json(document).encode())
    except TypeError as error:
        raise ValueError(f"the manifest must be plain JSON: {error}") from error
