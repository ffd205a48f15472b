"""Whatever call to the kernel fails or is the last one while videos are added: old or complete, and a resumed run is whole."""

import shutil

import numpy as np
import pytest
from growing import X, drawn, fill, grown_store, state, table
from shim import FAULTS, Died, Shim, open_files, wait_for_threads_of_zarr

from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import add_videos, clean_temporary

OLD, NEW = 3, 4
CALLS, STRIDE = 170, 29  # that a growth makes, at least; and every which of them fails
VALUES = drawn([X], NEW, seed=5)


def grow(path):
    """Add the videos, as `vcache extract` does after any interruption."""
    with FeatureStore.open(path) as store:
        clean_temporary(store)
        known = store.videos("train").ids
        part = "train+1" if "new-0" in known else add_videos(store, "train", table("new", NEW))
        fill(store, part, [X], VALUES)


@pytest.fixture
def before(tmp_path):
    store, values = grown_store(tmp_path / "before" / "s", [OLD])
    store.close()
    return tmp_path / "before", values


def disturbed(before, values, top, fail_at, fault):
    """One growth with a fault: what a reader sees then, and after resuming; False when there is no such call."""
    shutil.copytree(before, top)
    stored, path, files = state(top / "s"), top / "s", open_files()
    try:
        with Shim(fail_at, fault) as shim:
            grow(path)
    except (Died, OSError):
        pass
    wait_for_threads_of_zarr(files)
    if not shim.fired:
        return False
    assert stored.items() <= state(path).items()
    with FeatureStore.open(path) as store:
        assert store.splits["train"] in (OLD, OLD + NEW)
        expected = np.concatenate([values, VALUES[X.name]])
        readable = np.flatnonzero(store.committed_rows("train", [X.name]))
        assert set(range(OLD)) <= set(readable.tolist())
        np.testing.assert_array_equal(store.read("train", X.name, readable), expected[readable])
    with Shim():  # without a fault; for its speed
        grow(path)
    assert stored.items() <= state(path).items()
    with FeatureStore.open(path) as store:
        np.testing.assert_array_equal(store.read("train", X.name, range(OLD + NEW)), expected)
        assert (verify_store(store).findings, verify_store(store).notes) == ((), ())
    return True


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_some_calls_of_a_growth(before, tmp_path, fault):
    for fail_at in range(FAULTS.index(fault) * 5, CALLS, STRIDE):
        assert disturbed(*before, tmp_path / str(fail_at), fail_at, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_call_of_a_growth(before, tmp_path, fault):
    fail_at = 0
    while disturbed(*before, tmp_path / str(fail_at), fail_at, fault):
        fail_at += 1
    assert fail_at >= CALLS
