"""The exceptions of the store.

StoreError
├── StoreNotFound      (FileNotFoundError)   nothing at that path
├── StoreExists        (FileExistsError)     there is something at that path, or in that shard, already
├── StoreKeyMismatch   (ValueError)          the stored features were made in another way than asked for
├── UnsupportedFormat  (ValueError)          not a vcache store, or one of a later vcache
├── SplitNotFound      (KeyError)            the store has no such split
├── ArrayNotFound      (KeyError)            the split has no such array
├── RowNotCommitted    (LookupError)         the video is not extracted yet, or its extraction failed
├── UnsupportedLocation (ValueError)         a URL of a kind that no store can have
├── StoreUnavailable   (RuntimeError)        an object store refuses, or does not answer: nothing is known of the data
├── CannotRecompute    (RuntimeError)        features are needed again and cannot be made
└── CorruptStore       (OSError)             bytes are missing or differ from their checksum
"""

from collections.abc import Iterable
from typing import Any


class StoreError(Exception):
    """Base of everything that a store raises on purpose."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is no store at the path."""


class StoreExists(StoreError, FileExistsError):
    """The path, the split, or the arrays of the shard are there already; nothing stored is ever overwritten."""


class StoreKeyMismatch(StoreError, ValueError):
    """The store's key is not the expected one; `differences` lists (field, stored value, expected value)."""

    def __init__(
        self, store: object, stored_key: str, expected_key: str, differences: Iterable[tuple[str, Any, Any]]
    ) -> None:
        self.differences = list(differences)
        lines = [
            f"  {field}: stored {_told(stored)}, asked for {_told(asked)}" for field, stored, asked in self.differences
        ]
        super().__init__(
            f"{store} holds features of key {stored_key}, not {expected_key}.\n"
            + "\n".join(lines or ["  (the two specs have the same fields and values, so one of the keys is wrong)"])
            + "\nAsk for what is stored, or use another store."
        )


def _told(value: Any) -> str:
    """Fields that have their first value, as full precision, are not told."""
    return "nothing" if value is None else repr(value)


class UnsupportedFormat(StoreError, ValueError):
    """A Zarr group that is not a vcache store, or a format version that this vcache does not read."""


class _ReadableKeyError(StoreError, KeyError):
    # KeyError prints the repr of its message, quotes and escaped newlines included.
    __str__ = Exception.__str__


class SplitNotFound(_ReadableKeyError):
    """The store has no split of that name."""


class ArrayNotFound(_ReadableKeyError):
    """The split and view have no array of that name."""


class StoreBusy(StoreError, BlockingIOError):
    """Another process holds the store for writing; two would do the same shards twice."""


class NotFinite(StoreError, ValueError):
    """A feature to be stored holds NaN or infinity; nothing of its shard is committed."""


class RowNotCommitted(StoreError, LookupError):
    """A row was asked for that holds no data; the message names the video and the reason."""


class UnsupportedLocation(StoreError, ValueError):
    """A URL that is not of the form s3://BUCKET/PATH."""


class StoreUnavailable(StoreError, RuntimeError):
    """An object store cannot be reached, refuses access, or still fails after all retries.

    Not an OSError: those of a store are damage, to be mended by extracting again, and this is none.
    """


class CorruptStore(StoreError, OSError):
    """Stored bytes are missing, cut short, or do not match their checksum."""


class CannotRecompute(StoreError, RuntimeError):
    """A repair needs features or a list of videos again, and they cannot be made as they were; nothing is changed then."""
