"""Files that survive a crash: temporary name, fsync, rename, fsync of the folder; and what a killed writer leaves.

A temporary file or folder is named `.<name>.<12 hex digits>.tmp` and its writer holds a lock on it (flock) until it has
its final name. The kernel drops the lock of a killed process, so that `remove_stale_temporaries` can tell a leftover
from a file that another process is writing at this moment.
"""

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from vcache.store.errors import StoreExists
from vcache.store.object_path import ObjectPath, StorePath, local

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
# Linux takes at most 1024 buffers in one call (IOV_MAX) and moves at most 2 GiB - 4 KiB.
MAX_BUFFERS = 1024
_WRITE_BACK_BYTES = 8 << 20
_PAGE_BYTES = 1 << 16  # the largest that Linux has
_SYNC_THREADS = 8


class TemporaryFile:
    """A locked temporary file in the folder that it will be published in, or in one on the same file system."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.fd = _create_locked(folder, name)
        self._size = self._on_its_way = 0

    def write(self, buffers: Sequence[memoryview | bytes]) -> None:
        """Append all the buffers."""
        for start in range(0, len(buffers), MAX_BUFFERS):
            pending = [memoryview(buffer) for buffer in buffers[start : start + MAX_BUFFERS]]
            while pending:
                done = os.writev(self.fd, pending)
                self._size += done
                pending = drop_done(pending, done)
        self._start_write_back()

    def _start_write_back(self) -> None:
        """Let the disk begin with what was written, or it idles until `sync`, which then waits for all of it."""
        size = self._size - self._size % _PAGE_BYTES
        if size - self._on_its_way >= _WRITE_BACK_BYTES:
            # Linux starts to write these pages, and does not wait; Python has no sync_file_range.
            os.posix_fadvise(self.fd, self._on_its_way, size - self._on_its_way, os.POSIX_FADV_DONTNEED)
            self._on_its_way = size

    def sync(self) -> None:
        os.fsync(self.fd)

    def publish(self, path: StorePath) -> None:
        """Give the file its final name; the caller has synced it, and syncs the folder next."""
        self.path.replace(local(path))
        fd, self.fd = self.fd, -1
        os.close(fd)

    def discard(self) -> None:
        """Remove the file if it was not published; else nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            _remove_and_close(self.path, fd)


def write_all(fd: int, buffers: Sequence[memoryview | bytes]) -> None:
    """Append all the buffers to an open file."""
    for start in range(0, len(buffers), MAX_BUFFERS):
        pending = [memoryview(buffer) for buffer in buffers[start : start + MAX_BUFFERS]]
        while pending:
            pending = drop_done(pending, os.writev(fd, pending))


def drop_done(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the buffers after a call that moved `num_bytes`; a system call may do less than it was asked."""
    for position, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[position + 1 :]]
        num_bytes -= len(buffer)
    return []


def write_durably(path: StorePath, data: bytes) -> None:
    """Write or replace a file so that at any moment, power loss included, there is the old or the new one, whole."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    file = TemporaryFile(local(path.parent), path.name)
    try:
        file.write([data])
        file.sync()
        file.publish(path)
    finally:
        file.discard()
    sync_folder(path.parent)


def write_once(path: StorePath, data: bytes) -> None:
    """`write_durably`, but an object that is there with other bytes is left alone.

    Raises:
        FileExistsError: it is.
    """
    if isinstance(path, ObjectPath):
        path.create_bytes(data)
    else:
        write_durably(path, data)


@contextmanager
def published_folder(path: StorePath) -> Iterator[Path]:
    """A folder to fill under a temporary name; synced and renamed to `path` on a clean exit, else removed.

    For an object store it is a local one; its files become objects, the zarr.json that makes it a store or a table last.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory() as spool:
            yield Path(spool)
            _upload_folder(Path(spool), path)
        return
    path = local(path)
    _refuse_existing(path)
    temporary = path.parent / _temporary_name(path.name)
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
        sync_tree(temporary)
        _refuse_existing(path)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def make_folders(folder: StorePath) -> None:
    """Make `folder` and those above it, and sync them all: also those that a killed run made and never synced."""
    if isinstance(folder, ObjectPath):
        return
    folder = local(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for above in (folder, *folder.resolve().parents):
        with suppress(PermissionError):  # not to be listed, so not ours
            sync_folder(above)
        if above.is_mount():
            return


def sync_folder(folder: StorePath) -> None:
    """Wait until the names in a folder are on disk; an object store has no folders."""
    if isinstance(folder, ObjectPath):
        return
    fd = os.open(local(folder), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def folders_up(folders: Iterable[StorePath], top: StorePath) -> list[StorePath]:
    """The folders and all between them and `top`, which is one: to sync also those that a killed run made and never synced."""
    if isinstance(top, ObjectPath):
        return []
    above = {path for folder in folders for path in (folder, *folder.parents) if path == top or top in path.parents}
    return sorted(above, reverse=True)


def in_parallel(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """work(item) of every item, in threads, for work that waits for the disk: a file system makes many syncs into few.

    No thread works any more when this returns, or raises the first error.
    """
    if len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_SYNC_THREADS, len(items)), thread_name_prefix="store-sync") as pool:
        return list(pool.map(work, items))


def sync_tree(top: Path) -> None:
    """Sync every file and folder under `top`, and `top`."""
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            fd = os.open(Path(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(folder))


def remove_stale_temporaries(paths: Iterator[Path]) -> int:
    """Remove those of the paths that are temporary and that no living process writes; returns how many there were."""
    return sum(_remove_if_stale(path) for path in paths if is_temporary(path.name))


def is_temporary(name: str) -> bool:
    """Whether a file or folder of that name is one that a writer has not published."""
    return _TEMPORARY.fullmatch(name) is not None


def _temporary_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(6)}.tmp"


def _create_locked(folder: Path, name: str) -> tuple[Path, int]:
    while True:
        path = folder / _temporary_name(name)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return path, fd
        except BaseException:
            _remove_and_close(path, fd)
            raise
        os.close(fd)  # a cleaner took it for a leftover, between the creation and the lock


def _remove_and_close(path: Path, fd: int) -> None:
    try:
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _remove_if_stale(path: Path) -> bool:
    try:
        # For writing, without which a network file system gives no exclusive lock.
        fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except (FileNotFoundError, PermissionError):
        return False  # published or removed since the folder was listed, or another user's
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False  # its writer lives
    finally:
        os.close(fd)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise StoreExists(f"there is something at {path} already; choose another path or remove it")


def _upload_folder(folder: Path, path: ObjectPath) -> None:
    """PUT all files, that of the group itself last and only if there is none.

    What lies there already is what a killed run of this left, or it is refused.
    """
    files = {path / file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    last = path / "zarr.json"
    there = set(path.objects_below())
    if there - (files.keys() - {last}):
        raise StoreExists(f"there is something at {path} already; choose another path or remove it")
    for target, file in files.items():
        if target != last:
            target.write_bytes(file.read_bytes())
    try:
        last.create_bytes(files[last].read_bytes())
    except FileExistsError as error:
        raise StoreExists(f"another process has just made {path}; choose another path, or use that one") from error
