"""Whatever call of a retry fails or is the last one, and whenever the power is cut: no wrong row is read; another run ends it.

A reader sees each row as it is in the videos, or it raises; the store verifies; the same command again ends in the very tree
of a store that never met the failures.
"""

import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import World
from power_cut import Disk, at_random, emptied, folders_of, names_without_content, nothing_more
from retrying import ROWS, Videos, built, retry
from shim import FAULTS, Died, Shim, open_files, wait_for_threads_of_zarr

from vcache.store.errors import RowNotCommitted
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

MEMORY = "/dev/shm"
BROKEN, STILL = {1: ("empty", False), 4: ("missing", False), 6: ("empty", False)}, {4: ("truncated", False)}
CALLS, STRIDE = 150, 31  # that a retry makes, at least; and every which of them fails


class Case:
    """A store with failed rows in two passes, what it is after a retry, and what may be seen in between."""

    def __init__(self, folder):
        self.world, self.folder = World(), folder
        broken, self.now = Videos(self.world, BROKEN), Videos(self.world, STILL)
        self.passes = [([self.world.tokens], 0, broken), ([self.world.cls], 0, broken)]
        with Shim():  # without a fault; for its speed
            built(self.world, folder / "before" / "s", self.passes)
            built(self.world, folder / "after" / "s", [(specs, view, self.now) for specs, view, _ in self.passes])
        self.after = self.world.tree(folder / "after")

    def run(self, path):
        retry(path, self.now, self.passes)

    def look(self, path):
        """Every row is right or raises, what was readable in untouched shards is, and nothing is damaged."""
        with FeatureStore.open(path) as store:
            assert verify_store(store).findings == ()
            for spec in (self.world.tokens, self.world.cls):
                for row in range(ROWS):
                    try:
                        read = store.read("train", spec.name, [row])[0]
                    except RowNotCommitted:
                        continue
                    np.testing.assert_array_equal(read, self.world.value(spec, row))

    def finish(self, path):
        with Shim():
            self.run(path)
        assert self.world.tree(path.parent) == self.after

    def disturbed(self, top, fail_at, fault):
        """One retry with a fault, a look, another retry; False where there is no such call."""
        shutil.copytree(self.folder / "before", top)
        files = open_files()
        try:
            with Shim(fail_at, fault) as shim:
                self.run(top / "s")
        except Died:
            pass
        except OSError as error:
            assert "planted" in str(error), error
        wait_for_threads_of_zarr(files)
        assert open_files() == files
        self.look(top / "s")
        self.finish(top / "s")
        shutil.rmtree(top)
        return shim.fired


@pytest.fixture(scope="module")
def case():
    """In memory if possible: these tests make some ten thousand files."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as path:
        yield Case(Path(path))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_some_calls_of_a_retry(case, fault):
    for fail_at in range(FAULTS.index(fault) * 5, CALLS, STRIDE):
        assert case.disturbed(case.folder / "t", fail_at, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_call_of_a_retry(case, fault):
    fail_at = 0
    while case.disturbed(case.folder / "t", fail_at, fault):
        fail_at += 1
    assert fail_at >= CALLS


class PowerCuts:
    """Cuts the power before every call of a retry, in several ways, and looks at what is left."""

    def __init__(self, case, every):
        self.case, self.every, self.seen = case, every, set()
        self.top, self.target = case.folder / "top", case.folder / "cut"
        shutil.copytree(case.folder / "before", emptied(self.top))
        self.shim, self.disk = Shim(), Disk(self.top)
        self.shim.before_call = lambda name: self.cut()
        self.shim.after_sync = self.disk.after_sync

    def run(self):
        try:
            with self.shim:
                self.case.run(self.top / "s")
                self.cut()
        finally:
            self.disk.close()

    def cut(self):
        if len(self.shim.calls) % self.every or threading.current_thread() is not threading.main_thread():
            return
        self.shim.__exit__()
        folders = folders_of(self.top)
        choices = [nothing_more, *(names_without_content(folders, content) for content in ("synced", "zeros", "half"))]
        for choice in [*choices, at_random(len(self.shim.calls))]:
            self.disk.cut(emptied(self.target), choice)
            tree = hashlib.sha256(repr(self.case.world.tree(self.target)).encode()).digest()
            if tree not in self.seen:
                self.seen.add(tree)
                self.case.look(self.target / "s")
                self.case.finish(self.target / "s")
        self.shim.__enter__()


@pytest.fixture
def _one_sync_after_the_other(monkeypatch):
    """The power is cut between calls of the main thread; any order of parallel calls is one that this one may be."""
    for module in ("mend_shard", "retry", "writer"):
        monkeypatch.setattr(f"vcache.store.{module}.in_parallel", lambda work, items: [work(item) for item in items])


@pytest.mark.usefixtures("_one_sync_after_the_other")
def test_a_power_cut_now_and_then_in_a_retry(case):
    cuts = PowerCuts(case, every=13)
    cuts.run()
    assert len(cuts.seen) > 10


@pytest.mark.slow
@pytest.mark.usefixtures("_one_sync_after_the_other")
def test_a_power_cut_before_any_call_of_a_retry(case):
    cuts = PowerCuts(case, every=1)
    cuts.run()
    assert len(cuts.shim.calls) > CALLS
    assert len(cuts.seen) > 60  # different ones, each looked at and finished
