"""Real processes on a real disk: writers that are killed, that fill the disk up, and that work side by side."""

import errno
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import scenario
from conftest import World
from processes import Processes

from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import clean_temporary, declare_arrays

MEMORY = "/dev/shm"


@pytest.fixture(scope="module")
def processes():
    with Processes() as started:
        yield started


@pytest.fixture
def folder(tmp_path):
    """In memory if possible: the tests are about processes, and a sync takes long where others work on the disk, too."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The tree of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    scenario.run(World(), folder / "s.zarr")
    return World().tree(folder)


def clean(path):
    with FeatureStore.open(path) as store:
        clean_temporary(store)


def kill_and_resume(processes, folder, calm, num_kills, seed):
    """Kill a writer of a new store at `num_kills` random moments; each one goes on where the one before was killed."""
    path, rng = folder / "s.zarr", random.Random(seed)
    assert processes.wait(processes.start("run", folder / "first.zarr")) == 0
    begin = time.monotonic()
    assert processes.wait(processes.start("run", folder / "timed.zarr")) == 0
    seconds, killed, found = time.monotonic() - begin, 0, set()
    while killed < num_kills:
        writer = processes.start("run", path)
        time.sleep(rng.uniform(0, 1.1 * seconds))
        with suppress(ProcessLookupError):
            os.kill(writer, signal.SIGKILL)
        died = processes.wait(writer) == -signal.SIGKILL
        killed += died
        found = scenario.check_old_or_complete(World(), path, found)
        if not died:  # it was done: a new store for the next
            assert finished(processes, path) == calm
            shutil.rmtree(path)
            found = set()
    assert finished(processes, path) == calm


def finished(processes, path):
    """The tree of the folder after one more run, which nobody disturbs."""
    assert processes.wait(processes.start("run", path)) == 0
    clean(path)
    for other in ("first.zarr", "timed.zarr"):
        shutil.rmtree(path.with_name(other), ignore_errors=True)
    return World().tree(path.parent)


def test_a_writer_killed_a_few_times(processes, folder, calm):
    kill_and_resume(processes, folder, calm, 10, seed=0)


@pytest.mark.slow
def test_a_writer_killed_two_hundred_times(processes, folder, calm):
    kill_and_resume(processes, folder, calm, 200, seed=1)


@pytest.mark.parametrize("num_writers", [1, 2, 4])
def test_writers_side_by_side_with_shuffled_and_repeated_shards_give_one_tree(processes, folder, num_writers):
    world = World()
    for round_ in range(4):
        path = folder / f"{round_}" / "s.zarr"
        declare_arrays(world.create(path, 11, 2), "train", scenario.ALL)
        writers = [
            processes.start("write_shuffled", path, 100 * num_writers + 10 * round_ + number)
            for number in range(num_writers)
        ]
        assert [processes.wait(writer) for writer in writers] == [0] * num_writers
        with FeatureStore.open(path) as store:
            assert verify_store(store).ok
            assert store.committed_rows("train", [spec.name for spec in scenario.ALL]).all()
    alone = world.fill(world.create(folder / "alone" / "s.zarr", 11, 2), scenario.ALL)
    trees = [world.tree(folder / str(round_)) for round_ in range(4)]
    assert trees == [world.tree(alone.path.parent)] * 4


def test_four_processes_that_share_a_store_from_its_creation_on_make_the_tree_of_one(processes, folder):
    path, alone = folder / "shared" / "s.zarr", folder / "alone" / "s.zarr"
    writers = [processes.start("write_every_fourth", path, number) for number in range(4)]
    assert [processes.wait(writer) for writer in writers] == [0] * 4
    for number in range(4):
        assert processes.wait(processes.start("write_every_fourth", alone, number)) == 0
    assert World().tree(path) == World().tree(alone)
    with FeatureStore.open(path) as store:
        found = verify_store(store)
        assert (found.findings, found.notes, found.num_shards) == ((), (), 18)


def test_of_four_processes_that_share_a_store_any_may_be_killed_and_started_again(processes, folder):
    path, alone, rng = folder / "shared" / "s.zarr", folder / "alone" / "s.zarr", random.Random(3)
    begin = time.monotonic()
    for number in range(4):
        assert processes.wait(processes.start("write_every_fourth", alone, number)) == 0
    seconds, killed = time.monotonic() - begin, 0
    for _ in range(6):
        writers = [processes.start("write_every_fourth", path, number) for number in range(4)]
        time.sleep(rng.uniform(0, 0.7 * seconds))
        with suppress(ProcessLookupError):
            os.kill(writers[rng.randrange(4)], signal.SIGKILL)
        ends = [processes.wait(writer) for writer in writers]
        killed += ends.count(-signal.SIGKILL)
        assert set(ends) <= {0, -signal.SIGKILL}
    for number in range(4):
        assert processes.wait(processes.start("write_every_fourth", path, number)) == 0
    clean(path)
    assert World().tree(path) == World().tree(alone)
    assert killed


@pytest.mark.parametrize("reader", ["read_on", "refresh_on"])
def test_a_reader_beside_a_writer_sees_old_or_complete(processes, folder, reader):
    path = folder / "s.zarr"
    scenario.create(World(), path, set())
    looking = processes.start(reader, path)
    assert processes.wait(processes.start("slow_run", path)) == 0
    (folder / "stop").touch()
    assert processes.wait(looking) == 0
    assert int((folder / "seen").read_text()) >= 3  # of 7 commits; more where the machine is idle


@pytest.mark.parametrize("max_bytes", [1, 100, 300, 500, 600, 700, 1000])
def test_the_kernel_s_own_limit_on_the_size_of_files(processes, folder, calm, max_bytes):
    path = folder / "s.zarr"
    assert processes.wait(processes.start("run_with_limit", path, max_bytes)) == errno.EFBIG
    scenario.check_old_or_complete(World(), path, set())
    assert finished(processes, path) == calm


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a size to be set, or a skip: mounting takes privileges."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system that fills up takes the right to mount one")

    def resize(pages):
        subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(folder)], check=True, capture_output=True)

    try:
        yield folder, resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_at_any_page(processes, calm, small_disk):
    folder, resize = small_disk
    path, pages, found, failed = folder / "s.zarr", 1, set(), 0
    while processes.wait(processes.start("run_with_limit", path, 1 << 30)) == errno.ENOSPC:
        failed += 1
        found = scenario.check_old_or_complete(World(), path, found)
        pages += 1
        resize(pages)
    assert failed > 20
    assert finished(processes, path) == calm
