"""What a batch says of its videos' classes, one or several each."""

from pathlib import Path

import pytest
import torch
from labelled import labelled_store

from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.loading.epoch_order import EpochOrder, OrderError
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import match

CPU = torch.device("cpu")
SEVERAL = [{0, 2}, set(), {1}, {3, 0, 1}, {2}, {3}, {0}]


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
