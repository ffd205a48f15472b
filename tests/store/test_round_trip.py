"""What was written is read back, whatever the shape, the rows and the frames."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.store.errors import ArrayNotFound, SplitNotFound, StoreExists, StoreNotFound
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, add_split, create_store, declare_arrays


@st.composite
def array_specs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    first_long = draw(st.integers(0, len(shape)))
    chunk = [1] * len(shape)
    chunk[first_long:] = shape[first_long:]
    if first_long < len(shape):
        divisors = [part for part in range(1, shape[first_long] + 1) if shape[first_long] % part == 0]
        chunk[first_long] = draw(st.sampled_from(divisors))
    dims = ("frame", "token", "channel", "dim")[: len(shape)]
    dtype = draw(st.sampled_from(["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "uint16"]))
    return ArraySpec(name="group/array", dims=dims, shape=shape, chunk=tuple(chunk), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), spec=array_specs(), num_rows=st.integers(1, 7), rows_per_shard=st.integers(1, 4))
def test_any_rows_and_frames_of_any_array_come_back_as_written(data, spec, num_rows, rows_per_shard):
    values = np.random.default_rng(0).integers(0, 100, size=(num_rows, *spec.shape)).astype(spec.dtype)
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=9))
    with tempfile.TemporaryDirectory() as folder, _store(Path(folder, "s"), num_rows, rows_per_shard) as store:
        declare_arrays(store, "train", [spec])
        for shard in range(store.num_shards("train")):
            with ShardWriter(store, "train", shard, [spec]) as writer:
                for row in store.shard_rows("train", shard):
                    writer.write(row, {spec.name: values[row]})
        read = store.read("train", spec.name, rows)
        np.testing.assert_array_equal(read, values[rows])
        assert read.dtype == spec.dtype
        if spec.by_frame:
            frames = data.draw(st.lists(st.integers(0, spec.shape[0] - 1), max_size=6))
            out = np.zeros((len(rows), len(frames), *spec.shape[1:]), dtype=spec.dtype)
            assert store.read("train", spec.name, rows, frames=frames, out=out) is out
            np.testing.assert_array_equal(out, values[rows][:, frames])
        assert store.committed_rows("train", [spec.name]).all()


def _store(path, num_rows, rows_per_shard):
    table = VideoTable(*[tuple(map(str, range(num_rows)))] * 2, np.zeros(num_rows, dtype=np.int64))
    manifest = Manifest(
        key="0" * 16,
        spec={},
        dataset="toy",
        class_names=("a",),
        rows_per_shard=rows_per_shard,
        splits={"train": num_rows},
    )
    create_store(path, manifest, {"train": table})
    return FeatureStore.open(path, num_threads=2)


def test_a_store_says_what_is_in_it(world, tmp_path):
    store = world.build(tmp_path / "s.zarr", failed=[4])
    assert store.manifest == world.manifest()
    assert store.arrays("train") == {spec.name: spec for spec in world.all}
    assert store.num_shards("train") == 3
    assert [store.shard_rows("train", shard) for shard in range(3)] == [range(3), range(3, 6), range(6, 7)]
    assert store.committed_arrays("train", 2) == {spec.name for spec in world.all}
    assert store.committed_rows("train", ["tokens/8", "cls/8"]).tolist() == [row != 4 for row in range(7)]
    assert [(failure.row, failure.kind) for failure in store.failures("train")] == [(4, "truncated")]
    table = store.videos("train")
    assert table.ids[2] == "vidéo-2"
    assert table.paths[2] == "folder/vidéo-2.mp4"
    assert table.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert store.views("train") == (0,)
    files = world.tree(tmp_path / "s.zarr" / "train" / "view-0")
    assert store.size_bytes() == sum(len(data) for name, data in files.items() if not name.endswith("zarr.json"))


def test_a_batch_shared_among_threads_is_the_batch_read_by_one(tmp_path, monkeypatch, world):
    monkeypatch.setattr("vcache.store.row_reader.MIN_BYTES_PER_THREAD", 1)
    world.build(tmp_path / "s.zarr")
    rows = [6, 0, 3, 3, 5, 1]
    with FeatureStore.open(tmp_path / "s.zarr", num_threads=3) as store:
        for spec in world.all:
            expected = np.stack([world.value(spec, row) for row in rows])
            np.testing.assert_array_equal(store.read("train", spec.name, rows), expected)


def test_a_small_limit_of_open_files_changes_nothing(tmp_path, monkeypatch, world):
    monkeypatch.setattr("vcache.store.reader.MAX_OPEN_FILES", 1)
    monkeypatch.setattr("vcache.store.row_reader.MIN_BYTES_PER_THREAD", 1)
    world.build(tmp_path / "s.zarr")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with FeatureStore.open(tmp_path / "s.zarr", num_threads=3) as store:
        rows = [*range(7)] * 20
        expected = np.stack([world.value(world.tokens, row) for row in rows])
        np.testing.assert_array_equal(store.read("train", "tokens/8", rows), expected)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_chunks_smaller_than_a_frame_can_be_read_by_frame(world, tmp_path):
    spec = ArraySpec(name="x", dims=("frame", "token"), shape=(4, 6), chunk=(1, 2), dtype="int32")
    store = world.fill(world.create(tmp_path / "s.zarr"), [spec])
    expected = np.stack([world.value(spec, row)[[3, 0, 3]] for row in (5, 2)])
    np.testing.assert_array_equal(store.read("train", "x", [5, 2], frames=[3, 0, 3]), expected)


def test_views_are_apart(world, tmp_path):
    store = world.fill(world.create(tmp_path / "s.zarr"), [world.tokens])
    world.fill(store, [world.cls], shards=[1], view=10)
    assert store.views("train") == (0, 10)
    assert set(store.arrays("train", view=10)) == {"cls/8"}
    assert store.committed_arrays("train", 1, view=10) == {"cls/8"}
    np.testing.assert_array_equal(store.read("train", "cls/8", [4], view=10)[0], world.value(world.cls, 4))


def test_a_split_added_later_is_as_good_as_the_first(world, tmp_path):
    store = world.build(tmp_path / "s.zarr")
    before = world.tree(tmp_path / "s.zarr")
    add_split(store, "val", world.videos(2))
    assert store.manifest.splits == {"train": 7, "val": 2}
    assert store.videos("val").ids == ("vidéo-0", "vidéo-1")
    after = world.tree(tmp_path / "s.zarr")
    assert {name for name in before if before[name] != after[name]} == {"zarr.json"}
    with pytest.raises(StoreExists, match="already has a split 'val' of 2 videos"):
        add_split(store, "val", world.videos(2))


def test_an_existing_path_is_never_written_over(world, tmp_path):
    (tmp_path / "s.zarr").mkdir()
    with pytest.raises(StoreExists, match=r"s\.zarr already"):
        world.create(tmp_path / "s.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_names_that_are_not_there_are_answered_with_those_that_are(world, tmp_path):
    with pytest.raises(StoreNotFound, match="no store at"):
        FeatureStore.open(tmp_path / "s.zarr")
    store = world.build(tmp_path / "s.zarr")
    with pytest.raises(ArrayNotFound) as caught:
        store.read("train", "tokens/9", [0])
    assert str(caught.value).startswith("no array 'tokens/9' in train/view-0 of ")
    assert str(caught.value).endswith("there are: cls/8, embed, flip, frame_index, q/8, tokens/8")
    with pytest.raises(SplitNotFound, match="no split 'test' in .*; there are: train"):
        store.videos("test")
    with pytest.raises(IndexError, match="there are shards 0 to 2"):
        store.shard_rows("train", 3)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"rows": [7]}, IndexError, "row 7 of 'train': there are rows 0 to 6"),
        ({"rows": [-1]}, IndexError, "row -1 "),
        ({"rows": [[1]]}, ValueError, "rows must be a list of integers"),
        ({"rows": [0.5]}, ValueError, "rows must be a list of integers"),
        ({"rows": [1], "frames": [4]}, ValueError, "there are frames 0 to 3"),
        ({"rows": [1], "frames": [-1]}, ValueError, "there are frames 0 to 3"),
        ({"rows": [1], "frames": [0], "name": "cls/8"}, ValueError, "not by frame"),
        ({"rows": [1], "out": np.zeros((1, 4, 5, 6))}, ValueError, "out must be float16 of shape"),
        ({"rows": [1], "out": np.zeros((2, 4, 5, 6), np.float16)[::2]}, None, ""),
        ({"rows": [1, 2], "out": np.zeros((4, 4, 5, 6), np.float16)[::2]}, ValueError, "C-contiguous"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(world, tmp_path, request_, error, words):
    store = world.build(tmp_path / "s.zarr")
    arguments = {"name": "tokens/8", **request_}
    if error is None:
        store.read("train", **arguments)
        return
    with pytest.raises(error, match=words):
        store.read("train", **arguments)


def test_no_row_is_no_read(world, tmp_path):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", [world.tokens])
    assert store.read("train", "tokens/8", []).shape == (0, 4, 5, 6)


def test_sizes_are_those_of_the_shape():
    spec = ArraySpec(name="q/1", dims=("frame", "token"), shape=(8, 6), chunk=(1, 3), dtype="float32")
    assert (spec.row_bytes, spec.chunk_bytes, spec.chunks_per_row) == (8 * 6 * 4, 12, 16)
    assert math.isnan(spec.fill_value)
