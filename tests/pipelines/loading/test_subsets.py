"""Subsets: K of each class or a share, contained in larger ones, and hardly changed by videos that come in addition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import labelled_store

from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.loading.subsets import Subset, SubsetError
from vcache.pipelines.read_plan import ReadPlan

single = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(np.array)
several = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=40).map(
        lambda rows: np.array(rows, dtype=np.float32)
    )
)
targets_ = st.one_of(single, several)
seeds = st.integers(0, 2**33)


def ids(targets: np.ndarray) -> list[str]:
    return [f"vidéo-{row}" for row in range(len(targets))]


def chosen(subset: Subset, targets: np.ndarray, rows: np.ndarray | None = None) -> set[int]:
    return {*subset.rows(ids(targets), targets, np.arange(len(targets)) if rows is None else rows).tolist()}


def classes(targets: np.ndarray) -> list[set[int]]:
    """The rows of each class that has any."""
    hot = targets.T.astype(bool) if targets.ndim == 2 else np.array([targets == c for c in np.unique(targets)])
    return [{*np.flatnonzero(has).tolist()} for has in hot if has.any()]


@settings(deadline=None)
@given(targets=targets_, shots=st.integers(1, 9), seed=seeds)
def test_k_shots_are_k_of_each_class_and_part_of_one_more(targets: np.ndarray, shots: int, seed: int) -> None:
    taken = chosen(Subset(shots=shots, seed=seed), targets)
    for of_class in classes(targets):
        here = len(of_class & taken)
        assert here >= min(shots, len(of_class))
        assert targets.ndim == 2 or here == min(shots, len(of_class))
    assert all(any(row in of_class for of_class in classes(targets)) for row in taken)
    assert taken <= chosen(Subset(shots=shots + 1, seed=seed), targets)


@settings(deadline=None)
@given(targets=targets_, fractions=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)), seed=seeds)
def test_a_share_has_every_class_and_is_part_of_a_larger_one(
    targets: np.ndarray, fractions: tuple[float, float], seed: int
) -> None:
    small, large = (chosen(Subset(fraction=fraction, seed=seed), targets) for fraction in sorted(fractions))
    assert small <= large
    assert all(of_class & small for of_class in classes(targets))
    if targets.ndim == 1:
        sizes = {len(of_class): len(of_class & small) for of_class in classes(targets)}
        for there, here in sizes.items():
            assert here == max(1, int(min(fractions) * there + 0.5))
    else:
        assert len(small) >= min(len(targets), max(1, int(min(fractions) * len(targets) + 0.5)))
    assert chosen(Subset(fraction=1.0, seed=seed), targets) == {*range(len(targets))}


@settings(deadline=None)
@given(targets=single, shots=st.integers(1, 5), seed=seeds, data=st.data())
def test_a_new_video_takes_the_place_of_one_of_its_class_at_most(
    targets: np.ndarray, shots: int, seed: int, data: st.DataObject
) -> None:
    new = data.draw(st.integers(0, len(targets) - 1))
    subset = Subset(shots=shots, seed=seed)
    before = chosen(subset, targets, np.delete(np.arange(len(targets)), new))
    after = chosen(subset, targets)
    assert after - before <= {new}
    assert all(targets[row] == targets[new] for row in before - after) and len(before - after) <= 1


def test_seeds_choose_differently_and_without_regard_to_the_order() -> None:
    targets = np.zeros(40, dtype=np.int64)
    drawn = [chosen(Subset(shots=10, seed=seed), targets) for seed in range(20)]
    assert len(set(map(frozenset, drawn))) == 20
    # Each row is taken in a quarter of the draws: the mean of 200 taken rows is near the middle, 19.5, to 4 deviations.
    assert abs(np.mean([row for taken in drawn for row in taken]) - 19.5) < 4 * 11.5 / np.sqrt(200)


def test_a_loader_takes_the_subset_of_what_can_be_read_and_says_so(tmp_path: Path) -> None:
    labels = [0] * 8 + [1] * 2 + [2] * 5
    with labelled_store(tmp_path / "store.zarr", labels) as store:
        plan = ReadPlan(tokens={}, cls={-1: 2}, maps={}, embed=False)
        options = {"batch_size": 4, "device": torch.device("cpu")}
        made = ClipLoader(store, "train", plan, subset=Subset(shots=3), **options)
        assert np.bincount(store.videos("train").labels[made.rows]).tolist() == [3, 2, 3]
        assert made.subset_note == (
            "8 of 15 videos are trained on, 3 of each class, and all of a class that has fewer (1 of 3 classes)."
        )
        assert sorted(int(row) for batch in made.epoch(0) for row in batch.rows) == made.rows.tolist()
        made = ClipLoader(store, "train", plan, subset=Subset(fraction=0.25), **options)
        assert np.bincount(store.videos("train").labels[made.rows]).tolist() == [2, 1, 1]
        assert made.subset_note == "4 of 15 videos are trained on, 26.67% of them, at least one of each class."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of shots .None. and fraction .None. must be set"),
        ({"shots": 2, "fraction": 0.5}, "only one"),
        ({"shots": 0}, r"shots \(0\) must be at least 1"),
        ({"fraction": 1.5}, r"fraction \(1.5\) must be above 0 and at most 1"),
    ],
)
def test_a_subset_of_nothing_or_of_two_kinds_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(SubsetError, match=message):
        Subset(**fields)  # type: ignore[arg-type]
