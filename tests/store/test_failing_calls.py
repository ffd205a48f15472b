"""Whatever call to the kernel fails, is done by half or is the last one: a reader sees old or complete, and a resumed
run ends in the very tree of an undisturbed one."""

import shutil

import pytest
import scenario
from conftest import World
from shim import FAULTS, Died, Shim, open_files, wait_for_threads_of_zarr

from vcache.store.reader import FeatureStore
from vcache.store.writer import clean_temporary


class Stages:
    """The tree before and after each stage of an undisturbed run, and what is committed then."""

    def __init__(self, world, folder):
        self.world, self.folder = world, folder
        self.committed, self.num_calls, done = [set()], [], set()
        (folder / "before-0").mkdir()
        for number, stage in enumerate(scenario.STAGES):
            shutil.copytree(self.before(number), folder / f"before-{number + 1}")
            with Shim() as shim:
                stage(world, self.before(number + 1) / "s.zarr", done)
            self.committed.append(set(done))
            self.num_calls.append(len(shim.calls))

    def before(self, number):
        return self.folder / f"before-{number}"

    def disturbed(self, number, fail_at, fault):
        """Run one stage with a fault, look, resume, compare; False when the stage has no such call."""
        top = self.folder / "disturbed"
        shutil.copytree(self.before(number), top)
        try:
            self._meet_fault(number, top / "s.zarr", shim := Shim(fail_at, fault))
            if not shim.fired:
                return False
            self._resume(number, top)
            return True
        finally:
            shutil.rmtree(top)

    def _meet_fault(self, number, path, shim):
        done = set(self.committed[number])
        before = open_files()
        try:
            with shim:
                scenario.STAGES[number](self.world, path, done)
        except Died:
            pass
        except OSError as error:
            assert "planted" in str(error) or isinstance(error, FileNotFoundError), error
        wait_for_threads_of_zarr(before)
        assert open_files() == before
        found = scenario.check_old_or_complete(self.world, path, done)
        assert found <= self.committed[number + 1]

    def _resume(self, number, top):
        with Shim():  # without a fault; for its speed
            scenario.STAGES[number](self.world, top / "s.zarr", set())
            with FeatureStore.open(top / "s.zarr") as store:
                clean_temporary(store)
        assert self.world.tree(top) == self.world.tree(self.before(number + 1))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return Stages(World(), tmp_path_factory.mktemp("stages"))


NUMBERS = range(len(scenario.STAGES))
STRIDE = 13


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_fault_at_some_calls_of_each_stage(stages, number, fault):
    """A thirteenth of the calls, others for each fault."""
    tried = range((FAULTS.index(fault) * 2 + number) % STRIDE, stages.num_calls[number], STRIDE)
    assert len(tried) >= 5
    for fail_at in tried:
        assert stages.disturbed(number, fail_at, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_fault_at_every_call_of_each_stage(stages, number, fault):
    fail_at = 0
    while stages.disturbed(number, fail_at, fault):
        fail_at += 1
    assert abs(fail_at - stages.num_calls[number]) <= 2  # the threads of zarr-python


def test_the_shim_stands_before_every_kind_of_call(tmp_path):
    with Shim() as shim:
        scenario.run(World(), tmp_path / "s.zarr")
    kinds = {"create", "open", "write", "writev", "fsync", "replace", "rename", "mkdir", "flock"}
    assert kinds <= set(shim.calls)
    assert shim.calls.count("writev") >= sum(scenario.TRAIN_ROWS for _ in scenario.ALL)
