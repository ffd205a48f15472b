"""After a power cut at any moment a store is old or complete, holds all that was committed, and can be resumed."""

import hashlib
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import scenario
from conftest import World
from power_cut import Disk, at_random, emptied, folders_of, names_without_content, nothing_more
from shim import Died, Shim

MEMORY = "/dev/shm"
NESTED = "data/stores/s.zarr"  # folders that create_store makes


class PowerCuts:
    """Cuts the power before every call of a run, in several ways, and looks at what is left."""

    def __init__(self, world, tmp_path, every=1):
        self.world, self.every, self.done, self.seen = world, every, set(), set()
        self.top, self.target, self.calm = tmp_path / "top", tmp_path / "cut", tmp_path / "calm"
        self.top.mkdir()
        with Shim():
            scenario.run(world, self.calm / NESTED)
        self.shim = Shim()
        self.disk = Disk(self.top)
        self.shim.before_call = lambda name: self.cut()
        self.shim.after_sync = self.disk.after_sync

    def run(self):
        try:
            with self.shim:
                scenario.run(self.world, self.top / NESTED, self.done)
                self.cut()
        finally:
            self.disk.close()

    def cut(self):
        # The threads of zarr-python write under a temporary name; what they leave is looked at from the main one.
        if len(self.shim.calls) % self.every or threading.current_thread() is not threading.main_thread():
            return
        self.shim.__exit__()
        folders = folders_of(self.top)
        choices = [nothing_more, *(names_without_content(folders, content) for content in ("synced", "zeros", "half"))]
        for choice in [*choices, at_random(len(self.shim.calls))]:
            self.disk.cut(emptied(self.target), choice)
            self.look()
        self.shim.__enter__()

    def look(self):
        tree = self.world.tree(self.target)
        digest = hashlib.sha256(repr((tree, sorted(self.done))).encode()).digest()
        if digest in self.seen:
            return
        self.seen.add(digest)
        scenario.check_old_or_complete(self.world, self.target / NESTED, self.done)
        with Shim():
            scenario.run(self.world, self.target / NESTED)
        assert leftovers_removed(self.world.tree(self.target)) == self.world.tree(self.calm)


def leftovers_removed(tree):
    """Without what a power cut leaves of the store's own creation, which lies beside the store."""
    return {name: data for name, data in tree.items() if ".tmp/" not in name}


def killed_resumed_and_cut(world, tmp_path, fail_at):
    """Whether the run has so many calls. The process dies at a call, the run is resumed, and then the power is
    cut: what the dead one made and never synced must not take away what its successor committed."""
    top, done = tmp_path / "top", set()
    top.mkdir()
    disk = Disk(top)
    try:
        for shim in (Shim(fail_at, "death"), Shim()):
            shim.after_sync = disk.after_sync
            with shim, suppress(Died):
                scenario.run(world, top / NESTED, done)
            if shim.fail_at is not None and not shim.fired:
                return False
        disk.cut(tmp_path / "cut", nothing_more)
        scenario.check_old_or_complete(world, tmp_path / "cut" / NESTED, done)
        return True
    finally:
        disk.close()
        emptied(top), emptied(tmp_path / "cut")


@pytest.fixture(autouse=True)
def _one_sync_after_the_other(monkeypatch):
    """The power is cut between calls of the main thread; any order of parallel calls is one that this one may be."""
    monkeypatch.setattr("vcache.store.writer.in_parallel", lambda work, items: [work(item) for item in items])


@pytest.fixture
def folder(tmp_path):
    """In memory if possible: these tests make some ten thousand files."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as path:
        yield Path(path)


def test_a_power_cut_now_and_then_leaves_old_or_complete(folder):
    cuts = PowerCuts(World(), folder, every=11)
    cuts.run()
    assert len(cuts.seen) > 40


@pytest.mark.slow
def test_a_power_cut_before_any_call_leaves_old_or_complete(folder):
    cuts = PowerCuts(World(), folder)
    cuts.run()
    assert len(cuts.shim.calls) > 400
    assert len(cuts.seen) > 250  # different ones, each resumed


def test_what_some_killed_runs_never_synced_is_synced_by_their_successors(folder):
    for fail_at in (2, 5, *range(110, 480, 17)):
        assert killed_resumed_and_cut(World(), folder, fail_at)


@pytest.mark.slow
def test_what_any_killed_run_never_synced_is_synced_by_its_successor(folder):
    fail_at = 0
    while killed_resumed_and_cut(World(), folder, fail_at):
        fail_at += 1
    assert fail_at > 400
