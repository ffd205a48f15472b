"""Several arrays in one read: the same rows, the same errors, and nothing written after it has returned."""

import os
import threading
import time

import numpy as np
import pytest

from vcache.store import shard_file
from vcache.store.errors import ArrayNotFound, CorruptStore, RowNotCommitted
from vcache.store.reader import FeatureStore
from vcache.store.shard_file import ShardDamage

ROWS = [6, 0, 3, 3, 5, 1]


@pytest.fixture
def many_threads(monkeypatch):
    """Three threads whatever the size, a row at a time."""
    monkeypatch.setattr("vcache.store.row_reader.MIN_BYTES_PER_THREAD", 1)
    monkeypatch.setattr("vcache.store.row_reader._PIECE_BYTES", 1)


def test_many_arrays_are_each_array(world, tmp_path, many_threads):
    names = [spec.name for spec in world.all]
    world.build(tmp_path / "s.zarr")
    with FeatureStore.open(tmp_path / "s.zarr", num_threads=3) as store:
        read = store.read_many("train", [*names, names[0]], ROWS)
        assert list(read) == names
        for spec in world.all:
            np.testing.assert_array_equal(read[spec.name], np.stack([world.value(spec, row) for row in ROWS]))
        out = {spec.name: np.zeros((len(ROWS), *spec.shape), spec.dtype) for spec in world.all}
        again = store.read_many("train", names, ROWS, out=out)
        assert all(again[name] is out[name] for name in names)
        for name in names:
            np.testing.assert_array_equal(out[name], read[name])


def test_frames_are_those_of_every_array(world, tmp_path, many_threads):
    with world.build(tmp_path / "s.zarr") as store:
        read = store.read_many("train", ["tokens/8", "q/8"], ROWS, frames=[3, 1])
        for name, array in read.items():
            np.testing.assert_array_equal(array, store.read("train", name, ROWS)[:, [3, 1]])
        with pytest.raises(ValueError, match="cls/8 is stored in chunks of .* not by frame"):
            store.read_many("train", ["tokens/8", "cls/8"], ROWS, frames=[3, 1])


def test_one_array_that_cannot_be_read_is_named(world, tmp_path, many_threads):
    store = world.fill(world.create(tmp_path / "s.zarr"), [world.tokens])
    world.fill(store, [world.cls], shards=[0])
    with pytest.raises(RowNotCommitted, match=r"no cls/8 for video 'vidéo-6'"):
        store.read_many("train", ["tokens/8", "cls/8"], ROWS)
    with pytest.raises(ArrayNotFound, match="no array 'tokens/9'"):
        store.read_many("train", ["tokens/8", "tokens/9"], ROWS)
    path = tmp_path / "s.zarr" / "train" / "view-0" / world.cls.shard_path(0)
    data = bytearray(path.read_bytes())
    data[world.cls.row_bytes + 4] ^= 1
    path.write_bytes(data)
    with FeatureStore.open(tmp_path / "s.zarr", num_threads=3) as store:
        store.read_many("train", ["tokens/8", "cls/8"], [0, 2])
        with pytest.raises(CorruptStore, match=r"cls/8/c/0/0/0 has bytes that do not match .* row 1 .*'vidéo-1'"):
            store.read_many("train", ["tokens/8", "cls/8"], [0, 1, 2])


def test_nothing_is_written_after_a_read_has_raised(world, tmp_path, many_threads, monkeypatch):
    """The calling thread fails while two others are in the middle of a slow read."""
    world.build(tmp_path / "s.zarr")
    with FeatureStore.open(tmp_path / "s.zarr", num_threads=3) as store:
        store.read("train", "tokens/8", range(7))
        caller, both_begun, real = threading.current_thread(), threading.Semaphore(0), shard_file.read_fully
        num_slow = []

        def fail_or_dawdle(fd, buffers, offset, size):
            if threading.current_thread() is caller:
                assert both_begun.acquire(timeout=20) and both_begun.acquire(timeout=20)
                raise ShardDamage("was hit by the test")
            num_slow.append(offset)
            both_begun.release()
            time.sleep(0.2)
            real(fd, buffers, offset, size)

        monkeypatch.setattr(shard_file, "read_fully", fail_or_dawdle)
        out = np.zeros((20, *world.tokens.shape), np.float16)
        with pytest.raises(CorruptStore, match="was hit by the test"):
            store.read("train", "tokens/8", [4] * 20, out=out)
        before = out.copy()
        time.sleep(0.5)
        np.testing.assert_array_equal(out, before)
        assert len(num_slow) == 2, "after an error nobody begins another row"


def test_a_file_that_another_thread_drops_from_the_cache_stays_open_while_it_is_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr("vcache.store.reader.MAX_OPEN_FILES", 1)
    world.build(tmp_path / "s.zarr")
    with FeatureStore.open(tmp_path / "s.zarr") as store:
        expected = store.read("train", "tokens/8", [0])
        other, real = str(tmp_path / "s.zarr" / "zarr.json"), shard_file.read_fully

        def read_after_eviction(fd, *rest):
            store._rows._files.get(other)
            os.fstat(fd)  # raises if it is closed
            real(fd, *rest)

        monkeypatch.setattr(shard_file, "read_fully", read_after_eviction)
        np.testing.assert_array_equal(store.read("train", "tokens/8", [0]), expected)


@pytest.mark.parametrize("run_bytes", [1, 130, 10_000])
def test_however_chunks_are_grouped_the_values_are_the_same(world, tmp_path, monkeypatch, run_bytes):
    with world.build(tmp_path / "s.zarr") as store:
        expected = store.read("train", "tokens/8", ROWS)
        assert len(shard_file.split_into_runs([0, 64, 128, 192], 60)) == 1
        monkeypatch.setattr(shard_file, "RUN_BYTES", run_bytes)
        assert len(shard_file.split_into_runs([0, 64, 128, 192], 60)) == {1: 4, 130: 2, 10_000: 1}[run_bytes]
        np.testing.assert_array_equal(store.read("train", "tokens/8", ROWS), expected)
        for frames in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0], [2, 2]):
            read = store.read("train", "tokens/8", ROWS, frames=frames)
            np.testing.assert_array_equal(read, expected[:, frames])


def test_neighbours_in_the_file_are_read_together_up_to_the_limit():
    runs = shard_file.split_into_runs([64, 128, 0, 64, 64, 300], 60)
    assert [tuple(run) for run in runs] == [(64, 0, 2), (0, 2, 2), (64, 4, 1), (300, 5, 1)]
