"""Random arrays both ways between this store, zarr-python and tensorstore: the same metadata, the same values."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.store.checksum import crc32c
from vcache.store.commits import CommitRecord, StoredFile
from vcache.store.files import write_durably
from vcache.store.layout import CRC_BYTES, ArraySpec, decode_index
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, create_store, declare_arrays

DTYPES = ("float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "int64", "uint64")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
EXAMPLES = settings(max_examples=20, deadline=None)


@st.composite
def arrays(draw):
    """A spec, rows per shard, and values of all rows; none of them is the fill value alone."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    split_axis = draw(st.integers(0, len(shape)))
    chunk = [1] * min(split_axis, len(shape)) + list(shape[split_axis:])
    if split_axis < len(shape):
        chunk[split_axis] = draw(
            st.sampled_from([n for n in range(1, shape[split_axis] + 1) if shape[split_axis] % n == 0])
        )
    dims = ("frame", "token", "channel", "dim")[: len(shape)]
    spec = ArraySpec(name="group/x", dims=dims, shape=shape, chunk=tuple(chunk), dtype=draw(st.sampled_from(DTYPES)))
    num_rows, rows_per_shard = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(1, 100, size=(num_rows, *shape))
    return spec, rows_per_shard, values.astype(spec.dtype)


def new_store(folder, spec, rows_per_shard, num_rows):
    table = VideoTable(*[tuple(map(str, range(num_rows)))] * 2, np.zeros(num_rows, dtype=np.int64))
    manifest = Manifest(
        key="0" * 16,
        spec={},
        dataset="toy",
        class_names=("a",),
        rows_per_shard=rows_per_shard,
        splits={"train": num_rows},
    )
    create_store(Path(folder, "s"), manifest, {"train": table})
    store = FeatureStore.open(Path(folder, "s"))
    declare_arrays(store, "train", [spec])
    return store


def array_folder(store, spec):
    return store.path / "train" / "view-0" / spec.name


def write_with_zarr(folder, values):
    zarr.open_array(str(folder), mode="r+")[:] = values


def write_with_tensorstore(folder, values):
    tensorstore = pytest.importorskip("tensorstore")
    location = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    tensorstore.open(location, open=True).result().write(values).result()


def read_with_zarr(folder):
    return zarr.open_array(str(folder), mode="r")[...]


def read_with_tensorstore(folder):
    tensorstore = pytest.importorskip("tensorstore")
    location = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return tensorstore.open(location, open=True, read=True).result().read().result()


def commit_as_found(store, spec, shard):
    """The record for a shard file that another library has written, made from the file alone."""
    rows_per_shard, rows = store.manifest.rows_per_shard, store.shard_rows("train", shard)
    data = (store.path / "train" / "view-0" / spec.shard_path(shard)).read_bytes()
    index = decode_index(data[-spec.index_bytes(rows_per_shard) :], spec.chunks_per_row)
    starts = np.sort(index[: len(rows), :, 0].reshape(-1)).astype(np.int64) + spec.chunk_bytes
    checksums = b"".join(data[start : start + CRC_BYTES] for start in starts)
    stored = StoredFile(spec, len(data), int.from_bytes(data[-CRC_BYTES:], "little"), crc32c(checksums))
    record = CommitRecord(
        split="train", view=0, shard=shard, first_row=rows.start, num_rows=len(rows), files=(stored,), failures=()
    )
    path = store.path / record.relative_path
    path.parent.mkdir(exist_ok=True)
    write_durably(path, record.encode())


@pytest.mark.parametrize("write", [write_with_zarr, write_with_tensorstore])
@EXAMPLES
@given(data=st.data(), drawn=arrays())
def test_shards_of_another_library_read_equal_here(write, data, drawn):
    spec, rows_per_shard, values = drawn
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as folder,
        new_store(folder, spec, rows_per_shard, len(values)) as store,
    ):
        write(array_folder(store, spec), values)
        for shard in range(store.num_shards("train")):
            commit_as_found(store, spec, shard)
        store.refresh()
        rows = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=7))
        np.testing.assert_array_equal(store.read("train", spec.name, rows), values[rows])
        if spec.by_frame:
            frames = data.draw(st.lists(st.integers(0, spec.shape[0] - 1), max_size=5))
            read = store.read("train", spec.name, rows, frames=frames)
            np.testing.assert_array_equal(read, values[rows][:, frames])


@pytest.mark.parametrize("read", [read_with_zarr, read_with_tensorstore])
@EXAMPLES
@given(data=st.data(), drawn=arrays())
def test_our_shards_read_equal_in_another_library(read, data, drawn):
    """Rows of shards that are not written, and of a video that failed, are fill values there, and no error."""
    spec, rows_per_shard, values = drawn
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as folder,
        new_store(folder, spec, rows_per_shard, len(values)) as store,
    ):
        written = data.draw(st.sets(st.integers(0, store.num_shards("train") - 1)))
        expected = np.full(values.shape, spec.fill_value, dtype=spec.dtype)
        for shard in written:
            with ShardWriter(store, "train", shard, [spec]) as writer:
                for row in store.shard_rows("train", shard):
                    writer.write(row, {spec.name: values[row]})
                    expected[row] = values[row]
        np.testing.assert_array_equal(read(array_folder(store, spec)), expected)


def test_a_shard_of_zarr_python_put_in_the_place_of_another_is_noticed(tmp_path):
    """It has no seal: all its checksums are looked at."""
    spec = ArraySpec(name="x", dims=("frame", "token"), shape=(4, 3), chunk=(1, 3), dtype="float32")
    store = new_store(tmp_path, spec, 2, 4)
    values = np.arange(48, dtype=np.float32).reshape(4, 4, 3)
    write_with_zarr(array_folder(store, spec), values)
    for shard in range(2):
        commit_as_found(store, spec, shard)
    first, second = (store.path / "train" / "view-0" / spec.shard_path(shard) for shard in range(2))
    store.refresh()
    np.testing.assert_array_equal(store.read("train", "x", [3, 0]), values[[3, 0]])
    first.write_bytes(second.read_bytes())
    store.refresh()
    with pytest.raises(OSError, match="x/c/0/0/0 holds other data than were committed"):
        store.read("train", "x", [0])
