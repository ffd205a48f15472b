"""`vcache gc`: what nobody needs any more, each with its size and the reason, and its removal as it was listed.

    leftover    temporary files and folders of killed writers, half-removed stores and runs: nobody holds their lock
    checkpoint  of a run that is complete
    import      half-imported heads: of a process of this machine that is gone, or not touched for a day
    note        of runs that are gone, and beside stores that are gone
    store       to which no run refers: only with `unused_stores`

What a person named is looked through, and every run that is noted; a bucket is not, as it tells neither locks nor leftovers.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcache.pipelines.upkeep.found_runs import FoundRun, FoundRuns, find_runs
from vcache.pipelines.upkeep.recognising import is_store
from vcache.pipelines.upkeep.register import RUN_CONFIG, read_notes, register_folder
from vcache.pipelines.upkeep.removal import Doomed, examine, others_in_run, remove
from vcache.pipelines.upkeep.trees import RemovalError, Tree, is_held, list_tree, remove_tree
from vcache.store.errors import StoreError
from vcache.store.files import is_temporary
from vcache.store.locks import WRITER_LOCK

_IMPORT = re.compile(r"\..+\.part-(\d+)")
_NOTES = re.compile(r"\.(.+)\.runs")
_SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Something that nobody needs."""

    kind: str
    reason: str
    tree: Tree
    store: Doomed | None = None
    """For a store: how it is removed."""
    lock: Path | None = None
    """Of what lies in a run: the file that is held while it is trained."""

    @property
    def path(self) -> Path:
        return self.tree.path

    @property
    def size_bytes(self) -> int:
        return self.store.size_bytes if self.store is not None else self.tree.size_bytes

    def to_json(self) -> dict[str, Any]:
        facts = {"path": str(self.path), "kind": self.kind, "reason": self.reason, "size_bytes": self.size_bytes}
        return {**facts, "files": len(self.tree.files), "newest": self.tree.newest}


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What was found to go, and what would go if it were asked for."""

    garbage: tuple[Garbage, ...]
    unused_stores: tuple[Garbage, ...]
    """Stores to which no run refers that were not asked for."""

    @property
    def size_bytes(self) -> int:
        return sum(item.size_bytes for item in self.garbage)


def find_garbage(
    folders: Iterable[Path], found: FoundRuns, *, unused_stores: bool = False, older_than_days: float = 0.0
) -> Collection:
    """Look through `folders` and the runs that are `found`; nothing is changed.

    Args:
        older_than_days: since the last change to any file of what goes. Of notes, nothing is asked.
    """
    latest = time.time() - older_than_days * _SECONDS_PER_DAY
    items = {item.path: item for item in (*_of_runs(found.runs), *_below(folders, found))}
    old = [item for item in items.values() if item.tree.newest <= latest or item.kind == "note"]
    stores = sorted((item for item in old if item.kind == "store"), key=lambda item: item.path)
    going = [item for item in old if item.kind != "store" or unused_stores]
    # What lies in something else that goes, goes with it.
    paths = {item.path for item in going}
    whole = [item for item in going if paths.isdisjoint(item.path.parents)]
    return Collection(
        garbage=tuple(sorted(whole, key=lambda item: (item.kind == "store", item.path))),
        unused_stores=() if unused_stores else tuple(stores),
    )


def collect(item: Garbage) -> None:
    """Remove it.

    Raises:
        RemovalError, StoreBusy: it is in use now, or was changed since it was listed; it is there as before.
        OSError: a file cannot be removed.
    """
    if item.store is not None:
        remove(item.store, force=False)
        return
    remove_tree(item.tree, check=lambda: _check_unheld(item))


def _check_unheld(item: Garbage) -> None:
    if item.lock is not None and is_held(item.lock):
        raise RemovalError(f"{item.path} is not removed: a process trains {item.lock.parent} now.")


def _of_runs(runs: Iterable[FoundRun]) -> Iterator[Garbage]:
    for run in runs:
        if run.kind == "run" and run.status != "unseen" and not is_held(run.path / RUN_CONFIG):
            yield from _of_run(run)


def _of_run(run: FoundRun) -> Iterator[Garbage]:
    lock, checkpoint = run.path / RUN_CONFIG, run.path / "checkpoint"
    left = {part: "of a training that was killed" for part in [*run.path.glob("*.part"), *checkpoint.glob("*.part")]}
    left |= {path: _left_by(path) for path in run.path.glob(".*.tmp") if is_temporary(path.name) and not is_held(path)}
    for path, reason in left.items():
        if (tree := _tree(path)) is not None:
            yield Garbage(kind="leftover", reason=reason, tree=tree, lock=lock)
    whole = run.status == "complete" and checkpoint.is_dir() and not checkpoint.is_symlink()
    if whole and (tree := _tree(checkpoint)) is not None:
        yield Garbage(kind="checkpoint", reason="of a run that is complete", tree=tree, lock=lock)


def _tree(path: Path) -> Tree | None:
    """None if it went while it was listed, or is not to be looked into."""
    try:
        return list_tree(path)
    except OSError:
        return None


def _below(folders: Iterable[Path], found: FoundRuns) -> Iterator[Garbage]:
    yield from _gone_notes(register_folder())
    stores: list[Path] = []
    for top in folders:
        for folder, names, files in os.walk(top):
            path = Path(folder)
            for name in [*names, *files]:
                if (item := _judged(path / name)) is not None:
                    yield item
            stores += [path / name for name in names if _may_be_unused(path / name)]
            # Shards are not looked through one by one: leftovers lie beside the folders "c" of finished ones.
            names[:] = [name for name in names if name != "c" and not is_temporary(name)]
    beside = find_runs([], stores, of_user=False)  # of all at once: each looks through the folders of its runs
    yield from (item for store in stores if (item := _unused(store, found, beside)) is not None)


def _judged(path: Path) -> Garbage | None:
    if path.is_symlink():
        return None
    if is_temporary(path.name):
        tree = None if is_held(path) else _tree(path)
        return None if tree is None else Garbage(kind="leftover", reason=_left_by(path), tree=tree)
    if (match := _IMPORT.fullmatch(path.name)) and path.is_dir():
        return None if _lives(int(match[1])) else _half_import(path)
    if (match := _NOTES.fullmatch(path.name)) and path.is_dir():
        return _notes_of(path, match[1])
    return None


def _left_by(path: Path) -> str:
    if path.is_dir():
        return "of a removal, or of a creation, that was killed"
    return "of a writer that was killed"


def _lives(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def _half_import(folder: Path) -> Garbage | None:
    """What has been touched of late may be of a process of another machine that shares the disk."""
    tree = _tree(folder)
    if tree is None or others_in_run(tree.files) or tree.newest > time.time() - _SECONDS_PER_DAY:
        return None
    return Garbage(kind="import", reason="of an import that was killed", tree=tree)


def _notes_of(folder: Path, store: str) -> Garbage | None:
    """Beside a store that is gone; of runs that are gone. Nothing but notes goes."""
    notes = read_notes([folder])
    gone = not os.path.lexists(folder.with_name(store)) and len(notes) == len(list(folder.iterdir()))
    tree = _tree(folder) if gone else None
    return None if tree is None else Garbage(kind="note", reason=f"{store} is gone", tree=tree)


def _gone_notes(folder: Path) -> Iterator[Garbage]:
    for file, note in read_notes([folder]).items():
        if note.is_gone:
            yield Garbage(kind="note", reason=f"{note.run} is gone, or was moved", tree=list_tree(file))


def _may_be_unused(path: Path) -> bool:
    named = path.suffix == ".zarr" and not is_temporary(path.name) and not path.is_symlink()
    return named and is_store(path) and not is_held(path / WRITER_LOCK)


def _unused(path: Path, found: FoundRuns, beside: FoundRuns) -> Garbage | None:
    try:
        (doomed,) = examine([path], found)
        if not doomed.used_by:
            (doomed,) = examine([path], beside)
    except (RemovalError, StoreError, OSError):
        return None  # it holds what is not its own, or is being changed
    if doomed.used_by or doomed.others:
        return None
    lost = {note.run for note in (*found.missing, *beside.missing) if note.store == str(path.resolve())}
    reason = "no run refers to it" + (f"; gone or moved: {', '.join(sorted(lost))}" if lost else "")
    assert isinstance(doomed.tree, Tree)
    return Garbage(kind="store", reason=reason, tree=doomed.tree, store=doomed)
