"""`vcache gc` on folders of all kinds: it removes what it lists, and never what a run refers to or what is not vcache's."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vcache.pipelines.upkeep.found_runs import find_runs
from vcache.pipelines.upkeep.garbage import collect, find_garbage
from vcache.pipelines.upkeep.register import note_run, register_folder
from vcache.pipelines.upkeep.removal import check_allowed, examine, remove
from vcache.pipelines.upkeep.trees import RemovalError

Make = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes]]

STATELESS = [HealthCheck.function_scoped_fixture]  # they are functions

run_plans = st.fixed_dictionaries(
    {
        "store": st.one_of(st.none(), st.integers(0, 3)),
        "complete": st.booleans(),
        "checkpoint": st.booleans(),
        "part": st.booleans(),
        "noted": st.booleans(),
        "inside": st.booleans(),
    }
)
store_plans = st.fixed_dictionaries(
    {"leftover": st.booleans(), "mine": st.booleans(), "key": st.sampled_from(["a", "b"])}
)
worlds = st.tuples(st.lists(store_plans, max_size=4), st.lists(run_plans, max_size=4), st.booleans())


class World:
    """Stores, runs, leftovers and a person's own files; what is used and what is nobody's is known from the plan alone."""

    def __init__(self, top: Path, plan: tuple[list[Any], list[Any], bool], store_at: Make, run_at: Make) -> None:
        self.top, self.stores, self.runs = top, list[Path](), list[Path]()
        self.keep: set[str] = set()
        """Files that no gc and no rm without --force may remove."""
        stores, runs, stray = plan
        for number, facts in enumerate(stores):
            self.stores.append(store_at(top / "stores" / f"{number}.zarr", key=facts["key"] * 16))
            self._leave(self.stores[-1] / "train" / ".0.0123456789ab.tmp", facts["leftover"])
        for number, facts in enumerate(runs):
            self._add_run(number, facts, run_at)
        for number, facts in enumerate(stores):
            self._mine(top / "stores" / f"{number}.zarr.txt", facts["mine"])
        self._leave(top / "stores" / ".9.zarr.0123456789ab.tmp" / "train" / "c" / "0", stray)
        self._mine(top / "stores" / "c" / ".tmp", stray)
        self._mine(top / "stores" / "other.zarr" / "zarr.json", stray)

    def _add_run(self, number: int, facts: dict[str, Any], run_at: Make) -> None:
        store = facts["store"] if facts["store"] is None else self.top / "stores" / f"{facts['store']}.zarr"
        parent = self.top / ("stores" if facts["inside"] or not facts["noted"] else "runs")
        run = run_at(parent / f"run-{number}", store, complete=facts["complete"])
        self.runs.append(run)
        self._files_kept(run)
        if store is not None and store.exists():
            self._files_kept(store, but=".0.0123456789ab.tmp")
        if facts["checkpoint"]:
            (run / "checkpoint").mkdir()
            (run / "checkpoint" / "00000002.json").write_text("{}")
            if not facts["complete"]:
                self._files_kept(run)
        self._leave(run / "config.json.part", facts["part"])
        if facts["noted"]:
            note_run(run, json.loads((run / "config.json").read_text()))

    def _files_kept(self, folder: Path, but: str = "") -> None:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != but)
        self.keep |= {str(path.relative_to(self.top)) for path in files if path.suffix != ".part"}

    def _leave(self, path: Path, wanted: bool) -> None:
        if wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"leftover")

    def _mine(self, path: Path, wanted: bool) -> None:
        if wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            self.keep.add(str(path.relative_to(self.top)))


@settings(max_examples=25, suppress_health_check=STATELESS)
@given(plan=worlds, unused_stores=st.booleans())
def test_gc_removes_what_it_lists_and_nothing_that_is_used(
    plan: Any, unused_stores: bool, store_at: Make, run_at_path: Make, snapshot: Snapshot
) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, VCACHE_HOME=f"{folder}/home"):
        world = World(Path(folder).resolve(), plan, store_at, run_at_path)
        before = snapshot(world.top)
        stores = world.top / "stores"
        where = [stores] if stores.exists() else []
        found = find_garbage(where, find_runs(where), unused_stores=unused_stores)
        assert snapshot(world.top) == before  # looking changes nothing
        listed = {
            str((tree.path / name).relative_to(world.top))
            for item in found.garbage
            for tree in (item.tree, *(item.store.beside if item.store else ()))
            for name in tree.files
        }
        assert sum(item.size_bytes for item in found.garbage) == sum(len(before[name]) for name in listed)
        for item in found.garbage:
            collect(item)
        after = {name: data for name, data in snapshot(world.top).items() if not name.endswith(".setup")}
        assert after == {name: data for name, data in before.items() if name not in listed}
        assert world.keep <= after.keys()
        assert not any(name.endswith((".tmp", ".part")) for name in after.keys() - world.keep)
        again = find_garbage(where, find_runs(where), unused_stores=unused_stores)
        assert again.garbage == ()


@settings(max_examples=15, suppress_health_check=STATELESS)
@given(plan=worlds, data=st.data())
def test_rm_removes_what_it_lists_and_no_store_that_a_run_refers_to(
    plan: Any, data: st.DataObject, store_at: Make, run_at_path: Make, snapshot: Snapshot
) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, VCACHE_HOME=f"{folder}/home"):
        world = World(Path(folder).resolve(), plan, store_at, run_at_path)
        asked = (
            data.draw(st.lists(st.sampled_from(world.stores + world.runs), unique=True))
            if world.stores + world.runs
            else []
        )
        before = snapshot(world.top)
        doomed = examine(asked, find_runs([world.top]))
        used = {run["store"] for number, run in enumerate(plan[1]) if world.runs[number] not in asked}
        refused = any(path in asked for number, path in enumerate(world.stores) if number in used)
        try:
            check_allowed(doomed, force=False)
        except RemovalError:
            assert refused
            assert snapshot(world.top) == before
            return
        assert not refused
        for item in doomed:
            remove(item, force=False)
        files = {tree.path / name for item in doomed for tree in (item.tree, *item.beside) for name in tree.files}  # type: ignore[operator]
        after = {name: data for name, data in snapshot(world.top).items() if not name.endswith(".setup")}
        assert after == {name: data for name, data in before.items() if world.top / name not in files}
        assert all((world.top / name).exists() == (world.top / name not in files) for name in before)


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / ".0.0123456789ab.tmp"
    path.write_bytes(b"half a shard")
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find_garbage([tmp_path], find_runs([])).garbage == ()
    (item,) = find_garbage([tmp_path], find_runs([])).garbage
    with path.open("r+b") as file:  # it began between the list and the removal
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RemovalError, match="a process writes it now"):
            collect(item)
    assert path.exists()


def test_only_what_is_old_enough_goes(tmp_path: Path) -> None:
    for name, days in (("a", 40), ("b", 20)):
        path = tmp_path / f".{name}.0123456789ab.tmp"
        path.write_bytes(b"x")
        then = path.stat().st_mtime - days * 86400
        os.utime(path, (then, then))
    (item,) = find_garbage([tmp_path], find_runs([]), older_than_days=30.0).garbage
    assert item.path.name.startswith(".a.")


def test_the_note_of_a_deleted_run_goes_and_that_of_another_stays(tmp_path: Path, run_at_path: Make) -> None:
    for name in ("stays", "goes"):
        run = run_at_path(tmp_path / name, None)
        note_run(run, json.loads((run / "config.json").read_text()))
    for file in run.iterdir():
        file.unlink()
    (item,) = find_garbage([], find_runs([])).garbage
    assert (item.kind, item.reason.startswith(str(run))) == ("note", True)
    collect(item)
    assert len(list(register_folder().iterdir())) == 1
