"""What lies on the disk below a dataset's root: each folder is listed once, no video is asked for by itself."""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from vcache.extract.datasets.base import VIDEO_SUFFIXES

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Folder:
    """One folder as it was found; links count as what they lead to."""

    identity: tuple[int, int]
    """Device and inode: the same for every name of one folder."""
    files: frozenset[str]
    folders: frozenset[str]
    broken_links: frozenset[str] = frozenset()
    """Links that lead nowhere, as to files of git-annex that were not fetched: no files, and not nothing."""

    @cached_property
    def videos(self) -> dict[str, str]:
        """Stem -> file name of the visible videos; of two with the same stem, the first in the alphabet."""
        named = sorted((name for name in self.files if is_video_name(name)), reverse=True)
        return {name.rpartition(".")[0]: name for name in named}


class Disk:
    """The folders below a root, listed when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, Folder | None] = {}

    def folder(self, path: str) -> Folder | None:
        """The folder at `path`, relative to the root ("" is the root itself), or None where there is none."""
        if path not in self._folders:
            self._folders[path] = _list(self.root / path)
        return self._folders[path]

    def find(self, stem: str, folders: Iterable[str]) -> str | None:
        """The first `<folder>/<stem>` with the suffix of a video, relative to the root."""
        for path in folders:
            folder = self.folder(path)
            if folder is not None and stem in folder.videos:
                return join(path, folder.videos[stem])
        return None


def join(folder: str, name: str) -> str:
    """`folder/name`; the folder "" is the root."""
    return f"{folder}/{name}" if folder else name


def is_video_name(name: str) -> bool:
    """Visible, and with the suffix of a video in any case."""
    return not name.startswith(".") and name[name.rfind(".") :].lower() in VIDEO_SUFFIXES


def without_suffix(name: str) -> str:
    """The name or path without the suffix of a video, if it has one: a dot within a name is no suffix."""
    return name[: name.rindex(".")] if is_video_name(PurePosixPath(name).name) else name


def _list(path: Path) -> Folder | None:
    files, folders, broken_links = [], [], []
    try:
        status = path.stat()
        with os.scandir(path) as entries:
            for entry in entries:  # the kind comes with the entry: no further call, but for links
                if entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_symlink():
                    broken_links.append(entry.name)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    return Folder((status.st_dev, status.st_ino), frozenset(files), frozenset(folders), frozenset(broken_links))
