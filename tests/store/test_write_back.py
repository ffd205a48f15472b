"""The disk begins before the end, and the syncs of a commit run side by side."""

import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from vcache.store import files
from vcache.store.files import TemporaryFile, in_parallel
from vcache.store.layout import ArraySpec
from vcache.store.writer import ShardWriter, declare_arrays


def test_every_byte_is_sent_to_the_disk_once_in_order_and_after_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WRITE_BACK_BYTES", 3 * files._PAGE_BYTES)
    sent = []

    def spy(fd, offset, size, advice):
        assert advice == os.POSIX_FADV_DONTNEED
        assert os.fstat(fd).st_size >= offset + size
        sent.append((offset, size))

    monkeypatch.setattr(os, "posix_fadvise", spy)
    rng = np.random.default_rng(0)
    parts = [rng.bytes(int(size)) for size in rng.integers(1, 2 * files._PAGE_BYTES, size=40)]
    file = TemporaryFile(tmp_path, "0")
    for part in parts:
        file.write([part[:9], part[9:]])
    file.publish(tmp_path / "0")
    assert (tmp_path / "0").read_bytes() == b"".join(parts)
    assert len(sent) > 5
    assert all(size >= files._WRITE_BACK_BYTES and size % files._PAGE_BYTES == 0 for _, size in sent)
    assert [offset for offset, _ in sent] == [0, *np.cumsum([size for _, size in sent])[:-1].tolist()]


def test_each_folder_is_synced_once_for_a_shard(world, tmp_path, monkeypatch):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", world.all)
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()) or fsync(fd))
    world.fill(store, world.all, shards=[1])
    folders = [path for path in synced if path.is_dir() and "view-0" in path.parts]
    assert len(folders) == len(set(folders))
    ends = {store.path / "train/view-0" / spec.shard_path(1) for spec in world.all}
    assert {end.parent for end in ends} <= set(folders)


def test_work_runs_side_by_side_and_results_keep_their_order():
    barrier = threading.Barrier(3, timeout=20)

    def meet(number: int) -> int:
        barrier.wait()
        return number * number

    assert in_parallel(meet, [3, 1, 2]) == [9, 1, 4]


def test_an_error_is_raised_when_no_thread_works_any_more():
    working = []

    def work(number: int) -> None:
        if number == 0:
            raise OSError(28, "no space left on device")
        working.append(number)
        time.sleep(0.05)
        working.remove(number)

    with pytest.raises(OSError, match="no space left"):
        in_parallel(work, [1, 0, 2, 3])
    assert working == []


def test_writing_takes_no_memory_beside_the_row(world, tmp_path):
    spec = ArraySpec(name="tokens/8", dims=("frame", "channel"), shape=(8, 2**17), chunk=(1, 2**17), dtype="float16")
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", [spec])
    row = np.ones(spec.shape, dtype=np.float16)
    with ShardWriter(store, "train", 0, [spec]) as writer:
        tracemalloc.start()
        try:
            for number in store.shard_rows("train", 0):
                writer.write(number, {"tokens/8": row})
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < row.nbytes / 8
