"""A file or folder that is to go: listed first, then renamed, then removed file by file as it was listed.

| listed | renamed to .NAME.<12 hex>.tmp | compared with the list | its first file removed | the others removed |

The new name is that of any temporary file (store/files.py), so a kill leaves what `vcache gc` and the next extraction into the
same place collect. The first file is the one without which nothing opens it. A file that came after the listing is never
removed: the folder gets its name back. Symbolic links are removed as links, and what they point to is left alone.
"""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vcache.pipelines.console import count
from vcache.store.files import is_temporary, sync_folder


class RemovalError(ValueError):
    """What is not removed, and why."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Everything at a path, when it was listed."""

    path: Path
    files: dict[str, int]
    """Bytes of each file by its path below; "" is `path` itself. Links to folders are files here."""
    newest: float
    """Seconds since the epoch of the last change to a file, or of the folder if there is none."""

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


def list_tree(path: Path) -> Tree:
    """What is at the path now, which may be a file, a link or a folder."""
    files = {name: os.lstat(path / name) for name in _names(path)}
    times = [stat.st_mtime for stat in files.values()] or [os.lstat(path).st_mtime]
    return Tree(path=path, files={name: stat.st_size for name, stat in files.items()}, newest=max(times))


def _names(path: Path) -> Iterator[str]:
    if path.is_symlink() or not path.is_dir():
        yield ""
        return
    for folder, subfolders, names in os.walk(path, onerror=_refuse):
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        yield from (str(Path(folder, name).relative_to(path)) for name in [*names, *links])


def _refuse(error: OSError) -> None:
    raise error


def remove_tree(tree: Tree, *, first: str = "", check: Callable[[], None] = lambda: None) -> None:
    """Remove what was listed and nothing else.

    Args:
        first: the file that goes before all others.
        check: called once nobody finds the path any more; what it raises puts it back.

    Raises:
        RemovalError: files were added or have grown since; everything is where it was.
        OSError: it cannot be renamed, or a file cannot be removed.
    """
    if tree.path.is_symlink() or not tree.path.is_dir():
        tree.path.unlink()
        return
    doomed = tree.path if is_temporary(tree.path.name) else _renamed(tree.path)
    with _locked(doomed):
        try:
            _check_unchanged(tree, doomed)
            check()
        except BaseException:
            doomed.rename(tree.path)
            raise
        sync_folder(doomed.parent)
        _remove_listed(doomed, tree.files, first)
    sync_folder(doomed.parent)


def _renamed(path: Path) -> Path:
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.rename(doomed)
    except PermissionError as error:
        raise RemovalError(f"{path} cannot be removed: {path.parent} is not yours to write in.") from error
    return doomed


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """As its writer holds a temporary folder, so that no other process takes it for a leftover meanwhile."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _check_unchanged(tree: Tree, now: Path) -> None:
    there = list_tree(now).files
    if changed := sorted(name for name, size in there.items() if tree.files.get(name) != size):
        raise RemovalError(
            f"{tree.path} is not removed: {count(len(changed), 'file')} in it, as {changed[0]}, changed since it was listed. "
            "Look what writes there, and run the command again."
        )


def _remove_listed(folder: Path, files: dict[str, int], first: str) -> None:
    for name in sorted(files, key=lambda name: (name != first, name)):
        with suppress(FileNotFoundError):
            (folder / name).unlink()
        if name == first:
            sync_folder((folder / name).parent)
    for path, _, _ in os.walk(folder, topdown=False):
        Path(path).rmdir()


def is_held(path: Path) -> bool:
    """Whether a living process holds the file or folder by a lock, as writers do with what they write."""
    try:
        lock = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # another user's: not known, so left alone
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False
