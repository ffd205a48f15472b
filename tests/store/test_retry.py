"""Retrying failed rows: the store is then, byte for byte, one that was extracted from the videos as they are now."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrying import ROWS, Videos, built, retry, stats
from shim import Shim

from vcache.store.errors import CannotRecompute, RowNotCommitted
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import RowFailure, ShardWriter, add_videos, declare_arrays, sole_writer

STATES = st.tuples(st.sampled_from(["missing", "empty", "truncated"]), st.booleans())
BROKEN = st.dictionaries(st.integers(0, ROWS - 1), STATES)


def passes(world, first, second=None, later=None):
    """Two sets of arrays in view 0, one in view 1, made while the videos were as these say."""
    return [
        ([world.tokens, world.all[5]], 0, first),
        ([world.cls], 0, second or first),
        ([world.cls], 1, later or first),
    ]


def tree_of(world, path):
    return {name: data for name, data in world.tree(path).items() if not name.endswith(".tmp")}


@settings(max_examples=12, deadline=None)
@given(first=BROKEN, second=BROKEN, later=BROKEN, now=BROKEN, data=st.data())
def test_after_a_retry_the_tree_is_that_of_an_extraction_of_the_videos_as_they_are_now(
    world, tmp_path_factory, first, second, later, now, data
):
    # What is broken now was broken always: a video that breaks after its extraction keeps its features.
    first, second, later = (now | broken for broken in (first, second, later))
    now = {row: (data.draw(STATES)[0], False) for row in now}
    folder = tmp_path_factory.mktemp("retry")
    with Shim():  # without a fault; for its speed
        path = built(world, folder / "s", passes(world, *(Videos(world, broken) for broken in (first, second, later))))
        calm = built(world, folder / "calm", passes(world, videos := Videos(world, now)))
        summary = retry(path, videos)
    assert tree_of(world, path) == tree_of(world, calm)
    tried = [(0, row) for row in first.keys() | second.keys()] + [(1, row) for row in later]
    assert sorted((view, row) for view, row, _ in videos.read) == sorted(tried)  # each once
    assert (summary.tried, summary.stored) == (len(tried), len([row for _, row in tried if row not in now]))
    assert sorted(failure.row for failure in summary.failed) == sorted(2 * list(now))
    assert summary.left == []


def test_a_row_is_made_for_the_passes_that_it_failed_in_and_the_other_files_are_not_touched(world, tmp_path):
    path = built(
        world, tmp_path / "s", passes(world, Videos(world), Videos(world, {4: ("empty", False)}), Videos(world))
    )
    before = stats(path)
    summary = retry(path, videos := Videos(world))
    assert videos.read == [(0, 4, {"cls/8"})]
    assert (summary.stored, summary.shards) == (1, 1)
    changed = {name for name, stat in stats(path).items() if before[name] != stat}
    assert {name for name in changed if not name.startswith("_commit")} == {"train/view-0/cls/8/c/1/0/0"}
    assert len(changed) == 2


def test_a_store_without_failures_and_one_whose_videos_are_as_broken_as_before_stay_untouched(world, tmp_path):
    broken = {1: ("missing", False), 6: ("truncated", True)}
    for states in ({}, broken):
        path = built(world, tmp_path / str(len(states)), passes(world, Videos(world, states)))
        before = stats(path)
        summary = retry(path, Videos(world, states))
        assert stats(path) == before
        assert (summary.stored, summary.shards) == (0, 0)
        assert [failure.row for failure in summary.failed] == 2 * sorted(states)


def test_another_reason_replaces_the_record_alone(world, tmp_path):
    path = built(world, tmp_path / "s", passes(world, Videos(world, {1: ("missing", False)})))
    before = stats(path)
    summary = retry(path, Videos(world, {1: ("truncated", False)}))
    changed = {name for name, stat in stats(path).items() if before[name] != stat}
    assert len(changed) == 3
    assert all(name.startswith("_commit/") for name in changed)
    assert (summary.stored, summary.shards) == (0, 2)
    with FeatureStore.open(path) as store:
        assert [failure.reason for failure in store.failures("train")] == ["row 1 is truncated"]


def test_a_filled_row_reads_as_any_other_and_an_open_store_sees_it_after_a_refresh(world, tmp_path):
    path = built(world, tmp_path / "s", passes(world, Videos(world, {4: ("empty", False)})))
    with FeatureStore.open(path) as store:
        with pytest.raises(RowNotCommitted, match=r"failed \(empty: row 4 is empty\)"):
            store.read("train", "cls/8", [4])
        retry(path, Videos(world))
        store.refresh()
        np.testing.assert_array_equal(
            store.read("train", "cls/8", range(ROWS)), [world.value(world.cls, row) for row in range(ROWS)]
        )
        assert store.failures("train") == ()


def test_failures_of_later_parts_are_retried_and_named_by_their_rows_of_the_split(world, tmp_path):
    path = built(world, tmp_path / "s", [([world.cls], 0, Videos(world))])
    with FeatureStore.open(path) as store, sole_writer(path):
        table = world.videos(ROWS)
        more = type(table)(("more-0", "more-1"), ("0.mp4", "1.mp4"), table.labels[:2])
        part = add_videos(store, "train", more)
        declare_arrays(store, part, [world.cls])
        with ShardWriter(store, part, 0, [world.cls]) as writer:
            writer.fail(RowFailure(0, "more-0", "0.mp4", "empty", "0 bytes"))
            writer.fail(RowFailure(1, "more-1", "1.mp4", "empty", "0 bytes"))
    assert [failure.row for failure in retry(path, Videos(world, {1: ("missing", False)})).failed] == [8]
    with FeatureStore.open(path) as store:
        assert store.committed_rows("train", ["cls/8"]).tolist() == [True] * 8 + [False]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_damaged_file_is_left_and_named_and_the_other_shards_are_retried(world, tmp_path, swapped):
    """Also one that is sound and belongs to another shard."""
    path = built(world, tmp_path / "s", passes(world, Videos(world, {1: ("missing", False), 4: ("empty", False)})))
    damaged = path / "train" / "view-0" / world.tokens.shard_path(0)
    other = path / "train" / "view-0" / world.tokens.shard_path(1)
    damaged.write_bytes(other.read_bytes() if swapped else b"x" + damaged.read_bytes()[1:])
    before = world.tree(path)
    summary = retry(path, Videos(world))
    (message,) = summary.left
    assert "tokens/8/c/0/0/0/0 is damaged" in message
    assert "vcache repair" in message
    assert (summary.stored, summary.tried) == (3, 4)
    shard = {name: data for name, data in before.items() if name.startswith("train/view-0") and "/c/0" in name}
    assert shard.items() <= world.tree(path).items()


def test_features_that_are_not_finite_leave_the_shard_as_it_was(world, tmp_path):
    class Overflowing(Videos):
        def result(self, row, arrays):
            return {name: value * np.float16(np.inf) for name, value in super().result(row, arrays).items()}

    path = built(world, tmp_path / "s", [([world.cls], 0, Videos(world, {4: ("empty", False)}))])
    before = stats(path)
    assert "not finite" in retry(path, Overflowing(world)).left[0]
    assert stats(path) == before


def test_an_origin_that_cannot_give_the_same_features_changes_nothing(world, tmp_path):
    class Other:
        def recompute(self, *args):
            raise CannotRecompute("decoder.av: stored '18', now '19'")

    path = built(world, tmp_path / "s", passes(world, Videos(world, {4: ("empty", False)})))
    before = stats(path)
    with pytest.raises(CannotRecompute, match="now '19'"):
        retry(path, Other())
    assert stats(path) == before


@pytest.mark.parametrize("allowed", [False, True])
def test_a_video_that_is_broken_in_part_is_stored_where_that_is_allowed(world, tmp_path, allowed):
    path = built(world, tmp_path / "s", passes(world, Videos(world, {4: ("empty", False)})))
    now = Videos(world, {4: ("truncated", True)}, allow_partial=allowed)
    retry(path, now)
    assert tree_of(world, path) == tree_of(world, built(world, tmp_path / "calm", passes(world, now)))
    with FeatureStore.open(path) as store:
        assert [len(entries) for entries in (store.partial("train"), store.failures("train"))] == [allowed, not allowed]


@pytest.mark.parametrize("kind", [None, "truncated", "corrupt_frames", "gone"])
def test_a_partial_row_is_tried_only_if_asked_and_never_lost(world, tmp_path, kind):
    """Whole now, damaged as before, damaged in another way, gone."""
    then = Videos(world, {5: ("truncated", True)}, allow_partial=True)
    path = built(world, tmp_path / "s", passes(world, then))
    before = stats(path)
    states = {5: (kind, kind != "gone")} if kind else {}
    now = Videos(world, states, allow_partial=True)
    assert retry(path, now).tried == 0
    assert stats(path) == before
    summary = retry(path, now, retry_partial=True)
    assert (summary.tried, summary.failed) == (2, [])
    calm = built(world, tmp_path / "calm", passes(world, then if kind == "gone" else now))
    assert tree_of(world, path) == tree_of(world, calm)
    assert (stats(path) == before) == (kind in ("truncated", "gone"))


def test_progress_is_reported_in_rows(world, tmp_path):
    path = built(world, tmp_path / "s", passes(world, Videos(world, {1: ("missing", False), 4: ("empty", False)})))
    reports = []
    retry(path, Videos(world), report=lambda done, total: reports.append((done, total)))
    assert reports == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    with FeatureStore.open(path) as store:
        assert verify_store(store).ok
