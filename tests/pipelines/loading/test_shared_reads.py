"""Several plans on one read: each gets the bits that it would get alone, and nothing is read or computed twice."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcache.heads.requirements import ClipFeatures, HeadRequirements
from vcache.pipelines.loading import batch as batch_module
from vcache.pipelines.loading.batch import PlanNotRead
from vcache.pipelines.loading.loader import ClipLoader, UnlikePlans
from vcache.pipelines.matching import match
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.reader import FeatureStore

HEADS = {
    "all modules": HeadRequirements(tokens=(-2, -1), maps=(-2, -1)),
    "one layer": HeadRequirements(tokens=(-1,), cls=(2,), maps=(2,)),
    "embedding": HeadRequirements(cls=(-1,), embed=True),
}


def plans_of(store: FeatureStore, names: Sequence[str] = tuple(HEADS)) -> list[ReadPlan]:
    return [match(name, HEADS[name], store, ["train"]) for name in names]


def loader(store: FeatureStore, plans: ReadPlan | Sequence[ReadPlan], **options: Any) -> ClipLoader:
    made = {"batch_size": 5, "device": torch.device("cpu"), **options}
    return ClipLoader(store, "train", plans, **made)


def tensors(features: ClipFeatures) -> dict[str, torch.Tensor]:
    """All of them by a name of their own."""
    kinds = {"tokens": features.tokens, "cls": features.cls, "maps": features.maps}
    named = {f"{kind}/{asked}": x for kind, found in kinds.items() for asked, x in found.items()}
    return named if features.embed is None else {**named, "embed": features.embed}


@contextmanager
def counted_reads() -> Iterator[list[tuple[tuple[str, ...], tuple[int, ...]]]]:
    """Names and rows of every read."""
    reads: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    original = FeatureStore.read_many

    def read_many(self: FeatureStore, split: str, names: Any, rows: Any, **options: Any) -> dict[str, np.ndarray]:
        reads.append((tuple(names), tuple(int(row) for row in rows)))
        return original(self, split, names, rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "read_many", read_many)
        yield reads


@pytest.fixture(params=["float32_store", "int8_store"])
def store(request: pytest.FixtureRequest) -> Iterator[FeatureStore]:
    with FeatureStore.open(request.getfixturevalue(request.param)) as opened:
        yield opened


def test_each_plan_gets_the_bits_that_it_gets_alone(store: FeatureStore) -> None:
    plans = plans_of(store)
    together = list(loader(store, plans).epoch(2))
    for plan in plans:
        for alone, shared in zip(loader(store, plan).epoch(2), together, strict=True):
            np.testing.assert_array_equal(alone.rows, shared.rows)
            expected, found = tensors(alone.features()), tensors(shared.features(plan))
            assert expected.keys() == found.keys()
            for name, x in expected.items():
                assert torch.equal(found[name], x) and found[name].dtype == x.dtype


def test_a_union_of_arrays_is_read_once_and_features_are_made_once(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(batch_module, name)

        def count(*args: Any) -> Any:
            made[f"{name} {args[1]}" if name == "dequantised" else name] += 1
            return function(*args)

        return count

    for name in ("dequantised", "cross_frame_maps"):
        monkeypatch.setattr(batch_module, name, counting(name))
    plans = plans_of(store)
    with counted_reads() as reads:
        batch = next(loader(store, plans, batch_size=12).epoch(0))
    (names,) = {names for names, _ in reads}
    assert sorted(names) == sorted({name for plan in plans for name in plan.arrays})
    first, second = (batch.features(plan) for plan in plans[:2])
    assert first.tokens[-1] is second.tokens[-1]
    assert first.maps[-1] is second.maps[2]
    batch.features(plans[0]), batch.features(plans[2])
    assert made.pop("cross_frame_maps", 2) == 2  # derived ones are made by the projection
    assert set(made.values()) == {1}


def test_what_only_the_others_asked_for_is_not_read(store: FeatureStore) -> None:
    plans = plans_of(store)
    made = loader(store, plans)
    with counted_reads() as reads:
        batches = list(made.epoch(1, plans=plans[2:]))
    assert {name for names, _ in reads for name in names} == set(plans[2].arrays)
    assert all(batch.features().embed is not None for batch in batches)
    with pytest.raises(PlanNotRead, match="features of .*tokens/1.* were asked for .* of this batch were read: cls/2"):
        batches[0].features(plans[0])
    assert [len(batch) for batch in made.epoch(1, plans=[])] == [5, 5, 2]


def test_the_plan_is_named_where_there_are_several(store: FeatureStore) -> None:
    (batch, *_) = loader(store, plans_of(store)).epoch(0)
    with pytest.raises(PlanNotRead, match="read for 3 plans"):
        batch.features()


def test_batches_before_the_first_that_is_wanted_are_not_read(store: FeatureStore) -> None:
    made = loader(store, plans_of(store))
    everything = list(made.epoch(3))
    for first in range(4):
        with counted_reads() as reads:
            rest = list(made.epoch(3, first_batch=first))
        assert [batch.rows.tolist() for batch in rest] == [batch.rows.tolist() for batch in everything[first:]]
        assert [row for _, rows in reads for row in rows] == [row for batch in rest for row in batch.rows]
        for batch, expected in zip(rest, everything[first:], strict=True):
            for plan in made.plans:
                torch.testing.assert_close(
                    tensors(batch.features(plan)), tensors(expected.features(plan)), rtol=0, atol=0
                )


def test_plans_that_would_read_other_videos_alone_do_not_share_a_loader(float32_store: Path) -> None:
    """`cls/2` failed in a later pass, say: alone a head without it trains on more videos."""
    with FeatureStore.open(float32_store) as opened, pytest.MonkeyPatch.context() as patch:
        original = FeatureStore.committed_rows

        def committed(self: FeatureStore, split: str, names: Any, view: int = 0) -> np.ndarray:
            rows = original(self, split, names, view)
            rows[3] &= "embed" not in set(names)
            return rows

        patch.setattr(FeatureStore, "committed_rows", committed)
        plans = plans_of(opened)
        with pytest.raises(UnlikePlans, match=r"different videos readable in split 'train' .* \(12, 12, 11\)"):
            loader(opened, plans, allow_incomplete=True)
        assert len(loader(opened, plans[:2], allow_incomplete=True).rows) == 12


def test_what_was_read_is_counted(float32_store: Path) -> None:
    plan = ReadPlan(tokens={-1: 2}, cls={}, maps={}, embed=False)
    with FeatureStore.open(float32_store) as opened:
        made = loader(opened, plan)
        before = made.stats.copy()
        list(made.epoch(0))
        spent = made.stats - before
        assert spent.bytes_read == 12 * 5 * 17 * 48 * 4
        assert 0 < spent.wait_seconds <= 10 and 0 < spent.read_seconds <= 10
        list(made.in_order())
        assert made.stats.bytes_read == 2 * spent.bytes_read
