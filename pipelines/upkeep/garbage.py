"""`vcache gc`: what nobody needs any more, each with its size and the reason, and its removal as it was listed.

    leftover    temporary files and folders of killed writers, half-removed stores and runs: nobody holds their lock
    checkpoint  of a run that is complete, or the older ones of one that is not
    import      half-imported heads
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
from vcache.pipelines.upkeep.register import RUN_CONFIG, notes_beside, read_notes, register_folder
from vcache.pipelines.upkeep.removal import Doomed, examine, remove
from vcache.pipelines.upkeep.trees import RemovalError, Tree, is_held, list_tree, remove_tree
from vcache.store.errors import StoreError
from vcache.store.files import is_temporary

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
    whole = [item for item in going if not any(other.path in item.path.parents for other in going)]
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
    if item.kind != "note" and is_held(item.path):
        raise RemovalError(f"{item.path} is not removed: a process writes it now.")
    remove_tree(item.tree)


def _of_runs(runs: Iterable[FoundRun]) -> Iterator[Garbage]:
    for run in runs:
        if run.kind != "run" or run.status == "unseen" or is_held(run.path / RUN_CONFIG):
            continue
        checkpoint = run.path / "checkpoint"
        if run.status == "complete" and checkpoint.is_dir() and not checkpoint.is_symlink():
            yield Garbage(kind="checkpoint", reason="of a run that is complete", tree=list_tree(checkpoint))
        for part in [*run.path.glob("*.part"), *checkpoint.glob("*.part")]:
            yield Garbage(kind="leftover", reason="of a training that was killed", tree=list_tree(part))


def _below(folders: Iterable[Path], found: FoundRuns) -> Iterator[Garbage]:
    yield from _gone_notes(register_folder())
    for top in folders:
        for folder, names, files in os.walk(top):
            path = Path(folder)
            for name in [*names, *files]:
                if (item := _judged(path / name, found)) is not None:
                    yield item
            # Shards are not looked through one by one: leftovers lie beside the folders "c" of finished ones.
            names[:] = [name for name in names if name != "c" and not is_temporary(name)]


def _judged(path: Path, found: FoundRuns) -> Garbage | None:
    if path.is_symlink():
        return None
    if is_temporary(path.name):
        held = is_held(path)
        return None if held else Garbage(kind="leftover", reason=_left_by(path), tree=list_tree(path))
    if (match := _IMPORT.fullmatch(path.name)) and path.is_dir():
        reason = "of an import that was killed"
        return None if _lives(int(match[1])) else Garbage(kind="import", reason=reason, tree=list_tree(path))
    if (match := _NOTES.fullmatch(path.name)) and path.is_dir():
        return _notes_of(path, match[1])
    return _unused(path, found) if path.suffix == ".zarr" and path.is_dir() else None


def _left_by(path: Path) -> str:
    if path.is_dir():
        return "of a removal, or of a creation, that was killed"
    return "of a writer that was killed"


def _lives(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def _notes_of(folder: Path, store: str) -> Garbage | None:
    """Beside a store that is gone; of runs that are gone. Nothing but notes goes."""
    notes = read_notes([folder])
    gone = not (folder.with_name(store)).exists() and len(notes) == len(list(folder.iterdir()))
    return Garbage(kind="note", reason=f"{store} is gone", tree=list_tree(folder)) if gone else None


def _gone_notes(folder: Path) -> Iterator[Garbage]:
    for file, note in read_notes([folder]).items():
        if note.is_gone:
            yield Garbage(kind="note", reason=f"{note.run} is gone, or was moved", tree=list_tree(file))


def _unused(path: Path, found: FoundRuns) -> Garbage | None:
    if not is_store(path):
        return None
    try:
        (doomed,) = examine([path], found)
        if notes_beside(path).is_dir():
            (doomed,) = (doomed,) if doomed.used_by else examine([path], find_runs([], [path]))
    except (RemovalError, StoreError):
        return None  # it holds what is not its own
    if doomed.used_by or is_held(path / "_commit" / "writer.lock"):
        return None
    assert isinstance(doomed.tree, Tree)
    return Garbage(kind="store", reason="no run refers to it", tree=doomed.tree, store=doomed)
