"""Paths of object stores (`s3://bucket/key`) that answer like pathlib's, as far as a store asks.

An object store has no folders: a folder here is a prefix that some object has, so `mkdir` does nothing and a folder ends
with its last object. A PUT is atomic: at any moment there is the old object or the new one, whole.
"""

import fnmatch
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from vcache.store.errors import UnsupportedLocation
from vcache.store.object_client import ask

if TYPE_CHECKING:  # loaded late: a local store needs none of it
    from obstore.store import S3Store

_T = TypeVar("_T")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_REQUESTS_AT_ONCE = 32
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@runtime_checkable
class StorePath(Protocol):
    """Where a store, or something in it, lies: a `pathlib.Path` or an `ObjectPath`. This is what both can do."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self) -> "StorePath": ...
    @property
    def parents(self) -> Sequence["StorePath"]: ...
    def __truediv__(self, other: str | PurePath, /) -> "StorePath": ...
    def __lt__(self, other: Any, /) -> bool: ...
    def __hash__(self) -> int: ...
    def with_name(self, name: str, /) -> "StorePath": ...
    def relative_to(self, other: Any, /) -> Path: ...
    def resolve(self) -> "StorePath": ...
    def exists(self) -> bool: ...
    def is_file(self) -> bool: ...
    def is_dir(self) -> bool: ...
    def mkdir(self, mode: int = ..., parents: bool = ..., exist_ok: bool = ...) -> None: ...
    def iterdir(self) -> Iterator["StorePath"]: ...
    def glob(self, pattern: str, /) -> Iterator["StorePath"]: ...
    def rglob(self, pattern: str, /) -> Iterator["StorePath"]: ...
    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True, order=True)
class ObjectPath:
    """One key of a bucket, or a prefix of keys; `str()` is the URL. There is no `__fspath__`: nothing mistakes it for a file."""

    bucket: str
    key: str
    """Without a slash at either end; "" is the bucket."""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, other: str | PurePath) -> "ObjectPath":
        return ObjectPath(self.bucket, _key(PurePosixPath(self.key, other)))

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.bucket, _key(PurePosixPath(self.key).parent))

    @property
    def parents(self) -> tuple["ObjectPath", ...]:
        keys = PurePosixPath(self.key).parents
        return tuple(ObjectPath(self.bucket, _key(key)) for key in keys)

    def with_name(self, name: str) -> "ObjectPath":
        return self.parent / name

    def relative_to(self, other: "ObjectPath") -> Path:
        """Raises ValueError if `other` is not above."""
        if self.bucket != other.bucket:
            raise ValueError(f"{self} is not under {other}")
        return Path(PurePosixPath(self.key).relative_to(other.key))

    def resolve(self) -> "ObjectPath":
        """Itself: a URL is absolute."""
        return self

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        from obstore import head

        if not self.key:
            return False
        try:
            self.ask("read", lambda client: head(client, self.key))
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        folders, files = self._children()
        return bool(folders or files)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object."""

    def iterdir(self) -> Iterator["ObjectPath"]:
        folders, files = self._children()
        yield from sorted(folders + files)

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """As pathlib's, without `**`; a slash at the end asks for folders. One listing for each folder that is looked into."""
        first, _, rest = pattern.partition("/")
        is_last = not rest
        if not re.search(r"[*?\[]", first):
            found = [self / first]
            if is_last:
                found = [path for path in found if (path.is_dir() if pattern.endswith("/") else path.exists())]
        else:
            folders, files = self._children()
            candidates = folders if pattern != first else folders + files
            found = [path for path in sorted(candidates) if fnmatch.fnmatchcase(path.name, first)]
        for path in found:
            yield from [path] if is_last else path.glob(rest)

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        """The objects at any depth whose name matches; no folders."""
        for path in self.objects_below():
            if fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def objects_below(self) -> list["ObjectPath"]:
        """All objects under this prefix, in order."""
        import obstore

        def keys(client: "S3Store") -> list[str]:
            batches = obstore.list(client, self.key or None, chunk_size=1000)
            return [meta["path"] for batch in batches for meta in batch]

        return sorted(ObjectPath(self.bucket, key) for key in self.ask("listed", keys))

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        from obstore import get

        if not self.key:
            raise FileNotFoundError(f"{self} is a bucket, not an object")
        return self.ask("read", lambda client: bytes(get(client, self.key).bytes()))

    def write_bytes(self, data: bytes) -> None:
        """Write or replace the object."""
        from obstore import put

        self.ask("written", lambda client: put(client, self.key, data))

    def create_bytes(self, data: bytes) -> None:
        """Write an object that is not there yet. One that is there with the same bytes is as good: the answer to a request
        that succeeded may be lost on its way, and then it is sent again.

        Raises:
            FileExistsError: there is one, with other bytes.
        """
        from obstore import put

        try:
            self.ask("written", lambda client: put(client, self.key, data, mode="create"))
        except FileExistsError:
            if self.read_bytes() != data:
                raise

    def remove_tree(self) -> None:
        """Delete all objects under this prefix."""
        from obstore import delete

        keys = [path.key for path in self.objects_below()]
        if keys:
            self.ask("deleted", lambda client: delete(client, keys))

    def _children(self) -> tuple[list["ObjectPath"], list["ObjectPath"]]:
        """The folders and the objects directly below."""
        from obstore import list_with_delimiter

        there = self.ask("listed", lambda client: list_with_delimiter(client, self.key or None))
        folders = [ObjectPath(self.bucket, key) for key in there["common_prefixes"]]
        return folders, [ObjectPath(self.bucket, meta["path"]) for meta in there["objects"]]

    def ask(self, doing: str, request: "Callable[[S3Store], _T]") -> _T:
        """Make a request with the client of the bucket; errors are those of `object_client.ask`."""
        return ask(self.bucket, str(self), doing, request)


def _key(path: PurePosixPath) -> str:
    return "" if path == PurePosixPath() else str(path)


def store_path(location: str | StorePath) -> StorePath:
    """The path that a person wrote: `s3://bucket/path`, or a folder.

    Raises:
        UnsupportedLocation: another kind of URL, one without a bucket or a path, or one with credentials in it.
    """
    if not isinstance(location, str):
        if (
            isinstance(location, Path)
            and location.parts[:1]
            and re.fullmatch(r"[A-Za-z0-9+.-]{2,}:", location.parts[0])
        ):
            raise UnsupportedLocation(
                f"{location} has one slash after the colon; a store in a bucket is s3://BUCKET/PATH (in Python a text: a Path "
                "merges slashes)."
            )
        return location
    if (match := _SCHEME.fullmatch(location)) is None:
        return Path(location)
    scheme, rest = match[1].lower(), match[2]
    bucket, _, key = rest.partition("/")
    if "@" in bucket or ":" in bucket:  # not repeated: it may hold a password
        raise UnsupportedLocation(
            "credentials do not belong in a URL, where every log shows them: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"and write {scheme}://BUCKET/PATH."
        )
    if scheme != "s3":
        raise UnsupportedLocation(
            f"{location}: stores are folders or s3://BUCKET/PATH, not {scheme}://. Other stores that speak S3 (MinIO, R2, Ceph, "
            "Google's interoperability endpoint) are reached with s3:// and AWS_ENDPOINT_URL."
        )
    key = _key(PurePosixPath(key.strip("/")))
    if not _BUCKET.fullmatch(bucket) or re.search(r"(^|/)\.\.(/|$)|[?#]", key):
        raise UnsupportedLocation(f"{location} is not of the form s3://BUCKET/PATH.")
    return ObjectPath(bucket, key)


def local(path: StorePath) -> Path:
    """The path, which is one of the file system: for what object stores do not have."""
    assert isinstance(path, Path), path
    return path


@contextmanager
def readable_folder(folder: StorePath) -> Iterator[Path]:
    """The folder, for code that reads files: a remote one is copied to a temporary folder. For small ones."""
    if not isinstance(folder, ObjectPath):
        yield local(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.objects_below():
            target = Path(copy, path.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        yield Path(copy)


def read_all(paths: Sequence[StorePath]) -> Iterator[bytes]:
    """The contents of many small files, in order; objects are asked for many at a time."""
    if not paths or not isinstance(paths[0], ObjectPath):
        yield from (path.read_bytes() for path in paths)
        return
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="store-get") as pool:
        yield from pool.map(lambda path: path.read_bytes(), paths)


def remove_tree(folder: StorePath) -> None:
    """Delete a folder with all that is in it, if it is there."""
    if isinstance(folder, ObjectPath):
        folder.remove_tree()
    else:
        shutil.rmtree(local(folder), ignore_errors=True)
