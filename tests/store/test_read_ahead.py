"""A slow disk is told what comes next; that changes neither values nor errors."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from vcache.store import row_reader
from vcache.store.errors import CorruptStore
from vcache.store.reader import FeatureStore


@pytest.fixture
def announced(monkeypatch):
    """The bytes that the kernel was told of, on a disk that is always slow, with a row in each piece."""
    ranges = []

    def fadvise(fd, offset, size, advice):
        if advice == os.POSIX_FADV_WILLNEED:
            ranges.append((Path(f"/proc/self/fd/{fd}").readlink(), offset, size))

    monkeypatch.setattr(row_reader, "_MEMORY_SPEED", math.inf)
    monkeypatch.setattr(row_reader, "_PIECE_BYTES", 1)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return ranges


def test_every_row_but_the_first_two_is_announced_once(world, tmp_path, announced):
    path = world.build(tmp_path / "s.zarr").path
    announced.clear()
    rows = [5, 1, 6, 0, 2, 4]
    with FeatureStore.open(path, num_threads=1) as store:
        tokens = store.read("train", world.tokens.name, rows)
    np.testing.assert_array_equal(tokens, [world.value(world.tokens, row) for row in rows])
    assert len(announced) == len(set(announced))
    row_bytes = world.tokens.row_bytes + 4 * world.tokens.chunks_per_row
    # In the order of the files: row 0 shows that the disk is slow, row 1 is taken before anything is announced.
    assert [size for _, _, size in announced] == [row_bytes] * 4


def test_what_cannot_be_announced_is_an_error_of_the_row_itself(world, tmp_path, announced):
    path = world.build(tmp_path / "s.zarr").path
    (path / "train/view-0" / world.tokens.shard_path(1)).unlink()
    with FeatureStore.open(path, num_threads=1) as store:
        np.testing.assert_array_equal(
            store.read("train", world.tokens.name, [0, 1, 2])[2], world.value(world.tokens, 2)
        )
        with pytest.raises(CorruptStore, match=r"is missing: row 3 "):
            store.read("train", world.tokens.name, [0, 1, 2, 3, 4])
