"""What a batch says of its videos' classes, one or several each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labelled import labelled_store

from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.loading.epoch_order import EpochOrder, OrderError
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.targets import among_classes

CPU = torch.device("cpu")
SEVERAL = [{0, 2}, set(), {1}, {3, 0, 1}, {2}, {3}, {0}]
NUM_CLASSES = 6
some_classes = st.permutations(range(NUM_CLASSES)).flatmap(lambda p: st.integers(1, NUM_CLASSES).map(lambda n: p[:n]))


def test_of_several_classes_the_targets_are_multi_hot(tmp_path: Path) -> None:
    with labelled_store(tmp_path / "store.zarr", SEVERAL) as store:
        plan = match("linear", HeadRequirements(cls=(-1,)), store, ["train"])
        for batch in ClipLoader(store, "train", plan, batch_size=3, device=CPU).epoch(1):
            expected = [[float(c in SEVERAL[row]) for c in range(4)] for row in batch.rows]
            assert (batch.targets.tolist(), batch.targets.dtype) == (expected, torch.float32)


def test_several_classes_are_not_balanced(tmp_path: Path) -> None:
    with labelled_store(tmp_path / "store.zarr", SEVERAL) as store:
        plan = match("linear", HeadRequirements(cls=(-1,)), store, ["train"])
        with pytest.raises(OrderError, match=r"store.zarr have several classes each.* Leave out balanced"):
            ClipLoader(store, "train", plan, batch_size=3, device=CPU, order=EpochOrder(balanced=True))


def test_a_balanced_epoch_has_every_class_equally_often(tmp_path: Path) -> None:
    with labelled_store(tmp_path / "store.zarr", [0] * 9 + [2] * 2 + [5]) as store:
        plan = match("linear", HeadRequirements(cls=(-1,)), store, ["train"])
        made = ClipLoader(store, "train", plan, batch_size=5, device=CPU, order=EpochOrder(balanced=True))
        for epoch in range(3):
            batches = list(made.epoch(epoch))
            assert [len(batch) for batch in batches] == [5, 5, 2]
            assert torch.cat([batch.targets for batch in batches]).bincount().tolist() == [4, 0, 4, 0, 0, 4]
            for batch in batches:
                stored = store.read("train", "cls/2", batch.rows)
                assert torch.equal(batch.features().cls[-1], torch.from_numpy(stored))


@given(st.lists(st.integers(-1, NUM_CLASSES - 1), max_size=9), some_classes, st.booleans())
def test_of_some_classes_the_targets_are_numbered_in_their_order(
    labels: list[int], classes: list[int], any_of: bool
) -> None:
    targets, kept = among_classes(torch.tensor(labels, dtype=torch.int64), classes, any_of=any_of)
    assert kept.tolist() == [label in classes or (label < 0 and not any_of) for label in labels]
    for label, target, own in zip(labels, targets.tolist(), kept, strict=True):
        assert not own or target == (classes.index(label) if label >= 0 else -1)


@given(st.lists(st.sets(st.integers(0, NUM_CLASSES - 1)), min_size=1, max_size=9), some_classes)
def test_a_video_of_several_classes_is_of_some_if_it_has_no_other_or_of_any_of_the_others(
    labels: list[set[int]], classes: list[int]
) -> None:
    """The one choice takes the videos that the other leaves."""
    hot = torch.tensor([[float(c in label) for c in range(NUM_CLASSES)] for label in labels])
    targets, kept = among_classes(hot, classes)
    assert targets.tolist() == [[float(c in label) for c in classes] for label in labels]
    assert kept.tolist() == [label <= set(classes) for label in labels]
    others = [c for c in range(NUM_CLASSES) if c not in classes]
    if others:
        assert np.array_equal(among_classes(hot, others, any_of=True)[1], ~kept)


def test_a_class_is_named_once() -> None:
    with pytest.raises(ValueError, match=r"classes \(\(1, 1\)\) must name each class once"):
        among_classes(torch.tensor([0, 1]), (1, 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loader_of_some_classes_reads_their_videos_alone(tmp_path: Path, rank: int) -> None:
    labels = [2, 0, 1, 2, 3, 1, 0, 3, 3, 2]
    with labelled_store(tmp_path / "store.zarr", labels) as store:
        plan = match("linear", HeadRequirements(cls=(-1,)), store, ["train"])
        options = {"batch_size": 3, "device": CPU, "classes": (3, 1), "rank": rank, "num_ranks": 2}
        made = ClipLoader(store, "train", plan, **options)
        assert made.class_names == ("3", "1") and made.rows.tolist() == [2, 4, 5, 7, 8]
        batches = [*made.epoch(0), *made.in_order()]
        assert sum(len(batch) for batch in batches) == (6, 4)[rank]
        for batch in batches:
            assert [(3, 1)[target] for target in batch.targets] == [labels[row] for row in batch.rows]
            stored = store.read("train", "cls/2", batch.rows)
            assert torch.equal(batch.features().cls[-1], torch.from_numpy(stored))
