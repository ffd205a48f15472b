"""What a disk holds after a power cut: a model that keeps only what was synced, or any part of the rest.

POSIX promises the content of a file after its fsync and the names in a folder after the fsync of that folder, and
nothing else: an unsynced name may be there or not, unsynced content may be old, empty, zeros or cut off.
"""

import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Choice = Callable[[int], str]
"""Inode of a file or folder -> "synced", "zeros", "half" or "all": what of it survives."""


@dataclass(frozen=True)
class _Node:
    """The content of a file, or the names in a folder and their inodes."""

    data: bytes | None
    names: dict[str, int]


class Disk:
    """Follows one folder tree, which it takes for synced at first; `after_sync` belongs behind each fsync."""

    def __init__(self, top: Path) -> None:
        self.top, self._synced, self._pins = top, dict[int, _Node](), dict[int, int]()
        self._root = top.stat().st_ino
        for path in [top, *top.rglob("*")]:
            fd = os.open(path, os.O_RDONLY)
            self.after_sync(fd)
            os.close(fd)

    def close(self) -> None:
        for fd in self._pins.values():
            os.close(fd)

    def after_sync(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}")
        inode = os.fstat(fd).st_ino
        if inode not in self._pins:  # held open, so that the number is not given to another file
            self._pins[inode] = os.open(path, os.O_RDONLY)
        self._synced[inode] = _look(path)

    def cut(self, target: Path, choice: Choice) -> None:
        """Make `target` the tree that is found after a power cut at this moment."""
        living = {path.lstat().st_ino: path for path in [self.top, *self.top.rglob("*")]}
        self._restore(self._root, target, living, choice)

    def _restore(self, inode: int, target: Path, living: dict[int, Path], choice: Choice) -> None:
        node = self._after_cut(inode, living.get(inode), choice(inode))
        if node is None:
            return
        if node.data is not None:
            target.write_bytes(node.data)
            return
        target.mkdir()
        for name, child in node.names.items():
            self._restore(child, target / name, living, choice)

    def _after_cut(self, inode: int, path: Path | None, survives: str) -> _Node | None:
        synced, now = self._synced.get(inode), _look(path) if path else None
        if now is None or survives == "synced":
            if synced is not None or now is None:
                return synced  # neither synced nor there: a name of something long gone
            return _Node(None, {}) if now.data is None else _Node(b"", {})
        if now.data is None or survives == "all" or now == synced:
            return now
        return _Node(bytes(len(now.data)) if survives == "zeros" else now.data[: len(now.data) // 2], {})


def _look(path: Path) -> _Node:
    if stat.S_ISDIR(path.stat().st_mode):
        with os.scandir(path) as entries:
            return _Node(None, {entry.name: entry.inode() for entry in entries})
    return _Node(path.read_bytes(), {})


def nothing_more(inode: int) -> str:
    return "synced"


def names_without_content(folders: set[int], content: str) -> Choice:
    """All names survive, and of the content what `content` says."""
    return lambda inode: "all" if inode in folders else content


def at_random(seed: int) -> Choice:
    """Each file and folder by a lot of its own, the same for one seed."""
    return lambda inode: random.Random(f"{seed} {inode}").choice(("synced", "zeros", "half", "all"))


def folders_of(top: Path) -> set[int]:
    return {path.stat().st_ino for path in [top, *top.rglob("*")] if path.is_dir()}


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
