"""Batches share memory one after the other, and never at the same time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore

SPECS = {
    "a": ArraySpec(name="a", dims=("frame", "channel"), shape=(3, 5), chunk=(1, 5), dtype="float32"),
    "b": ArraySpec(name="b", dims=(), shape=(), chunk=(), dtype="int16"),
}
PLAN = ReadPlan(tokens={-1: 2, -2: 1}, cls={-1: 2}, maps={}, embed=False)


def test_tensors_have_the_asked_shapes_and_their_memory_comes_back() -> None:
    buffers = BatchBuffers(4)
    first = buffers.take(SPECS, 4)
    assert {name: (tuple(x.shape), x.dtype) for name, x in first.items()} == {
        "a": ((4, 3, 5), torch.float32),
        "b": ((4,), torch.int16),
    }
    places = {name: x.data_ptr() for name, x in first.items()}
    del first
    second = buffers.take(SPECS, 2)
    assert {name: x.data_ptr() for name, x in second.items()} == places
    assert second["a"].shape == (2, 3, 5)
    del second
    assert buffers.take(SPECS, 4)["a"].shape == (4, 3, 5)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x,
        lambda x: x[1],
        lambda x: x.view(-1)[7:],
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: x.numpy()[1:, 2],
        lambda x: memoryview(x.numpy()),
        lambda x: x.to("cpu", non_blocking=True)[:, :1],
        lambda x: (x * torch.ones(5, requires_grad=True)).grad_fn,
    ],
)
def test_memory_that_anything_looks_into_is_not_lent_again(look: Callable[[torch.Tensor], object]) -> None:
    buffers = BatchBuffers(4)
    tensor = buffers.take(SPECS, 4)["a"]
    place = tensor.data_ptr()
    held = look(tensor)
    del tensor
    others = [buffers.take(SPECS, 4) for _ in range(3)]
    assert place not in {x["a"].data_ptr() for x in others}
    del held
    assert buffers.take(SPECS, 4)["a"].data_ptr() == place


def test_views_made_without_gradients_hold_their_memory_too() -> None:
    buffers = BatchBuffers(4)
    with torch.inference_mode():
        tensor = buffers.take(SPECS, 4)["a"]
        place, held = tensor.data_ptr(), tensor[2]
        del tensor
        assert buffers.take(SPECS, 4)["a"].data_ptr() != place
        held.zero_()


def test_all_epochs_of_two_loaders_take_the_memory_of_three_batches(float32_store: Path) -> None:
    with FeatureStore.open(float32_store) as store:
        loader = ClipLoader(store, "train", PLAN, batch_size=1, device=torch.device("cpu"))
        places = [batch.features().cls[-1].data_ptr() for epoch in (0, 1) for batch in loader.epoch(epoch)]
        other = ClipLoader(store, "val", PLAN, batch_size=1, device=torch.device("cpu"), buffers=loader.buffers)
        places += [batch.features().cls[-1].data_ptr() for batch in other.in_order()]
    assert len(places) == 12 + 12 + 6
    assert len(set(places)) <= 3


def test_more_rows_than_the_buffers_were_made_for_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows were asked of buffers for 4"):
        BatchBuffers(4).take(SPECS, 5)


def test_batches_that_are_kept_keep_their_values(float32_store: Path) -> None:
    with FeatureStore.open(float32_store) as store:
        loader = ClipLoader(store, "train", PLAN, batch_size=5, device=torch.device("cpu"))
        everything = [*loader.epoch(0), *loader.in_order()]
        assert [len(batch.features()) for batch in everything] == [5, 5, 2] * 2
        for batch in everything:
            for asked, layer in PLAN.tokens.items():
                expected = store.read("train", f"tokens/{layer}", batch.rows)
                np.testing.assert_array_equal(batch.features().tokens[asked].numpy(), expected)
            np.testing.assert_array_equal(batch.features().cls[-1].numpy(), store.read("train", "cls/2", batch.rows))


def test_one_tensor_kept_of_each_batch_keeps_its_values(float32_store: Path) -> None:
    """What a user does who collects CLS tokens: the rest of each batch is read over, these are not."""
    with FeatureStore.open(float32_store) as store:
        loader = ClipLoader(store, "train", PLAN, batch_size=1, device=torch.device("cpu"))
        kept = [(int(batch.rows[0]), batch.features().tokens[-1][0, :, 0]) for batch in loader.epoch(3)]
        for row, cls in kept:
            np.testing.assert_array_equal(cls.numpy(), store.read("train", "tokens/2", [row])[0, :, 0])
