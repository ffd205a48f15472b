"""Who may write a store: one process alone, or several that share its shards. Readers are not affected.

    sole_writer     an ordinary extraction, and everything that rewrites: refused while anybody else writes
    shared_writer   one of several processes that write different shards: refused beside a sole writer
    set_up_turn     one process after the other: making the store, adding to it, declaring arrays

with ExitStack() as stack:
    with set_up_turn(path):
        ...                                           # make the store unless it is there
        stack.enter_context(shared_writer(path))      # within the turn, so that no sole writer comes between
        ...                                           # splits, arrays, constants; `clean_temporary`
    ...                                               # shards

A lock ends with its block, or with the process however it dies. What is locked (flock) are empty files, as network file
systems do not lock folders; NFS gives such locks to other machines, too, unless it is mounted with `local_lock`. Object
stores have no locks: there two processes may do the same work, and the exclusive commit record says which of them committed a
shard.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vcache.store.errors import StoreBusy
from vcache.store.files import make_folders
from vcache.store.object_path import ObjectPath, StorePath, local

WRITER_LOCK = "_commit/writer.lock"
SET_UP_SECONDS = 3600.0
"""How long a turn is waited for: the one before may be measuring channel statistics on a slow machine."""

_LOOK_AGAIN_SECONDS = 0.1


@contextmanager
def sole_writer(path: StorePath) -> Iterator[None]:
    """Hold the store at `path` alone. Shards are safe without it (the last rename wins, and it brings the same bytes); it saves
    two processes from doing the same work, and keeps writers away from what is rewritten.

    Raises:
        StoreBusy: another process, or another block of this one, holds it, or some share it.
    """
    if isinstance(path, ObjectPath):
        yield
        return
    with _lock_file(local(path) / WRITER_LOCK) as lock:
        if not _locked(lock, fcntl.LOCK_EX):
            raise StoreBusy(_shared_by_others(path) if _locked(lock, fcntl.LOCK_SH) else _held_by_one(path))
        yield


@contextmanager
def shared_writer(path: StorePath) -> Iterator[None]:
    """Hold the store at `path` beside others that do; who writes which shard is for them to know.

    Raises:
        StoreBusy: a sole writer holds it.
    """
    if isinstance(path, ObjectPath):
        yield
        return
    with _lock_file(local(path) / WRITER_LOCK) as lock:
        if not _locked(lock, fcntl.LOCK_SH):
            raise StoreBusy(
                f"another process is extracting into {path} without --part, or rewrites it. Wait for it and run the command "
                "again, or stop it first."
            )
        yield


@contextmanager
def set_up_turn(
    path: StorePath, *, timeout_seconds: float = SET_UP_SECONDS, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Wait until no other process has its turn at the store at `path`, which need not be there yet.

    What is locked is an empty file `.<store>.setup` beside it, which stays: it cannot be removed while others wait for it.

    Args:
        on_wait: called once if there is somebody to wait for.

    Raises:
        StoreBusy: another process, or another block of this one, has had its turn for `timeout_seconds`.
    """
    if isinstance(path, ObjectPath):
        yield
        return
    path = local(path)
    make_folders(path.parent)
    with _lock_file(path.with_name(f".{path.name}.setup")) as lock:
        _wait_for(lock, path, timeout_seconds, on_wait)
        yield


def _wait_for(lock: int, path: Path, timeout_seconds: float, on_wait: Callable[[], None]) -> None:
    deadline, told = time.monotonic() + timeout_seconds, False
    while not _locked(lock, fcntl.LOCK_EX):
        if not told:
            on_wait()
            told = True
        if time.monotonic() > deadline:
            raise StoreBusy(
                f"another process has been setting up {path} for {timeout_seconds:.0f} s. Look whether it still makes progress, "
                "stop it if not, and run the command again."
            )
        time.sleep(_LOOK_AGAIN_SECONDS)


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield lock
    finally:
        os.close(lock)


def _locked(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held_by_one(path: StorePath) -> str:
    return (
        f"another process is extracting into {path}. Wait for it and run the command again, which then does what is "
        "left, or stop it first."
    )


def _shared_by_others(path: StorePath) -> str:
    return (
        f"processes with --part are extracting into {path}, and this command needs it alone. Wait for all of them, or join "
        "them with a --part of your own."
    )
