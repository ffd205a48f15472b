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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vcache.pipelines.console import count
from vcache.pipelines.upkeep.mounts import mount_points
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
    """What is at the path now, which may be a file, a link or a folder.

    Raises:
        OSError: a folder in it cannot be listed, or a file went meanwhile.
    """
    files = {name: os.lstat(path / name) for name in _names(path)}
    times = [stat.st_mtime for stat in files.values()] or [os.lstat(path).st_mtime]
    return Tree(path=path, files={name: stat.st_size for name, stat in files.items()}, newest=max(times))


def check_not_mounted(path: Path) -> None:
    """
    Raises:
        RemovalError: a file system, or a folder that lies elsewhere, is mounted at the path or below it.
    """
    top = path.parent.resolve() / path.name
    if mounted := next((mount for mount in mount_points() if mount == top or top in mount.parents), None):
        raise RemovalError(f"{path} is left alone: something is mounted at {mounted}. Unmount it first.")


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
        RemovalError: files were added or have changed since, something is mounted in it, or it cannot be renamed; everything is
            where it was.
        OSError: a file cannot be removed.
    """
    check_not_mounted(tree.path)
    renamed = tree.path.is_dir() and not tree.path.is_symlink() and not is_temporary(tree.path.name)
    doomed = _renamed(tree.path) if renamed else tree.path
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(doomed))
            _check_unchanged(tree, doomed)
            check()
        except BaseException:
            if renamed:
                doomed.rename(tree.path)
            raise
        sync_folder(doomed.parent)
        _remove_listed(doomed, tree.files, first)
    sync_folder(doomed.parent)


def _renamed(path: Path) -> Path:
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.rename(doomed)
    except FileNotFoundError as error:
        raise RemovalError(f"{path} is not there any more.") from error
    except OSError as error:
        why = f"{path.parent} is not yours to write in" if isinstance(error, PermissionError) else error.strerror
        raise RemovalError(f"{path} cannot be removed, and is as it was: {why}.") from error
    return doomed


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """As its writer holds a temporary file or folder, so that no other process takes it for a leftover meanwhile."""
    if not is_temporary(path.name) or path.is_symlink():
        yield
        return
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RemovalError(f"{path} is not removed: a process writes it now.") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(lock)


def _check_unchanged(tree: Tree, now: Path) -> None:
    there = list_tree(now)
    changed = sorted(name for name, size in there.files.items() if tree.files.get(name) != size)
    if changed or (there.files and there.newest > tree.newest):
        what = f"{count(len(changed), 'file')} in it, as {changed[0]}," if any(changed) else "it"
        raise RemovalError(
            f"{tree.path} is not removed: {what} changed since it was listed. "
            "Look what writes there, and run the command again."
        )


def _remove_listed(folder: Path, files: dict[str, int], first: str) -> None:
    for name in sorted(files, key=lambda name: (name != first, name)):
        with suppress(FileNotFoundError):
            (folder / name).unlink()
        if name and name == first:
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
