"""Other Zarr libraries read our stores, and we read shards that zarr-python wrote."""

from dataclasses import replace

import numpy as np
import pytest
import zarr

from vcache.store.checksum import crc32c
from vcache.store.commits import CommitRecord, StoredFile
from vcache.store.files import write_durably
from vcache.store.layout import CRC_BYTES, decode_index
from vcache.store.reader import FeatureStore
from vcache.store.writer import declare_arrays

FAILED = 4


@pytest.fixture
def path(world, tmp_path):
    world.build(tmp_path / "s.zarr", failed=[FAILED])
    return tmp_path / "s.zarr"


def expected(world, spec):
    return np.stack([np.full(spec.shape, spec.fill_value, spec.dtype) if row == FAILED else world.value(spec, row)
                     for row in range(7)])  # fmt: skip


def test_zarr_python_reads_values_dimensions_and_attributes(world, path):
    group = zarr.open_group(str(path), mode="r")
    assert group.attrs["vcache"]["dataset"] == "toy"
    for spec in world.all:
        array = group[f"train/view-0/{spec.name}"]
        np.testing.assert_array_equal(array[:], expected(world, spec))
        assert array.metadata.dimension_names == ("video", *spec.dims)
        assert array.dtype == spec.dtype
    assert group["train/video_id"][2] == "vidéo-2"
    assert group["train/label"][:].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_zarr_python_lists_the_tree_without_a_warning(path):  # warnings are errors in this suite
    assert sorted(zarr.open_group(str(path), mode="r").keys()) == ["_commit", "train"]
    view = zarr.open_group(str(path / "train" / "view-0"), mode="r")
    assert sorted(view.keys()) == ["cls", "embed", "flip", "frame_index", "q", "tokens"]


def test_tensorstore_reads_every_array(world, path):
    tensorstore = pytest.importorskip("tensorstore")
    for spec in world.all:
        location = {"driver": "file", "path": str(path / "train" / "view-0" / spec.name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": location}, open=True, read=True).result()
        np.testing.assert_array_equal(array.read().result(), expected(world, spec))
        assert array.domain.labels == ("video", *spec.dims)


def test_xarray_shows_named_dimensions(world, path):
    xarray = pytest.importorskip("xarray")
    opened = xarray.open_zarr(str(path / "train" / "view-0" / "tokens"), consolidated=False, chunks=None)
    assert opened["8"].dims == ("video", "frame", "token", "channel")
    np.testing.assert_array_equal(opened["8"].isel(video=2).values, world.value(world.tokens, 2))
    view = xarray.open_zarr(str(path / "train" / "view-0"), consolidated=False, chunks=None)
    assert view["frame_index"].dims == ("video", "frame")
    table = xarray.open_zarr(str(path / "train"), consolidated=False, chunks=None)
    assert table["video_id"].values.tolist()[2] == "vidéo-2"


def test_a_store_that_zarr_python_filled_in_morton_order_reads_equal(world, tmp_path):
    store = world.create(tmp_path / "s.zarr")
    spec = replace(world.tokens, chunk=(1, 1, 6))  # 4 x 5 chunks in a row: Morton order is not C order here
    declare_arrays(store, "train", [spec])
    values = np.stack([world.value(spec, row) for row in range(7)])
    folder = tmp_path / "s.zarr" / "train" / "view-0" / spec.name
    zarr.open_array(str(folder), mode="r+")[:] = values
    for shard in range(3):
        commit_foreign_shard(store, spec, shard)
    store.refresh()
    np.testing.assert_array_equal(store.read("train", spec.name, [5, 0, 6, 5]), values[[5, 0, 6, 5]])
    np.testing.assert_array_equal(store.read("train", spec.name, [1], frames=[3, 1]), values[[1]][:, [3, 1]])
    index = decode_index((folder / "c/0/0/0/0").read_bytes()[-spec.index_bytes(3) :], spec.chunks_per_row)
    assert (np.diff(index[..., 0].astype(np.int64)) < 0).any(), "zarr-python wrote C order: nothing was tested here"


def commit_foreign_shard(store: FeatureStore, spec, shard):
    data = (store.path / "train" / "view-0" / spec.shard_path(shard)).read_bytes()
    record = CommitRecord(
        split="train",
        view=0,
        shard=shard,
        first_row=store.shard_rows("train", shard).start,
        num_rows=len(store.shard_rows("train", shard)),
        files=(StoredFile(spec, len(data), int.from_bytes(data[-CRC_BYTES:], "little"), checksums_crc32c(spec, data)),),
        failures=(),
    )
    path = store.path / record.relative_path
    path.parent.mkdir(exist_ok=True)
    write_durably(path, record.encode())


def checksums_crc32c(spec, data):
    """The CRC32C of the chunk checksums in file order; zarr-python leaves no gap between chunks."""
    step = spec.chunk_bytes + CRC_BYTES
    end = len(data) - spec.index_bytes(3)
    return crc32c(b"".join(data[at - CRC_BYTES : at] for at in range(step, end + 1, step)))
