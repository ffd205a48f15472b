"""`vcache rm`: what a store, a run or a sweep is, what it takes, who uses it, and its removal (trees.py)."""

import difflib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcache.pipelines.console import count
from vcache.pipelines.upkeep.bucket_trees import ObjectTree, list_objects, remove_objects
from vcache.pipelines.upkeep.found_runs import SWEEP_FILE, FoundRun, FoundRuns, find_runs, run_at
from vcache.pipelines.upkeep.recognising import is_store, manifest_told
from vcache.pipelines.upkeep.register import RUN_CONFIG, notes_beside
from vcache.pipelines.upkeep.trees import RemovalError, Tree, check_not_mounted, is_held, list_tree, remove_tree
from vcache.store.layout import METADATA
from vcache.store.locks import WRITER_LOCK, set_up_turn, sole_writer
from vcache.store.object_path import ObjectPath, StorePath

FIRST_FILE = {"store": METADATA, "run": RUN_CONFIG, "sweep": SWEEP_FILE}
"""Without which nothing opens one."""
_OF_A_RUN = re.compile(
    r"config\.json|classes\.txt|(metrics|steps)\.jsonl|tensorboard|checkpoint|predictions|explain|timelines|report\.html|cka\..+"
    r"|.+\.safetensors|.+\.part|\..+\.tmp"
)
_OF_A_SWEEP = re.compile(
    r"(sweep|failures)\.json|(results|summary)\.csv|results\.md|few-shot\..+|report\.html|.+\.part|\..+\.tmp"
)
_OF_A_STORE = re.compile(r"zarr\.json|_commit|constants|\..+\.tmp")
"""Names that vcache gives; whatever else lies in a folder is a person's own."""


@dataclass(frozen=True, kw_only=True)
class Doomed:
    """What a person asked to remove, before anything is done."""

    path: StorePath
    kind: str
    """ "store", "run" or "sweep"."""
    tree: Tree | ObjectTree
    beside: tuple[Tree, ...] = ()
    """What goes with it: the failures of a store, the notes beside it."""
    used_by: tuple[FoundRun, ...] = ()
    """Runs that refer to a store, and are not removed with it."""
    others: tuple[str, ...] = ()
    """What lies in it, by its path below, that vcache did not write there."""

    @property
    def size_bytes(self) -> int:
        return self.tree.size_bytes + sum(tree.size_bytes for tree in self.beside)

    @property
    def num_files(self) -> int:
        return len(self.tree.files) + sum(len(tree.files) for tree in self.beside)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "size_bytes": self.size_bytes,
            "files": self.num_files,
            "used_by": [str(run.path) for run in self.used_by],
            "also": [str(tree.path) for tree in self.beside],
            "others": list(self.others),
        }


def examine(paths: Sequence[StorePath], found: FoundRuns) -> tuple[Doomed, ...]:
    """What is at these paths, runs before the stores that they refer to.

    Raises:
        RemovalError: one of them is no store or run of ours, or holds what is not its own.
    """
    named = list(dict.fromkeys(map(_absolute, paths)))
    # What lies in a folder that goes, goes with it.
    whole = [path for path in named if not any(other in path.parents for other in named)]
    doomed = [_examine(path, found) for path in whole]
    gone = {item.path for item in doomed}
    kept = [
        Doomed(**{**vars(item), "used_by": tuple(run for run in item.used_by if not _goes(run.path, gone))})
        for item in doomed
    ]
    return tuple(sorted(kept, key=lambda item: item.kind == "store"))


def _absolute(path: StorePath) -> StorePath:
    """Without following a link at its end, which would be another folder than the one that was named.

    Links on the way are: `link/../a.zarr` lies beside what the link points to, and two ways to one store are one.
    """
    if isinstance(path, ObjectPath):
        return path
    path = Path.cwd() / Path(str(path))
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _goes(run: Path, gone: set[StorePath]) -> bool:
    resolved = {path.resolve() for path in gone}
    return any(path in resolved for path in (run, *run.parents))


def _examine(path: StorePath, found: FoundRuns) -> Doomed:
    if isinstance(path, ObjectPath):
        tree, manifest = list_objects(path), manifest_told(path)
        used_by = _used_by(path, manifest, found)
        return Doomed(path=path, kind="store", tree=tree, used_by=used_by)
    assert isinstance(path, Path)
    _check_there(path)
    if (manifest := manifest_told(path)) is not None:
        return _examine_store(path, manifest, found)
    if (run := run_at(path)) is not None:
        return _examine_run(path, run)
    raise RemovalError(
        f"{path} is neither a store nor a run of vcache, so it is left alone: it has no {METADATA} of a store, no {RUN_CONFIG} "
        f"of a run and no {SWEEP_FILE} of a sweep. What vcache knows is listed by:  vcache ls   and   vcache ls --runs"
    )


def _check_there(path: Path) -> None:
    if path.is_symlink():
        raise RemovalError(
            f"{path} is a symbolic link, and links are not followed. Name what it points to:  {path.resolve()}"
        )
    if not path.is_dir():
        what = "is a file, not a store or a run" if path.exists() else "is not there"
        names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        raise RemovalError(f"{path} {what}." + (f" There is {path.with_name(near[0])}." if near else ""))


def _examine_store(path: Path, manifest: dict[str, Any], found: FoundRuns) -> Doomed:
    tree = _listed(path)
    _check_nothing_else(tree, stores={path}, runs=set())
    beside = (path.with_name(f"{path.name}.failures.jsonl"), notes_beside(path))
    there = tuple(list_tree(other) for other in beside if other.exists() and not other.is_symlink())
    splits = manifest.get("splits")
    parts = {str(part[0]) for part in splits if part} if isinstance(splits, list) else set()
    groups = {Path(name).parts[0] for name in tree.files if re.fullmatch(r"[^/]+/zarr\.json", name)}
    others = _others(tree.files, _OF_A_STORE, parts | groups)
    used_by = _used_by(path, manifest, found)
    return Doomed(path=path, kind="store", tree=tree, beside=there, used_by=used_by, others=others)


def _listed(path: Path) -> Tree:
    check_not_mounted(path)
    try:
        return list_tree(path)
    except FileNotFoundError as error:
        raise RemovalError(f"{path} is left alone: it is being changed now. {error.filename} has just gone.") from error


def others_in_run(names: Iterable[str]) -> tuple[str, ...]:
    """Of the paths below a run's folder, the first parts that vcache does not give."""
    return _others(names, _OF_A_RUN)


def _others(names: Iterable[str], ours: re.Pattern[str], also: Iterable[str] = ()) -> tuple[str, ...]:
    """Of paths below a folder the first parts that are neither `ours` nor among `also`."""
    return tuple(sorted(name for name in {Path(name).parts[0] for name in names} - {*also} if not ours.fullmatch(name)))


def _used_by(path: StorePath, manifest: dict[str, Any] | None, found: FoundRuns) -> tuple[FoundRun, ...]:
    told = manifest or {}
    return tuple(found.referring_to(path, told.get("key"), told.get("dataset")))


def _examine_run(path: Path, run: FoundRun) -> Doomed:
    tree = _listed(path)
    members = {path} if run.kind == "run" else {path, *(sub for sub in path.iterdir() if run_at(sub) is not None)}
    _check_nothing_else(tree, stores=set(), runs=members)
    if run.kind == "run":
        return Doomed(path=path, kind=run.kind, tree=tree, others=others_in_run(tree.files))
    names = {member.name for member in members - {path}}
    others = [*_others(tree.files, _OF_A_SWEEP, names)]
    for name in sorted(names):
        below = [str(Path(file).relative_to(name)) for file in tree.files if Path(file).parts[0] == name]
        others += [f"{name}/{other}" for other in others_in_run(below)]
    return Doomed(path=path, kind=run.kind, tree=tree, others=tuple(others))


def _check_nothing_else(tree: Tree, *, stores: set[Path], runs: set[Path]) -> None:
    """A store with a run in its folder, or a run with a store: each is to be named itself."""
    for name in tree.files:
        file = tree.path / name
        if file.name == METADATA and file.parent not in stores and is_store(file.parent):
            raise RemovalError(f"{tree.path} holds a store, {file.parent}. Move it out first, or remove it first.")
        if file.name == RUN_CONFIG and file.parent not in runs and run_at(file.parent) is not None:
            raise RemovalError(f"{tree.path} holds a run, {file.parent}. Move it out first, or remove it first.")


def check_allowed(doomed: Iterable[Doomed], *, force: bool) -> None:
    """
    Raises:
        RemovalError: a run refers to one of the stores, or there is something in one of them that vcache did not write, and
            `force` is not given; or a process trains from it or trains it now.
    """
    for item in doomed:
        if item.others and not force:
            raise RemovalError(
                f"{item.path} is not removed: {', '.join(item.others)} in it {'was' if len(item.others) == 1 else 'were'} not "
                "written by vcache. Move it out first; or remove it all the same with --force."
            )
        if item.used_by and not force:
            raise RemovalError(_refusal(item))
        for file in _locks_of(item):
            if is_held(file):
                raise _trained(item, file)


def _trained(item: Doomed, file: Path) -> RemovalError:
    return RemovalError(
        f"{item.path} is not removed: a process trains {file.parent} now. Wait for it, or stop it first."
    )


def _refusal(item: Doomed) -> str:
    runs = "\n".join(f"  {told_run(run)}" for run in item.used_by)
    uses = "refers to it and is" if len(item.used_by) == 1 else "refer to it and are"
    return (
        f"{item.path} is not removed: {count(len(item.used_by), 'run')} {uses} evaluated on it.\n{runs}\n"
        "Remove these first, or in the same command; or remove it all the same with --force."
    )


def told_run(run: FoundRun) -> str:
    """A run in a line."""
    where = f", on {run.host}, which is not to be seen from here" if run.host else ""
    return f"{run.path}  ({run.head}, {run.kind if run.kind == 'sweep' else run.status}{where})"


def _locks_of(item: Doomed) -> list[Path]:
    """Files that a process holds while it trains what goes, or from what goes."""
    if item.kind == "store":
        return [file for run in item.used_by for file in _lock_files(run.path)]
    assert isinstance(item.tree, Tree)
    return [item.tree.path / name for name in item.tree.files if Path(name).name in (RUN_CONFIG, SWEEP_FILE)]


def _lock_files(run: Path) -> list[Path]:
    return [run / name for name in (RUN_CONFIG, SWEEP_FILE) if (run / name).is_file()]


def remove(item: Doomed, *, force: bool) -> None:
    """Remove it and what goes with it.

    Raises:
        RemovalError, StoreBusy: it is written or trained now, it was changed since it was examined; then all of it is there.
        OSError: a file cannot be removed; what is left is collected by `vcache gc`.
    """
    check_allowed([item], force=force)
    if isinstance(item.tree, ObjectTree):
        remove_objects(item.tree, METADATA)
        return
    with _alone(item):
        remove_tree(item.tree, first=FIRST_FILE[item.kind], check=lambda: _check_again(item, force=force))
    for tree in item.beside:
        with suppress(FileNotFoundError):
            remove_tree(tree)


def _check_again(item: Doomed, *, force: bool) -> None:
    """A training may have begun on the store since it was examined; from now on none can."""
    if item.kind == "store" and isinstance(item.path, Path):
        now = find_runs([], [item.path]).referring_to(item.path, None, None)
        check_allowed([Doomed(**{**vars(item), "used_by": (*now, *item.used_by)})], force=force)


@contextmanager
def _alone(item: Doomed) -> Iterator[None]:
    """Keep writers of the store, or trainings of the runs, out until it is gone."""
    assert isinstance(item.tree, Tree)
    with ExitStack() as stack:
        if item.kind == "store":
            stack.enter_context(set_up_turn(item.tree.path, timeout_seconds=1.0))
            if (item.tree.path / WRITER_LOCK).exists():
                stack.enter_context(sole_writer(item.tree.path))
        else:
            for file in _locks_of(item):
                lock = os.open(file, os.O_RDWR)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _trained(item, file) from None
                except OSError:
                    pass  # a file system without locks
        yield
