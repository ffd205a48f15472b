"""The writer refuses what would leave a hole, a rewrite or a silent NaN in a store."""

from dataclasses import replace

import numpy as np
import pytest

from vcache.store.errors import ArrayNotFound, StoreExists
from vcache.store.manifest import VideoTable
from vcache.store.writer import RowFailure, ShardWriter, create_store, declare_arrays


@pytest.fixture
def store(world, tmp_path):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", [world.tokens, world.cls])
    return store


def row_of(world, row, **changes):
    arrays = {spec.name: world.value(spec, row) for spec in (world.tokens, world.cls)}
    return arrays | {name.replace("_", "/"): array for name, array in changes.items()}


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        (1, {}, "row 1 came where row 0 is next: each of rows 0 to 2 of shard 0"),
        (3, {}, "row 3 came where row 0 is next"),
        (
            0,
            {"cls_8": np.zeros((4, 5), np.float16)},
            r"cls/8 of row 0 must be float16 of shape \(4, 6\), got .* \(4, 5\)",
        ),
        (0, {"cls_8": np.zeros((4, 6), np.float32)}, "must be float16 of shape .*, got float32"),
        (0, {"cls_8": np.zeros((4, 6), ">f2")}, "must be float16 of shape .*, got >f2"),
        (0, {"q_8": np.zeros(1)}, r"missing \[\], not declared here \['q/8'\]"),
        (0, {"cls_8": np.full((4, 6), np.inf, np.float16)}, r"cls/8 of row 0 holds 24 values that are not finite.*inf"),
        (0, {"tokens_8": np.full((4, 5, 6), np.nan, np.float16)}, r"tokens/8 of row 0 holds 120 .* nan at \(0, 0, 0\)"),
    ],
)
def test_a_wrong_row_is_refused_and_nothing_of_it_is_kept(world, store, row, changes, words):
    with ShardWriter(store, "train", 0, [world.tokens, world.cls]) as writer:
        with pytest.raises(ValueError, match=words):
            writer.write(row, row_of(world, row, **changes))
        for good in range(3):
            writer.write(good, row_of(world, good))
    np.testing.assert_array_equal(store.read("train", "cls/8", [0, 2])[1], world.value(world.cls, 2))


def test_an_array_that_is_missing_from_a_row_is_refused(world, store):
    with (
        pytest.raises(ValueError, match=r"missing \['cls/8'\], not declared here \[\]"),
        ShardWriter(store, "train", 0, [world.tokens, world.cls]) as writer,
    ):
        writer.write(0, {"tokens/8": world.value(world.tokens, 0)})
    assert store.committed_arrays("train", 0) == frozenset()


def test_a_row_is_written_or_failed_once(world, store):
    failure = RowFailure(0, "vidéo-0", "folder/vidéo-0.mp4", "missing", "no such file")
    with (
        pytest.raises(ValueError, match="row 0 came where row 1 is next"),
        ShardWriter(store, "train", 0, [world.cls]) as writer,
    ):
        writer.fail(failure)
        writer.write(0, {"cls/8": world.value(world.cls, 0)})


def test_a_shard_with_a_row_too_few_is_not_committed(world, store):
    with (
        pytest.raises(ValueError, match="rows 0 to 2, but row 2 was neither written nor failed; nothing"),
        ShardWriter(store, "train", 0, [world.cls]) as writer,
    ):
        for row in range(2):
            writer.write(row, {"cls/8": world.value(world.cls, row)})
    assert store.committed_arrays("train", 0) == frozenset()
    assert not list(store.path.rglob("*.tmp"))


def test_an_exception_in_the_block_commits_nothing(world, store):
    with pytest.raises(KeyboardInterrupt), ShardWriter(store, "train", 0, [world.cls]) as writer:
        writer.write(0, {"cls/8": world.value(world.cls, 0)})
        raise KeyboardInterrupt
    assert not list(store.path.rglob("*.tmp"))
    assert not list(store.path.glob("_commit/*/"))


def test_a_stored_array_is_never_written_again(world, store):
    world.fill(store, [world.tokens], shards=[0])
    with (
        pytest.raises(StoreExists, match="already holds tokens/8; stored features are never written again"),
        ShardWriter(store, "train", 0, [world.tokens, world.cls]),
    ):
        pass
    world.fill(store, [world.cls], shards=[0])


def test_a_writer_outside_of_a_with_statement_is_refused(world, store):
    with pytest.raises(ValueError, match="used in a with statement"):
        ShardWriter(store, "train", 0, [world.cls]).write(0, {})


def test_only_declared_arrays_are_written(world, store):
    with pytest.raises(ArrayNotFound, match="call declare_arrays first"):
        ShardWriter(store, "train", 0, [replace(world.cls, name="cls/9")])
    with pytest.raises(ArrayNotFound, match="is not declared"):
        ShardWriter(store, "train", 0, [replace(world.cls, dtype="float32")])
    with pytest.raises(ValueError, match="at least one array"):
        ShardWriter(store, "train", 0, [])


def test_declaring_again_changes_nothing_and_declaring_otherwise_is_refused(world, store):
    before = world.tree(store.path)
    declare_arrays(store, "train", [world.cls])
    assert world.tree(store.path) == before
    with pytest.raises(ValueError, match="cls/8 of train/view-0 is declared as .*float16.*, not .*float32"):
        declare_arrays(store, "train", [replace(world.cls, dtype="float32")])
    assert world.tree(store.path) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../cls"}, "array name"),
        ({"name": "cls/c"}, "not 'c'"),
        ({"dtype": "complex64"}, "dtype .complex64. is not one of int8"),
        ({"chunk": (3, 6)}, "must divide shape"),
        ({"chunk": (2, 3)}, "not one contiguous run"),
        ({"chunk": (4,)}, "differ in length"),
        ({"shape": (0, 6), "chunk": (1, 6)}, "at least 1"),
    ],
)
def test_an_array_that_cannot_be_laid_out_is_refused(world, changes, words):
    with pytest.raises(ValueError, match=words):
        replace(world.cls, **changes)


def test_a_table_of_videos_must_be_consistent(world, tmp_path):
    labels = np.zeros(2, dtype=np.int64)
    with pytest.raises(ValueError, match="got 2, 1 and labels of shape"):
        VideoTable(("a", "b"), ("a",), labels)
    with pytest.raises(ValueError, match="labels must be int64, got float64"):
        VideoTable(("a", "b"), ("a", "b"), labels.astype(float))
    with pytest.raises(ValueError, match="video id 'a' is there twice"):
        VideoTable(("a", "a"), ("a", "b"), labels)
    with pytest.raises(ValueError, match=r"has splits \{'train': 7\}, the video tables have \{'train': 2\}"):
        create_store(tmp_path / "t.zarr", world.manifest(), {"train": world.videos(2)})


@pytest.mark.parametrize("name", ["_commit", "", "a/b", ".x"])
def test_a_split_cannot_have_the_name_of_something_else(world, name):
    with pytest.raises(ValueError, match="split name"):
        replace(world.manifest(), splits={name: 7})


def test_an_empty_split_is_refused(world):
    with pytest.raises(ValueError, match="split 'val' has 0 videos"):
        replace(world.manifest(), splits={"val": 0})
