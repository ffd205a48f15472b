"""The order of an epoch: a permutation, or every class equally often, and ranks that divide a batch without a remainder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.pipelines.loading.epoch_order import EpochOrder, OrderError, share

seeds, epochs = st.integers(0, 2**40), st.integers(0, 10**5)
class_sizes = st.lists(st.integers(1, 23), min_size=1, max_size=7)


def of_classes(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows with gaps between their numbers, and their classes, mixed."""
    labels = np.repeat(3 * np.arange(len(sizes)) + 1, sizes)
    return 5 * np.arange(len(labels)) + 2, np.random.default_rng(0).permutation(labels)


def counts(drawn: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How often each of the rows was drawn."""
    return (drawn[:, None] == rows).sum(axis=0)


@settings(deadline=None)
@given(num_rows=st.integers(0, 99), seed=seeds, epoch=epochs)
def test_an_epoch_is_the_permutation_of_seed_and_epoch(num_rows: int, seed: int, epoch: int) -> None:
    rows = 3 * np.arange(num_rows) + 1
    order = EpochOrder(seed).order(epoch, rows)
    np.testing.assert_array_equal(order, rows[np.random.default_rng([seed, epoch]).permutation(num_rows)])


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds, epoch=epochs)
def test_a_balanced_epoch_has_each_class_equally_often_and_its_videos_too(
    sizes: list[int], seed: int, epoch: int
) -> None:
    rows, labels = of_classes(sizes)
    drawn = EpochOrder(seed, balanced=True).order(epoch, rows, labels=labels)
    assert len(drawn) == len(rows)
    of_rows = counts(drawn, rows)
    of_classes_ = [of_rows[labels == label] for label in np.unique(labels)]
    per_class = [number.sum() for number in of_classes_]
    assert max(per_class) - min(per_class) <= 1
    assert all(number.max() - number.min() <= 1 for number in of_classes_)


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds, first=epochs, num_epochs=st.integers(1, 6))
def test_over_epochs_no_video_of_a_class_comes_again_before_the_others(
    sizes: list[int], seed: int, first: int, num_epochs: int
) -> None:
    rows, labels = of_classes(sizes)
    order = EpochOrder(seed, balanced=True)
    drawn = np.concatenate([order.order(first + i, rows, labels=labels) for i in range(num_epochs)])
    of_rows = counts(drawn, rows)
    per_class = [of_rows[labels == label] for label in np.unique(labels)]
    assert all(number.max() - number.min() <= 1 for number in per_class)
    totals = [number.sum() for number in per_class]
    assert max(totals) - min(totals) <= 2  # one more or less at each end


def test_balanced_epochs_differ_and_are_shuffled() -> None:
    rows, labels = of_classes([40, 10, 3])
    order = EpochOrder(4, balanced=True)
    first, second, again = (order.order(epoch, rows, labels=labels) for epoch in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert {*first.tolist()} != {*second.tolist()}
    assert (np.diff(labels[np.searchsorted(rows, first)]) == 0).mean() < 0.6  # in order of class it would be 50 of 52


def test_balancing_needs_classes_and_is_not_had_shard_by_shard() -> None:
    with pytest.raises(OrderError, match="needs the class of each row"):
        EpochOrder(balanced=True).order(0, np.arange(4))
    with pytest.raises(OrderError, match="Choose one: leave out balanced"):
        EpochOrder(balanced=True, shuffle="shards")


@given(num_rows=st.integers(0, 60), batch_size=st.integers(1, 17), num_ranks=st.integers(1, 9))
def test_the_shares_of_the_ranks_are_the_batch_each_row_once(num_rows: int, batch_size: int, num_ranks: int) -> None:
    order = EpochOrder(1).order(0, np.arange(num_rows))
    for start in range(0, num_rows, batch_size):
        batch = order[start : start + batch_size]
        shares = [share(batch, rank, num_ranks) for rank in range(num_ranks)]
        assert sorted(np.concatenate(shares)) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for rank, own in enumerate(shares):
            assert [*own] == [batch[i] for i in range(len(batch)) if i % num_ranks == rank]
