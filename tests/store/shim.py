"""A shim between the store and the kernel: the n-th call that changes the disk fails, is done by half, or is the last.

It stands in front of the functions of `os`, `fcntl` and `io.open`, through which the store, pathlib and zarr-python go.
Nothing is really synced, which makes sweeps over all calls fast; power_cut.py knows what a sync would have saved.
"""

import errno
import fcntl
import io
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

FAULTS = ("EIO", "disk full", "disk gone", "short write", "death", "death in a write")
_WRITES = ("write", "writev")
_NEEDS_SPACE = (*_WRITES, "create", "mkdir", "rename", "replace", "link")


class Died(BaseException):
    """The process is killed at this call; the shim drops whatever clean-up code still tries to do."""


class Shim:
    """Lets the `fail_at`-th call (from 0) meet a fault of FAULTS; without one it only counts.

    EIO               this call fails, the next one works
    disk full         this call and all later ones that need space fail with ENOSPC; removing still works
    disk gone         this call and all later ones that change anything fail with EROFS
    short write       this write moves half of its bytes, the next one fails with ENOSPC; any other call fails
    death             the process dies before this call
    death in a write  the process dies when half of the bytes are written
    """

    def __init__(self, fail_at: int | None = None, fault: str = "EIO") -> None:
        assert fault in FAULTS
        self.fail_at, self.fault = fail_at, fault
        self.calls: list[str] = []
        self.before_call: Callable[[str], None] = lambda name: None
        self.after_sync: Callable[[int], None] = lambda fd: None
        self._fail_next_write = False
        self._lock = threading.Lock()  # the syncs of a commit come from several threads

    @property
    def fired(self) -> bool:
        return self.fail_at is not None and len(self.calls) > self.fail_at

    @property
    def dead(self) -> bool:
        return self.fired and self.fault.startswith("death")

    def __enter__(self) -> "Shim":
        self._patches = ExitStack()
        self._open_file, self._write = io.open, os.write
        for name in (*_WRITES, "mkdir", "rename", "replace", "link", "unlink", "rmdir"):
            self._patch(os, name, self._wrapped(name, getattr(os, name)))
        self._patch(os, "fsync", self._wrapped("fsync", self.after_sync_of))
        self._patch(os, "open", self._wrapped_open(os.open))
        self._patch(fcntl, "flock", self._wrapped("flock", fcntl.flock))
        self._patch(io, "open", self._file)
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def after_sync_of(self, fd: int) -> None:
        """What takes the place of the real fsync."""
        self.after_sync(fd)

    def _patch(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self._patches.enter_context(mock.patch.object(module, name, function))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call(name, lambda: real(*args, **kwargs), args)

    def _wrapped_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            name = "create" if flags & os.O_CREAT else "open"
            if self.dead and name == "open":
                return real(path, flags, *args, **kwargs)
            return self._call(name, lambda: real(path, flags, *args, **kwargs), (path,))

        return opened

    def _file(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """io.open; a binary file opened for writing goes through os.open and os.write as everything else does."""
        if mode != "wb":
            return self._open_file(path, mode, *args, **kwargs)
        return io.BufferedWriter(_RawFile(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)))

    def _call(self, name: str, real: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if self.dead:
            return self._dropped(name, args)
        self.before_call(name)
        with self._lock:
            number = len(self.calls)
            self.calls.append(name)
        if number == self.fail_at:
            return self._fail(name, real, args)
        if self._fail_next_write and name in _WRITES:
            self._fail_next_write = False
            raise OSError(errno.ENOSPC, "planted: the rest of a short write")
        if self.fired and self.fault == "disk full" and name in _NEEDS_SPACE:
            raise OSError(errno.ENOSPC, "planted: still full")
        if self.fired and self.fault == "disk gone" and name not in ("open", "flock"):
            raise OSError(errno.EROFS, "planted: still gone")
        return real()

    def _fail(self, name: str, real: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if name in _WRITES and self.fault in ("short write", "death in a write"):
            data = b"".join(args[1]) if isinstance(args[1], list) else bytes(args[1])
            written = self._write(args[0], data[: max(1, len(data) // 2)])
            self._fail_next_write = True
            if self.dead:
                raise Died
            return written
        if self.dead:
            raise Died
        number = {"disk full": errno.ENOSPC, "disk gone": errno.EROFS}.get(self.fault, errno.EIO)
        raise OSError(number, f"planted: {name} fails")

    def _dropped(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "create":
            raise Died
        return len(args[1]) if name == "write" else sum(map(len, args[1])) if name == "writev" else None


class _RawFile(io.RawIOBase):
    """A file for writing, by os.write."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._fd, data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)


def wait_for_threads_of_zarr(before):
    """Those that were writing beside the one that failed."""
    deadline = time.monotonic() + 5
    while open_files() != before and time.monotonic() < deadline:
        time.sleep(0.01)


def open_files():
    return {file.name: file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
