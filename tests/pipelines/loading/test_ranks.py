"""Several ranks: together they have every batch of one process, each row once, and each reads its own rows alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.reader import FeatureStore

PLAN = ReadPlan(tokens={-1: 2}, cls={-1: 2}, maps={}, embed=False)


@pytest.fixture(scope="module")
def store(views_store: Path) -> Iterator[FeatureStore]:
    with FeatureStore.open(views_store) as opened:
        yield opened


def loader(store: FeatureStore, batch_size: int, **options: Any) -> ClipLoader:
    made = {"views": (0, 1, 2), "order": EpochOrder(3), **options}
    return ClipLoader(store, "train", PLAN, batch_size=batch_size, device=torch.device("cpu"), **made)


def clips(batch: Batch) -> list[tuple[int, int]]:
    return sorted(zip(batch.rows.tolist(), batch.views.tolist(), strict=True))


@settings(deadline=None, max_examples=25)
@given(batch_size=st.integers(1, 13), num_ranks=st.integers(1, 6), in_order=st.booleans(), epoch=st.integers(0, 99))
def test_the_ranks_have_together_what_one_process_has(
    store: FeatureStore, batch_size: int, num_ranks: int, in_order: bool, epoch: int
) -> None:
    def batches(**options: Any) -> list[Batch]:
        made = loader(store, batch_size, **options)
        return list(made.in_order(view=1) if in_order else made.epoch(epoch))

    alone = batches()
    of_ranks = [batches(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert {len(found) for found in of_ranks} == {len(alone)}
    for number, expected in enumerate(alone):
        parts = [found[number] for found in of_ranks]
        assert sorted(clip for part in parts for clip in clips(part)) == clips(expected)
        assert {part.num_global for part in parts} == {len(expected)} == {expected.num_global}
        for part in parts:
            np.testing.assert_array_equal(part.targets.numpy(), store.videos("train").labels[part.rows])
            features, places = part.features(), [clips(expected).index(clip) for clip in clips(part)]
            order = np.lexsort([part.views, part.rows])
            expected_order = np.lexsort([expected.views, expected.rows])
            for found, whole in (
                (features.tokens[-1], expected.features().tokens[-1]),
                (features.cls[-1], expected.features().cls[-1]),
            ):
                assert torch.equal(found[order], whole[expected_order][places])


def test_a_rank_without_a_share_has_an_empty_batch(store: FeatureStore) -> None:
    last = list(loader(store, 11, rank=2, num_ranks=3).epoch(0))[-1]
    assert (len(last), last.num_global, last.features().tokens[-1].shape) == (0, 1, (0, 4, 5, 6))
    assert last.targets.shape == (0,)


def test_empty_batches_have_maps_too(float32_store: Path, int8_store: Path) -> None:
    for path, source in ((float32_store, "qk"), (int8_store, "derive")):
        plan = ReadPlan(tokens={}, cls={}, maps={-1: 2}, embed=True, maps_from=source, int8=source == "derive")
        with FeatureStore.open(path) as opened:
            made = ClipLoader(opened, "val", plan, batch_size=4, device=torch.device("cpu"), rank=2, num_ranks=3)
            assert [tuple(batch.features().maps[-1].shape) for batch in made.in_order()] == [
                (1, 4, 2, 16, 16),
                (0, 4, 2, 16, 16),
            ]


def test_a_rank_reads_its_own_rows_alone(store: FeatureStore) -> None:
    made = [loader(store, 5, rank=rank, num_ranks=2) for rank in (0, 1)]
    for one in made:
        list(one.epoch(0))
    row_bytes = sum(spec.row_bytes for spec in store.arrays("train").values() if spec.name in PLAN.arrays)
    assert [one.stats.bytes_read for one in made] == [7 * row_bytes, 5 * row_bytes]
