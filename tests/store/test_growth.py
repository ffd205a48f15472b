"""A store grows in every way without a stored byte being touched, and a grown split reads as one list of videos."""

import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from growing import X, drawn, fill, grown_store, state, table
from hypothesis import given, settings
from hypothesis import strategies as st
from shim import Shim

from vcache.store.errors import ArrayNotFound, CorruptStore, RowNotCommitted, SplitNotFound, StoreExists
from vcache.store.layout import ArraySpec
from vcache.store.parts import group_parts
from vcache.store.reader import FeatureStore
from vcache.store.tables import write_table
from vcache.store.verify import verify_store
from vcache.store.writer import add_split, add_videos, declare_arrays

OTHER_LAYER = replace(X, name="tokens/9")
QUERIES, KEYS = (
    ArraySpec(
        name=f"{kind}/9",
        dims=("frame", "head", "token", "dim"),
        shape=(4, 2, 5, 3),
        chunk=(1, 2, 5, 3),
        dtype="float16",
    )
    for kind in "qk"
)
MAPS = ArraySpec(
    name="maps/8", dims=("pair", "side", "query", "key"), shape=(3, 2, 4, 4), chunk=(1, 2, 4, 4), dtype="float16"
)
PIXELS = ArraySpec(
    name="pixels", dims=("frame", "height", "width", "channel"), shape=(4, 6, 5, 3), chunk=(1, 6, 5, 3), dtype="uint8"
)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_grown_split_reads_as_the_concatenation_of_its_parts(data, sizes):
    rows = data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=12))
    frames = data.draw(st.lists(st.integers(0, 2), max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        with Shim():  # without a fault; for its speed
            store, values = grown_store(Path(folder, "s"), sizes)
        with store:
            np.testing.assert_array_equal(store.read("train", X.name, rows), values[rows])
            out = np.zeros((len(rows), len(frames), 2), dtype=np.int32)
            assert store.read("train", X.name, rows, frames=frames, out=out) is out
            np.testing.assert_array_equal(out, values[rows][:, frames])
            assert store.splits == {"train": sum(sizes)}
            assert store.parts("train") == ("train", "train+1", "train+2", "train+3")[: len(sizes)]
            names = [f"{'abcdef'[part]}-{row}" for part, size in enumerate(sizes) for row in range(size)]
            assert store.videos("train").ids == tuple(names)
            assert store.videos("train").labels.tolist() == [int(name[2:]) % 2 for name in names]


def test_failures_and_committed_rows_count_the_rows_of_the_split(tmp_path):
    store, values = grown_store(tmp_path / "s", [3, 2, 4], failed={(0, 1), (1, 0), (2, 3)})
    assert [(failure.row, failure.video_id) for failure in store.failures("train")] == [
        (1, "a-1"),
        (3, "b-0"),
        (8, "c-3"),
    ]
    assert np.flatnonzero(~store.committed_rows("train", [X.name])).tolist() == [1, 3, 8]
    readable = np.flatnonzero(store.committed_rows("train", [X.name]))
    np.testing.assert_array_equal(store.read("train", X.name, readable), values[readable])
    untouched = np.full((2, *X.shape), -7, dtype=np.int32)
    with pytest.raises(RowNotCommitted, match=r"'b-0' \(row 0 of train\+1/view-0\): its extraction failed \(empty"):
        store.read("train", X.name, [0, 3], out=untouched)
    assert (untouched == -7).all()
    with pytest.raises(IndexError, match="row 9 of 'train': there are rows 0 to 8"):
        store.read("train", X.name, [9])
    with pytest.raises(ValueError, match="there are frames 0 to 2"):
        store.read("train", X.name, [], frames=[3])


def test_an_array_of_one_part_only_is_not_committed_in_the_others(tmp_path):
    store, _ = grown_store(tmp_path / "s", [3, 2])
    values = drawn([OTHER_LAYER], 2)
    fill(store, "train+1", [OTHER_LAYER], values)
    assert set(store.arrays("train")) == {X.name}
    assert store.committed_rows("train", ["tokens/9"]).tolist() == [False, False, False, True, True]
    np.testing.assert_array_equal(store.read("train", "tokens/9", [4, 3]), values["tokens/9"][[1, 0]])
    with pytest.raises(RowNotCommitted, match=r"'a-2' \(row 2 of train/view-0\): it is not extracted yet"):
        store.read("train", "tokens/9", [4, 2])
    with pytest.raises(ArrayNotFound, match="no array 'tokens/7'"):
        store.read("train", "tokens/7", [4, 2])
    with pytest.raises(ArrayNotFound, match="no array 'tokens/7'"):
        store.committed_rows("train", ["tokens/7"])
    with pytest.raises(ValueError, match=r"group/x of train/view-0 is declared as .*int32.*, not .*float32"):
        declare_arrays(store, "train+1", [replace(X, dtype="float32")])


def test_a_split_has_the_views_that_all_its_parts_have(tmp_path):
    store, _ = grown_store(tmp_path / "s", [3, 2])
    fill(store, "train+1", [X], drawn([X], 2), view=1)
    assert store.views("train") == (0,)
    fill(store, "train", [X], drawn([X], 3), view=1)
    assert store.views("train") == (0, 1)


KINDS = {
    "layers": (lambda store: "train", [OTHER_LAYER], 0),
    "queries and keys": (lambda store: "train", [QUERIES, KEYS], 0),
    "maps": (lambda store: "train", [MAPS], 0),
    "pixels": (lambda store: "train", [PIXELS], 0),
    "a view": (lambda store: "train", [X], 1),
    "videos": (lambda store: add_videos(store, "train", table("new", 5)), [X], 0),
    "a split": (lambda store: add_split(store, "val", table("new", 3)) or "val", [X], 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_growing_touches_no_stored_file_and_readers_go_on(kind, tmp_path):
    """One reader reads all the time; another is open from before, sees what it saw, and the new after `refresh`."""
    make_part, specs, view = KINDS[kind]
    writer, old = grown_store(tmp_path / "s", [5])
    before, manifest = state(tmp_path / "s"), (tmp_path / "s" / "zarr.json").read_bytes()
    done, wrong = threading.Event(), []

    def read_on():
        with FeatureStore.open(tmp_path / "s") as store:
            while not done.is_set():
                store.refresh()
                if not np.array_equal(store.read("train", X.name, range(5)), old):
                    wrong.append("other values")

    reading = threading.Thread(target=read_on)
    with FeatureStore.open(tmp_path / "s") as reader:
        seen = reader.splits, reader.views("train"), reader.arrays("train").keys()
        reading.start()
        part = make_part(writer)
        values = drawn(specs, writer.manifest.splits[part], seed=9)
        fill(writer, part, specs, values, view=view)
        done.set()
        reading.join()
        np.testing.assert_array_equal(reader.read("train", X.name, [4, 0]), old[[4, 0]])
        assert (reader.splits, reader.arrays("train").keys()) == (seen[0], seen[2])
        reader.refresh()
        assert (reader.splits, reader.views("train"), reader.arrays("train").keys()) != seen or kind == "a split"
        split, start = ("val", 0) if kind == "a split" else ("train", 5 if kind == "videos" else 0)
        for spec in specs:
            new = np.arange(len(values[spec.name]))
            read = reader.read(split, spec.name, start + new, view=view)
            np.testing.assert_array_equal(read, values[spec.name])
            if spec.by_frame:
                some = reader.read(split, spec.name, start + new, view=view, frames=[2, 0])
                np.testing.assert_array_equal(some, values[spec.name][:, [2, 0]])
        assert verify_store(reader).ok
    after = state(tmp_path / "s")
    assert wrong == []
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    grows_manifest = kind in ("videos", "a split")
    assert ((tmp_path / "s" / "zarr.json").read_bytes() != manifest) == grows_manifest


def test_a_part_is_not_there_until_the_manifest_names_it(tmp_path, monkeypatch):
    store, values = grown_store(tmp_path / "s", [3])
    with monkeypatch.context() as killed:
        killed.setattr("vcache.store.writer.write_manifest", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            add_videos(store, "train", table("b", 4))
    assert (tmp_path / "s" / "train+1").is_dir()
    with FeatureStore.open(tmp_path / "s") as reader:
        assert reader.splits == {"train": 3}
        np.testing.assert_array_equal(reader.read("train", X.name, [2, 1]), values[[2, 1]])
    assert add_videos(store, "train", table("b", 2)) == "train+1"
    assert store.videos("train").ids == ("a-0", "a-1", "a-2", "b-0", "b-1")


def test_videos_of_a_split_are_unique_over_its_parts(tmp_path):
    store, _ = grown_store(tmp_path / "s", [3, 2])
    before = state(tmp_path / "s")
    with pytest.raises(StoreExists, match="split 'train' of .* already has video 'b-0'"):
        add_videos(store, "train", table("b", 1))
    with pytest.raises(SplitNotFound, match="no split 'val'"):
        add_videos(store, "val", table("b", 1))
    assert state(tmp_path / "s") == before


def test_splits_and_parts_are_not_taken_for_each_other(tmp_path):
    store, _ = grown_store(tmp_path / "s", [3, 2])
    for ask in (store.videos, store.arrays, store.parts, store.failures, lambda part: store.read(part, X.name, [0])):
        with pytest.raises(SplitNotFound, match=r"'train\+1' in .* is no split but one of the parts of 'train'"):
            ask("train+1")
    assert store.part_videos("train+1").ids == ("b-0", "b-1")
    assert (store.num_shards("train"), store.num_shards("train+1")) == (2, 1)
    for name in ("val+1", "a+b", "train+2"):
        with pytest.raises(ValueError, match="split name"):
            add_split(store, name, table("b", 1))


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train+1": 2}, r"part 'train\+1' of split 'train' is listed where 'train' is next"),
        ({"train": 2, "train+2": 1}, r"'train\+2' of split 'train' is listed where 'train\+1' is next"),
        ({"train": 2, "train+01": 1}, r"'train\+01' .* where 'train\+1' is next"),
        ({"train": 2, "train+1": 0}, r"'train\+1' has 0 videos"),
        ({"+1": 2}, "split name ''"),
    ],
)
def test_a_manifest_with_a_part_out_of_place_is_refused(world, splits, words):
    with pytest.raises(ValueError, match=words):
        replace(world.manifest(), splits=splits)


def test_splits_keep_their_order_when_the_first_one_grows():
    groups = group_parts({"val": 2, "train": 5, "val+1": 3})
    assert {name: (parts.names, parts.starts, parts.num_rows) for name, parts in groups.items()} == {
        "val": (("val", "val+1"), (0, 2), 5),
        "train": (("train",), (0,), 5),
    }


def test_verify_checks_every_part(tmp_path):
    store, _ = grown_store(tmp_path / "s", [3, 4])
    sound = verify_store(store)
    assert (sound.ok, sound.notes, sound.num_shards, sound.num_rows) == (True, (), 4, 7)
    shard = tmp_path / "s" / "train+1" / "view-0" / X.shard_path(1)
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    (finding,) = verify_store(store).findings
    assert (finding.kind, finding.split, finding.shard, finding.rows) == ("chunk", "train+1", 1, (2,))
    assert finding.video_ids == ("b-2",)
    with pytest.raises(CorruptStore, match=r"row 2 of train\+1/group/x \(video 'b-2'\)"):
        store.read("train", X.name, [0, 5])


def test_two_parts_with_one_video_are_damage(tmp_path):
    store, _ = grown_store(tmp_path / "s", [3, 2])
    exchange_table(tmp_path / "s" / "train+1", table("a", 2))
    (finding,) = verify_store(store).findings
    assert (finding.kind, finding.split) == ("table", "train+1")
    store.refresh()
    with pytest.raises(CorruptStore, match="parts of split 'train' .* clash: video id 'a-0' is there twice"):
        store.videos("train")


def exchange_table(part, table):
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder, "t"), table)
        for file in (file for file in Path(folder, "t").rglob("*") if file.is_file()):
            (part / file.relative_to(Path(folder, "t"))).write_bytes(file.read_bytes())


def test_other_zarr_libraries_open_a_grown_store(tmp_path):
    xarray, tensorstore = pytest.importorskip("xarray"), pytest.importorskip("tensorstore")
    store, values = grown_store(tmp_path / "s", [3, 4])
    group = zarr.open_group(str(tmp_path / "s"), mode="r")
    assert sorted(group.keys()) == ["_commit", "train", "train+1"]
    arrays = [group[f"{part}/view-0/group/x"] for part in store.parts("train")]
    np.testing.assert_array_equal(np.concatenate([array[:] for array in arrays]), values)
    opened = [
        xarray.open_zarr(str(tmp_path / "s" / part / "view-0" / "group"), consolidated=False, chunks=None)
        for part in store.parts("train")
    ]
    np.testing.assert_array_equal(xarray.concat(opened, dim="video")["x"].values, values)
    location = {"driver": "file", "path": str(tmp_path / "s" / "train+1" / "view-0" / "group" / "x")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": location}, open=True, read=True).result()
    np.testing.assert_array_equal(array.read().result(), values[3:])
