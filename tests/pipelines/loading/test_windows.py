"""Shuffling by shards: how random it is, that it reads shard by shard, and that nothing else is changed by it."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import labelled_store
from viewed import fill_view, viewed_store

from vcache.pipelines.loading.epoch_order import EpochOrder, OrderError
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.loading.shuffle_choice import choose_shuffle
from vcache.pipelines.loading.windows import shard_numbers
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.errors import CorruptStore
from vcache.store.manifest import VideoTable
from vcache.store.object_path import ObjectPath
from vcache.store.reader import FeatureStore
from vcache.store.writer import add_videos

PLAN = ReadPlan(tokens={-1: 2}, cls={-1: 2}, maps={}, embed=False)
CLS_PLAN = ReadPlan(tokens={}, cls={-1: 2}, maps={}, embed=False)
CPU = torch.device("cpu")

# A split sorted by class, 40 classes of 100 videos in shards of 25, of which 20 are in memory.
ROWS, PER_CLASS, PER_SHARD, BUFFER, BATCH = 4000, 100, 25, 500, 32
SORTED = np.arange(ROWS) // PER_CLASS
SHARDS = np.arange(ROWS) // PER_SHARD


def by_shards(epoch: int, seed: int = 0) -> np.ndarray:
    return EpochOrder(seed, shuffle="shards", buffer_clips=BUFFER).order(epoch, np.arange(ROWS), shards=SHARDS)


def in_full(epoch: int, seed: int = 0) -> np.ndarray:
    return EpochOrder(seed).order(epoch, np.arange(ROWS))


def classes_per_batch(order: np.ndarray) -> float:
    batches = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    return float(np.mean([len(np.unique(SORTED[batch])) for batch in batches]))


def loader(store: FeatureStore, plan: ReadPlan = PLAN, **options: Any) -> ClipLoader:
    made = {"batch_size": 5, "device": CPU, "order": EpochOrder(2, shuffle="shards", buffer_clips=6), **options}
    return ClipLoader(store, "train", plan, **made)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), max_size=20),
    buffer_clips=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**5),
)
def test_windows_have_each_row_once_and_whole_shards(
    sizes: list[int], buffer_clips: int, seed: int, epoch: int
) -> None:
    shards = np.repeat(np.arange(len(sizes)), sizes)
    rows = 7 * np.arange(len(shards))
    order = EpochOrder(seed, shuffle="shards", buffer_clips=buffer_clips)
    windows = order.windows(epoch, rows, shards)
    np.testing.assert_array_equal(order.order(epoch, rows, shards=shards), np.concatenate([rows[:0], *windows]))
    assert sorted(row for window in windows for row in window) == rows.tolist()
    of_windows = [{*shards[window // 7].tolist()} for window in windows]
    assert sum(map(len, of_windows)) == len(sizes)  # no shard lies in two
    assert max(map(len, of_windows), default=0) - min(map(len, of_windows), default=0) <= 1


def test_batches_of_a_sorted_split_have_nearly_as_many_classes_as_with_full_shuffling() -> None:
    """Drawn from 20 shards at a time: 32 clips have 14 classes where a full shuffle gives them 22, and unshuffled rows 1."""
    shards = np.mean([classes_per_batch(by_shards(epoch)) for epoch in range(5)])
    full = np.mean([classes_per_batch(in_full(epoch)) for epoch in range(5)])
    assert 21.5 < full < 23
    assert 13.5 < shards < 15
    assert classes_per_batch(np.arange(ROWS)) < 1.5


def test_two_clips_of_a_batch_are_of_one_shard_as_often_as_the_shards_in_memory_say() -> None:
    """(25 - 1) / (500 - 1) of the pairs, 4.8%; of a full shuffle (25 - 1) / (4000 - 1), 0.6%."""

    def same(order: np.ndarray) -> float:
        batches = SHARDS[order[: ROWS // BATCH * BATCH].reshape(-1, BATCH)]
        pairs = (batches[:, :, None] == batches[:, None, :]).sum(axis=(1, 2)) - BATCH
        return float(pairs.mean() / (BATCH * (BATCH - 1)))

    assert np.mean([same(by_shards(epoch)) for epoch in range(10)]) == pytest.approx(24 / 499, rel=0.05)
    assert np.mean([same(in_full(epoch)) for epoch in range(10)]) == pytest.approx(24 / 3999, rel=0.1)


def test_rows_move_as_far_as_with_full_shuffling() -> None:
    """On average by a third of the split, which is the mean distance of two random places."""
    for order in (by_shards, in_full):
        moved = [np.abs(order(epoch) - np.arange(ROWS)).mean() / ROWS for epoch in range(20)]
        assert np.mean(moved) == pytest.approx(1 / 3, abs=0.02)


def test_no_two_epochs_are_alike() -> None:
    """Neither the order of the rows nor which of them are in memory together."""
    orders = [by_shards(epoch) for epoch in range(12)]
    assert len({order.tobytes() for order in [*orders, by_shards(0, seed=1)]}) == 13
    np.testing.assert_array_equal(by_shards(3), orders[3])
    places = np.stack([np.argsort(order) for order in orders])
    correlations = np.corrcoef(places)[np.triu_indices(12, 1)]
    assert abs(correlations).max() < 0.35  # of 160 shards in random order: 1 / sqrt(160) = 0.08 is the deviation
    windows = [np.sort(order.reshape(-1, BUFFER), axis=1) for order in orders]
    assert all(len(np.intersect1d(windows[0][0], other[0])) < 200 for other in windows[1:])  # 63 expected of 500


def test_the_order_is_that_of_rows_and_shards_alone(views_store: Path) -> None:
    with FeatureStore.open(views_store) as store:
        expected = EpochOrder(2, shuffle="shards", buffer_clips=6).order(1, np.arange(12), shards=np.arange(12) // 5)
        for options in ({}, {"plan": CLS_PLAN}, {"batch_size": 1}, {"resident": "ram"}):
            made = loader(store, **options)
            assert [row for batch in made.epoch(1) for row in batch.rows.tolist()] == expected.tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 12])
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 3)])
def test_batches_have_the_bits_of_their_clips(views_store: Path, batch_size: int, rank: int, num_ranks: int) -> None:
    with FeatureStore.open(views_store) as store:
        options = {"batch_size": batch_size, "rank": rank, "num_ranks": num_ranks, "views": (0, 1, 2)}
        made, kept = loader(store, **options), loader(store, resident="ram", **options)
        for epoch, first in ((0, 0), (1, 0), (1, 1), (2, 2)):
            batches = list(made.epoch(epoch, first_batch=first))
            assert len(batches) == max(0, len(made) - first)
            for batch, expected in zip(batches, kept.epoch(epoch, first_batch=first), strict=True):
                np.testing.assert_array_equal(batch.rows, expected.rows)
                np.testing.assert_array_equal(batch.views, expected.views)
                assert torch.equal(batch.features().tokens[-1], expected.features().tokens[-1])
                assert torch.equal(batch.features().cls[-1], expected.features().cls[-1])


def test_shards_are_read_whole_and_in_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[list[int]] = []
    original = FeatureStore.read_many

    def read_many(self: FeatureStore, split: str, names: Any, rows: Any, **options: Any) -> dict[str, np.ndarray]:
        reads.append(rows.tolist())
        return original(self, split, names, rows, **options)

    monkeypatch.setattr(FeatureStore, "read_many", read_many)
    order = EpochOrder(1, shuffle="shards", buffer_clips=10)
    with labelled_store(tmp_path / "store.zarr", [0, 1] * 11) as store:  # shards of 5, 5, 5, 5 and 2 rows
        made = loader(store, CLS_PLAN, order=order, batch_size=4)
        windows = order.windows(0, np.arange(22), np.arange(22) // 5)
        assert [len({*(window // 5).tolist()}) for window in windows] == [2, 2, 1]
        list(made.epoch(0))
        assert reads == [
            [row for row in range(22) if row // 5 == shard] for window in windows for shard in np.unique(window // 5)
        ]
        reads.clear()
        skipped = len(windows[0]) // 4 + 1
        list(made.epoch(0, first_batch=skipped))
        left = np.concatenate(windows)[4 * skipped :].tolist()
        assert sorted(row for rows in reads for row in rows) == sorted(left)
        assert all(rows == sorted(rows) and len({row // 5 for row in rows}) == 1 for rows in reads)


def test_shards_are_counted_over_the_parts_of_a_split(tmp_path: Path) -> None:
    with viewed_store(tmp_path / "store.zarr") as store:
        table = VideoTable(("n0", "n1", "n2"), ("n0", "n1", "n2"), np.array([0, 1, 2]))
        fill_view(store, add_videos(store, "train", table), 0)
        assert shard_numbers(store, "train").tolist() == [0] * 5 + [1] * 5 + [2] * 2 + [3] * 3
        assert sorted(int(row) for batch in loader(store).epoch(0) for row in batch.rows) == [*range(15)]


def test_two_windows_are_in_memory_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_memory: list[int] = []
    original = np.empty

    def empty(shape: Any, *args: Any, **options: Any) -> np.ndarray:
        if np.shape(shape) and tuple(shape)[1:] == (4, 6):
            made_memory.append(shape[0])
        return original(shape, *args, **options)

    with labelled_store(tmp_path / "store.zarr", [0, 1] * 20) as store:
        made = loader(store, CLS_PLAN, order=EpochOrder(1, shuffle="shards", buffer_clips=10), batch_size=3)
        monkeypatch.setattr("vcache.pipelines.loading.buffers.np.empty", empty)
        list(made.epoch(0))
    assert 1 <= made_memory.count(10) <= 2
    assert (made.shuffle_bytes, made.needed_bytes) == (20 * 4 * 6 * 4, 40 * 4 * 6 * 4)
    assert made_memory.count(3) <= 14  # the batches, all of them kept by the list


def test_a_consumer_that_stops_waits_for_one_shard_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first window is read fast, the second, of 50 shards, slowly; the batch ahead waits for it."""
    original, reads = FeatureStore.read_many, list[int]()

    def read_many(self: FeatureStore, *args: Any, **options: Any) -> dict[str, np.ndarray]:
        reads.append(len(args[2]))
        if len(reads) > 50:
            time.sleep(0.02)
        return original(self, *args, **options)

    monkeypatch.setattr(FeatureStore, "read_many", read_many)
    with labelled_store(tmp_path / "store.zarr", [0] * 100, rows_per_shard=1) as store:
        order = EpochOrder(0, shuffle="shards", buffer_clips=50)
        batches = loader(store, CLS_PLAN, order=order, batch_size=25).epoch(0)
        next(batches), next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert 50 <= len(reads) < 70
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_damage_in_a_window_is_told(tmp_path: Path) -> None:
    with labelled_store(tmp_path / "store.zarr", [0, 1] * 10) as store:
        (tmp_path / "store.zarr/train/view-0/cls/2/c/2/0/0").unlink()
        with pytest.raises(CorruptStore, match=r"is missing: row 1\d of train"):
            list(loader(store, CLS_PLAN).epoch(0))


def test_shards_are_asked_for_and_a_buffer_holds_something() -> None:
    with pytest.raises(OrderError, match="needs the shard of each row"):
        EpochOrder(shuffle="shards").order(0, np.arange(4))
    with pytest.raises(OrderError, match=r"buffer_clips \(0\) must be at least 1"):
        EpochOrder(shuffle="shards", buffer_clips=0)


@pytest.mark.parametrize(("rotational", "partition"), [("1", True), ("1", False), ("0", True)])
def test_the_kernel_says_what_a_disk_is(tmp_path: Path, rotational: str, partition: bool) -> None:
    number = tmp_path.stat().st_dev
    disk = tmp_path / "devices" / "sda"
    device = disk / "sda1" if partition else disk
    device.mkdir(parents=True)
    (disk / "queue").mkdir()
    (disk / "queue" / "rotational").write_text(f"{rotational}\n")
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(device)
    choice = choose_shuffle("auto", tmp_path, devices=tmp_path / "block")
    assert (choice.kind, "--shuffle shards" in choice.reason) == ("full", rotational == "1")


def test_object_stores_are_read_by_shards_and_unknown_disks_in_full(tmp_path: Path) -> None:
    remote = choose_shuffle("auto", ObjectPath("bucket", "k400.zarr"))
    assert (remote.kind, remote.reason.endswith("s3://bucket/k400.zarr is an object store.")) == ("shards", True)
    assert choose_shuffle("auto", tmp_path, devices=tmp_path).kind == "full"
    assert choose_shuffle("full", ObjectPath("bucket", "a")).reason == "Epochs are shuffled in full, as asked."
