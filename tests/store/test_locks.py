"""One writer alone, or several that share: who is refused, who waits, and what each is told."""

import fcntl
import os
import threading
import time

import pytest

from vcache.store.errors import StoreBusy
from vcache.store.files import remove_stale_temporaries
from vcache.store.locks import set_up_turn, shared_writer, sole_writer
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import ShardWriter, clean_temporary, declare_arrays


@pytest.fixture
def path(world, tmp_path):
    return world.create(tmp_path / "s.zarr").path


def test_any_number_may_share_and_a_sole_writer_is_then_refused_and_told_of_the_parts(path):
    with shared_writer(path), shared_writer(path), shared_writer(path):
        with pytest.raises(StoreBusy, match=r"processes with --part are extracting into .*s\.zarr"), sole_writer(path):
            pass
        with shared_writer(path):  # the refused one holds nothing
            pass
    with sole_writer(path):
        pass


def test_beside_a_sole_writer_both_kinds_are_refused_and_told_so(path):
    with sole_writer(path):
        with (
            pytest.raises(StoreBusy, match="another process is extracting into .* without --part"),
            shared_writer(path),
        ):
            pass
        with pytest.raises(StoreBusy, match=r"another process is extracting into .*s\.zarr\. Wait"), sole_writer(path):
            pass
    with shared_writer(path):
        pass


def test_turns_come_one_after_the_other_also_before_there_is_a_store(tmp_path):
    path, inside, most = tmp_path / "folder" / "s.zarr", [], []

    def set_up(number):
        with set_up_turn(path):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=set_up, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    assert not path.exists()


def test_who_waits_too_long_is_told_and_who_waits_at_all_is_told_once(tmp_path):
    waits = []
    with set_up_turn(tmp_path / "s.zarr"):
        with (
            pytest.raises(StoreBusy, match=r"another process has been setting up .*s\.zarr for 0 s"),
            set_up_turn(tmp_path / "s.zarr", timeout_seconds=0.25, on_wait=lambda: waits.append(1)),
        ):
            pass
        with set_up_turn(tmp_path / "other.zarr", timeout_seconds=0):
            pass
    with set_up_turn(tmp_path / "s.zarr", timeout_seconds=0, on_wait=lambda: waits.append(2)):
        pass
    assert waits == [1]


def test_the_lock_of_a_turn_is_no_part_of_the_store_and_no_leftover(world, path):
    with FeatureStore.open(path) as store, set_up_turn(path), shared_writer(path):
        assert clean_temporary(store) == 0
        found = verify_store(store)
        assert (found.findings, found.notes) == ((), ())


def test_a_file_is_locked_for_writing_as_network_file_systems_demand_and_left_if_it_is_not_ours(
    world, path, monkeypatch
):
    leftover, foreign = path / ".x.0123456789ab.tmp", path / ".y.0123456789ab.tmp"
    leftover.touch(), foreign.touch()
    real_open, real_flock, modes = os.open, fcntl.flock, []

    def opened(file, flags, *more, **named):
        if file == foreign:
            raise PermissionError(13, "planted")
        return real_open(file, flags, *more, **named)

    def flock(fd, kind):
        modes.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
        return real_flock(fd, kind)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert remove_stale_temporaries(iter([leftover, foreign])) == 1
    assert modes == [os.O_RDWR]
    assert (leftover.exists(), foreign.exists()) == (False, True)


def test_the_files_of_a_living_writer_that_shares_are_left(world, path):
    with FeatureStore.open(path) as store, shared_writer(path):
        declare_arrays(store, "train", world.all)
        with ShardWriter(store, "train", 0, world.all) as writer:
            for row in range(3):
                world.put(writer, row)
                with shared_writer(path):
                    assert clean_temporary(store) == 0
        assert store.committed_arrays("train", 0)
