"""Runs and sweeps, found by their notes and by looking into folders, and which of them refer to a store."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from vcache.pipelines.upkeep.register import RUN_CONFIG, Note, is_file, notes_beside, read_notes, register_folder
from vcache.store.layout import METADATA
from vcache.store.object_path import StorePath, store_path

SWEEP_FILE = "sweep.json"
"""As in training/sweep.py, which loads torch."""
MOST_FOLDERS = 20_000
"""That are looked into below one folder."""
_DEPTH = 6
_Key = TypeVar("_Key")


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A run, or a sweep with members that are still to be trained."""

    path: Path
    kind: str
    """ "run", or "sweep"."""
    status: str
    """ "complete", "unfinished", or "unseen": on another machine, or on a disk that is not mounted."""
    head: str
    dataset: str | None
    stores: tuple[str, ...]
    """That it was trained on; none of an imported head."""
    store_key: str | None
    host: str | None = None
    """Of an unseen one."""

    @cached_property
    def has_store(self) -> bool:
        """Whether there is a store where it was trained; of one in a bucket nobody asks."""
        return any("://" in store or is_file(Path(store) / METADATA) for store in self.stores)


@dataclass(frozen=True, kw_only=True)
class FoundRuns:
    """What was found, and where it was looked for."""

    runs: tuple[FoundRun, ...]
    """By their paths."""
    missing: tuple[Note, ...]
    """Notes of runs that were deleted, or moved to where nobody looked."""
    cut_short: tuple[Path, ...]
    """Folders with more folders in them than were looked into."""

    def referring_to(self, store: StorePath, key: str | None, dataset: str | None) -> dict[FoundRun, str]:
        """Those that refer to the store, by path.

        Each with the way: "path" if it was trained on what lies there, "key" if its own store is gone and this has the same
        features.
        """
        ways = dict.fromkeys(self._by_store.get(str(store.resolve()), ()), "path")
        if key is not None:
            ways |= {
                run: "key" for run in self._by_key.get((key, dataset), ()) if not run.has_store and run not in ways
            }
        return {run: ways[run] for run in sorted(ways, key=lambda run: run.path)}

    @cached_property
    def _by_store(self) -> dict[str, list[FoundRun]]:
        return _grouped((store, run) for run in self.runs for store in run.stores)

    @cached_property
    def _by_key(self) -> dict[tuple[str | None, str | None], list[FoundRun]]:
        return _grouped(((run.store_key, run.dataset), run) for run in self.runs)


def _grouped(pairs: Iterable[tuple[_Key, FoundRun]]) -> dict[_Key, list[FoundRun]]:
    groups: dict[_Key, list[FoundRun]] = {}
    for key, run in pairs:
        groups.setdefault(key, []).append(run)
    return groups


def find_runs(folders: Iterable[Path], stores: Iterable[StorePath] = (), *, of_user: bool = True) -> FoundRuns:
    """Those that are noted, beside `stores` and `of_user`, those beside them, and those below `folders`."""
    beside = [notes_beside(store) for store in stores if isinstance(store, Path)]
    notes = list(read_notes([*([register_folder()] if of_user else []), *beside]).values())
    found: dict[Path, FoundRun] = {}
    looked: set[Path] = set()
    cut_short = [folder for folder in folders if not _look_below(folder, found, looked, MOST_FOLDERS)]
    for parent in sorted({Path(note.run).parent for note in notes}):
        if parent not in looked:
            _look_into([parent, *_folders_in(parent)], found)
        _look_into([parent, parent.parent], found)  # a sweep's folder is above its runs
    missing = []
    for note in notes:
        path = Path(note.run)
        if path not in found:
            _look_into([path], found)
        if path not in found:
            if note.is_gone:
                missing.append(note)
            else:
                found[path] = _unseen(note)
    return FoundRuns(
        runs=tuple(found[path] for path in sorted(found)), missing=tuple(missing), cut_short=tuple(cut_short)
    )


def run_at(path: Path) -> FoundRun | None:
    """The run or sweep in this folder; None if it is neither."""
    try:
        if (path / RUN_CONFIG).is_file():
            return _run(path, json.loads((path / RUN_CONFIG).read_bytes()))
        if (path / SWEEP_FILE).is_file():
            return _sweep(path, json.loads((path / SWEEP_FILE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _run(path: Path, config: dict[str, Any]) -> FoundRun | None:
    if not isinstance(config.get("head"), str) or not {"head_config", "store", "store_key"} <= config.keys():
        return None
    if not all(isinstance(config.get(name), str | None) for name in ("dataset", "store", "store_key")):
        return None
    return FoundRun(
        path=path,
        kind="run",
        status="complete" if (path / "head.safetensors").is_file() else "unfinished",
        head=config["head"],
        dataset=config.get("dataset"),
        stores=() if config["store"] is None else (config["store"],),
        store_key=config["store_key"],
    )


def _sweep(path: Path, plan: dict[str, Any]) -> FoundRun:
    members = plan["members"]
    left = [member for member in members if not (path / member["folder"] / "head.safetensors").is_file()]
    return FoundRun(
        path=path,
        kind="sweep",
        status="unfinished" if left else "complete",
        head=", ".join(sorted({member["config"]["head"] for member in members})),
        dataset=None,
        stores=tuple(sorted({str(store_path(member["config"]["store"]).resolve()) for member in left})),
        store_key=None,
    )


def _unseen(note: Note) -> FoundRun:
    return FoundRun(
        path=Path(note.run),
        kind="run",
        status="unseen",
        head=note.head,
        dataset=note.dataset,
        stores=() if note.store is None else (note.store,),
        store_key=note.store_key,
        host=note.host,
    )


def _look_below(folder: Path, found: dict[Path, FoundRun], looked: set[Path], most: int) -> bool:
    """False if there is more below than was looked into."""
    top, whole = folder.resolve(), True
    for current, names, _ in os.walk(top):
        path = Path(current)
        if len(looked) >= most:
            return False
        looked.add(path)
        _look_into([path], found)
        is_run = path in found and found[path].kind == "run"
        names[:] = [] if is_run else [name for name in names if _may_hold_runs(path / name)]
        if names and len(path.relative_to(top).parts) >= _DEPTH:
            names[:], whole = [], False
    return whole


def _may_hold_runs(folder: Path) -> bool:
    return not folder.name.startswith(".") and folder.suffix != ".zarr" and not folder.is_symlink()


def _look_into(paths: Sequence[Path], found: dict[Path, FoundRun]) -> None:
    found.update({path: run for path in paths if path not in found and (run := run_at(path)) is not None})


def _folders_in(folder: Path) -> Iterator[Path]:
    try:
        yield from (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink())
    except OSError:
        return
