"""Shards are atomic and durable, a killed run can be resumed, and nothing stored is ever rewritten."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vcache.store.errors import RowNotCommitted
from vcache.store.files import TemporaryFile
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, add_split, clean_temporary, create_store, declare_arrays

# Writes two rows of shard 1, says so, and waits to be killed. It takes its data from files, so that it needs no fixture.
CHILD = """
import sys, time
import numpy as np
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter
store = FeatureStore.open(sys.argv[1])
specs = store.arrays("train")
with ShardWriter(store, "train", 1, specs.values()) as writer:
    for row in list(store.shard_rows("train", 1))[:2]:
        with np.load(f"{sys.argv[2]}/{row}.npz") as arrays:
            writer.write(row, dict(arrays))
    print("two rows written", flush=True)
    time.sleep(600)
"""


class Spy:
    """Records the durable steps in order, as (step, path)."""

    def __init__(self, monkeypatch):
        self.steps = []
        fsync, replace = os.fsync, Path.replace

        def spied_fsync(fd):
            self.steps.append(("fsync", Path(f"/proc/self/fd/{fd}").readlink()))
            fsync(fd)

        def spied_replace(source, target):
            self.steps.append(("rename", source, Path(target)))
            return replace(source, target)

        monkeypatch.setattr(os, "fsync", spied_fsync)
        monkeypatch.setattr(Path, "replace", spied_replace)


def test_files_are_synced_then_renamed_then_their_folders_synced_and_the_record_comes_last(
    world, tmp_path, monkeypatch
):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", world.all)
    spy = Spy(monkeypatch)
    world.fill(store, world.all, shards=[1])
    renames = [step for step in spy.steps if step[0] == "rename"]
    assert [target.parent.parent.name == "_commit" for _, _, target in renames] == [False] * len(world.all) + [True]
    for rename in renames:
        _, temporary, target = rename
        at = spy.steps.index(rename)
        assert ("fsync", temporary) in spy.steps[:at]
        later = spy.steps[at:]
        synced = [("fsync", folder) for folder in target.parents if target.parent == folder or "c" in folder.parts]
        assert all(step in later for step in synced)
        if rename != renames[-1]:  # the folder is on disk before the record is even written
            assert later.index(("fsync", target.parent)) < later.index(("fsync", renames[-1][1]))
    assert spy.steps[-1] == ("fsync", renames[-1][2].parent)


def test_a_run_killed_in_a_shard_is_resumed_to_the_tree_of_an_undisturbed_run(world, tmp_path):
    world.build(tmp_path / "calm.zarr")
    store = world.fill(world.create(tmp_path / "killed.zarr"), world.all, shards=[0])
    for row in range(7):
        np.savez(tmp_path / f"{row}.npz", **{spec.name: world.value(spec, row) for spec in world.all})
    command = [sys.executable, "-c", CHILD, str(store.path), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "two rows written\n"
            assert clean_temporary(store) == 0, "the files of a living writer were removed"
        finally:
            child.send_signal(signal.SIGKILL)
    store.refresh()
    assert store.committed_arrays("train", 1) == frozenset()
    with pytest.raises(RowNotCommitted):
        store.read("train", "tokens/8", [3])
    assert clean_temporary(store) == len(world.all)
    world.fill(store, world.all, shards=[1, 2])
    assert world.tree(tmp_path / "killed.zarr") == world.tree(tmp_path / "calm.zarr")


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_an_io_error_at_any_step_commits_nothing_and_the_shard_can_be_written_again(world, tmp_path, monkeypatch, step):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", world.all)
    steps = 0
    while True:
        with monkeypatch.context() as patch:
            fail_at(patch, step, steps)
            try:
                world.fill(store, world.all, shards=[0])
            except OSError as error:
                assert "planted" in str(error)
            else:
                break
        store.refresh()
        assert not [name for name in world.tree(tmp_path / "s.zarr") if name.endswith(".tmp")]
        if step == "rename" or not list((tmp_path / "s.zarr").glob("_commit/*/*.json")):
            assert store.committed_arrays("train", 0) == frozenset()
        else:  # the very last fsync, of the record's folder: the record is there, and so is what it says
            break
        steps += 1
    assert steps >= len(world.all)
    np.testing.assert_array_equal(store.read("train", "tokens/8", [1])[0], world.value(world.tokens, 1))


def fail_at(monkeypatch, step, number):
    owner, name = {"fsync": (os, "fsync"), "rename": (Path, "replace")}[step]
    call, count = getattr(owner, name), iter(range(10**6))

    def failing(*args):
        if next(count) == number:
            raise OSError(28, "planted: no space left on device")
        return call(*args)

    monkeypatch.setattr(owner, name, failing)


def test_adding_arrays_leaves_every_stored_file_as_it_was(world, tmp_path):
    path = tmp_path / "s.zarr"
    store = world.fill(world.create(path), [world.tokens])
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino) for file in files(path)}
    time.sleep(0.01)
    rest = [spec for spec in world.all if spec != world.tokens]
    world.fill(store, rest)
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino) for file in files(path)}
    assert before.items() <= after.items()
    assert store.committed_arrays("train", 1) == {spec.name for spec in world.all}
    assert len(list(path.glob("_commit/*/"))) == 2


def files(path):
    return [file for file in path.rglob("*") if file.is_file()]


def test_the_order_in_which_shards_are_written_does_not_show(world, tmp_path):
    world.build(tmp_path / "a.zarr", failed=[4])
    world.fill(world.create(tmp_path / "b.zarr"), world.all, shards=[2, 0, 1], failed=[4])
    assert world.tree(tmp_path / "a.zarr") == world.tree(tmp_path / "b.zarr")


def test_a_store_is_created_whole_or_not_at_all(world, tmp_path, monkeypatch):
    monkeypatch.setattr("vcache.store.writer.write_table", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create_store(tmp_path / "s.zarr", world.manifest(), {"train": world.videos(7)})
    assert list(tmp_path.iterdir()) == []


def test_a_split_is_not_there_until_the_manifest_names_it(world, tmp_path, monkeypatch):
    store = world.create(tmp_path / "s.zarr")
    with monkeypatch.context() as patch:
        patch.setattr("vcache.store.writer.write_manifest", lambda *args: 1 / 0)  # killed before the manifest
        with pytest.raises(ZeroDivisionError):
            add_split(store, "val", world.videos(5))
    assert FeatureStore.open(store.path).manifest.splits == {"train": 7}
    add_split(store, "val", world.videos(2))
    assert store.videos("val").ids == ("vidéo-0", "vidéo-1")


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(world, tmp_path):
    store = world.build(tmp_path / "s.zarr")
    before = world.tree(tmp_path)
    for folder in ("s.zarr/train/view-0/tokens/8", "s.zarr/_commit", "s.zarr"):
        (tmp_path / folder / ".0.0123456789ab.tmp").write_text("half")
    (tmp_path / ".s.zarr.0123456789ab.tmp" / "train").mkdir(parents=True)
    (tmp_path / ".other.zarr.0123456789ab.tmp").mkdir()
    living = TemporaryFile(tmp_path / "s.zarr" / "_commit", "1")
    assert clean_temporary(store) == 4
    assert living.path.exists()
    living.discard()
    assert world.tree(tmp_path) == before
    assert (tmp_path / ".other.zarr.0123456789ab.tmp").is_dir()


def test_the_other_writer_of_the_same_shard_gives_the_same_bytes(world, tmp_path):
    store = world.fill(world.create(tmp_path / "s.zarr"), world.all, shards=[1, 2])
    other = FeatureStore.open(store.path)
    first = ShardWriter(store, "train", 0, world.all)
    with ShardWriter(other, "train", 0, world.all) as second, first:
        for row in store.shard_rows("train", 0):
            world.put(first, row)
            world.put(second, row)
    world.build(tmp_path / "calm.zarr")
    assert world.tree(tmp_path / "s.zarr") == world.tree(tmp_path / "calm.zarr")
