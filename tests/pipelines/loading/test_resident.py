"""Features that are kept have the bits of those from disk, are read once, and are not kept where they do not fit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from viewed import viewed_store

from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.loading import residency
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.loading.residency import DoesNotFit, choose_residency, free_ram
from vcache.pipelines.matching import match
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.request import ExtractionConfig
from vcache.store.errors import RowNotCommitted
from vcache.store.reader import FeatureStore

CPU = torch.device("cpu")
PLAN = ReadPlan(tokens={-1: 2}, cls={-1: 2}, maps={}, embed=False)
KINDS = ["ram", "gpu"]  # on the CPU "gpu" is the same memory, and gathers as on a GPU


def all_batches(made: ClipLoader) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
    for batches in (made.epoch(0), made.epoch(1), made.epoch(1, plans=made.plans[:1]), made.in_order()):
        for batch in batches:
            features = [batch.features(plan) for plan in batch.plans]
            yield batch, [x for found in features for x in found._tensors()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixture", ["float32_store", "int8_store", "views_store"])
def test_batches_have_the_bits_that_they_have_from_disk(
    kind: Any, fixture: str, request: pytest.FixtureRequest
) -> None:
    with FeatureStore.open(request.getfixturevalue(fixture)) as store:
        needs = [HeadRequirements(tokens=(2,), maps=(2,)), HeadRequirements(cls=(-1,), embed=True)]
        real = "tokens/1" in store.arrays("train")
        plans: list[ReadPlan] = [match("evl", needed, store, ["train"]) for needed in needs] if real else [PLAN]
        options: dict[str, Any] = {
            "views": (0,) if real else (0, 2, 1),
            "order": EpochOrder(3),
            "rank": 1,
            "num_ranks": 2,
        }
        made = [
            ClipLoader(store, "train", plans, batch_size=5, device=CPU, resident=where, **options)
            for where in ("disk", kind)
        ]
        read = made[1].stats.copy()
        for (expected, from_disk), (found, kept) in zip(all_batches(made[0]), all_batches(made[1]), strict=True):
            np.testing.assert_array_equal(found.rows, expected.rows)
            np.testing.assert_array_equal(found.views, expected.views)
            assert torch.equal(found.targets, expected.targets)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, from_disk, strict=True))
        assert made[1].stats.bytes_read == read.bytes_read == made[1].needed_bytes > 0


def test_bfloat16_is_kept_as_its_bits(config: Callable[..., ExtractionConfig]) -> None:
    made = config(dtype="bfloat16")
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        plan = ReadPlan(tokens={-1: 2}, cls={}, maps={}, embed=False)
        bits = torch.from_numpy(store.read("val", "tokens/2", range(6)).astype(np.uint16)).view(torch.bfloat16)
        for kind in KINDS:
            (batch,) = ClipLoader(store, "val", plan, batch_size=6, device=CPU, resident=kind).in_order()
            assert batch.features().tokens[-1].dtype == torch.bfloat16
            assert torch.equal(batch.features().tokens[-1], bits)


def test_everything_is_read_once_in_the_order_of_the_files(views_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, list[int]]] = []
    original = FeatureStore.read_many

    def read_many(self: FeatureStore, split: str, names: Any, rows: Any, **options: Any) -> dict[str, np.ndarray]:
        reads.append((options["view"], rows.tolist()))
        return original(self, split, names, rows, **options)

    monkeypatch.setattr(FeatureStore, "read_many", read_many)
    monkeypatch.setattr("vcache.pipelines.loading.resident._BYTES_AT_ONCE", 7 * 4 * (24 + 120))
    with FeatureStore.open(views_store) as store:
        made, seen = ClipLoader(store, "train", PLAN, batch_size=5, device=CPU, views=(0, 2)), list[tuple[int, int]]()
        made.keep("ram", lambda done, total: seen.append((done, total)))
        list(made.epoch(0))
        total = 24 * 4 * (24 + 120)
        assert made.needed_bytes == total
        made.keep("disk")
        list(made.in_order())
    assert reads[:4] == [(0, [*range(7)]), (0, [*range(7, 12)]), (2, [*range(7)]), (2, [*range(7, 12)])]
    assert seen == [(number * total // 24, total) for number in (7, 12, 19, 24)]
    assert sum(len(rows) for _, rows in reads[4:]) == 12


def test_kept_features_can_be_trained_on_where_they_were_read_without_gradients(views_store: Path) -> None:
    with FeatureStore.open(views_store) as store:
        for kind in KINDS:
            with torch.inference_mode():
                made = ClipLoader(store, "train", PLAN, batch_size=5, device=CPU, resident=kind)
            weight = torch.ones(6, requires_grad=True)
            (next(made.epoch(0)).features().cls[-1] * weight).sum().backward()
            assert weight.grad is not None


def test_a_clip_that_is_not_there_is_not_another_one(tmp_path: Path) -> None:
    with viewed_store(tmp_path / "store.zarr", failed={("train", 1, 4)}) as store:
        for kind in ("disk", *KINDS):
            made = ClipLoader(store, "train", PLAN, batch_size=12, device=CPU, views=(0, 1), resident=kind)
            with pytest.raises(RowNotCommitted, match="row 4"):
                list(made.in_order(view=1))
            assert len(list(made.epoch(0))) == 1


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 bytes of memory are free."""
    monkeypatch.setattr(residency, "free_ram", lambda: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("room")
def test_features_are_kept_if_they_take_less_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_residency("auto", 499, CPU)
    assert (chosen.kind, chosen.free_bytes) == ("ram", 1000)
    assert chosen.reason == "All features take 499 B and are kept in memory: less than half of the 1.0 kB free there."
    for needed, reserve in ((500, 0), (300, 400)):
        chosen = choose_residency("auto", needed, CPU, reserve)
        assert chosen.kind == "disk"
        assert f"All features take {needed} B, half or more of the " in chosen.reason
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_residency("auto", 124, CPU).kind == "ram"
    assert "the memory of each of 4 processes" in choose_residency("auto", 126, CPU).reason
    assert choose_residency("disk", 1, CPU).kind == "disk"


@pytest.mark.usefixtures("room")
def test_a_gpu_comes_before_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 9999))
    cuda = torch.device("cuda")
    assert choose_residency("auto", 299, cuda).kind == "gpu"
    assert choose_residency("auto", 200, cuda, reserve_bytes=200).kind == "ram"
    assert choose_residency("auto", 600, cuda).kind == "disk"
    assert choose_residency("gpu", 599, cuda).kind == "gpu"
    with pytest.raises(DoesNotFit, match="--resident gpu: all features take 601 B, and 600 B are free on the GPU"):
        choose_residency("gpu", 601, cuda)


@pytest.mark.usefixtures("room")
def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    assert choose_residency("ram", 1000, CPU).kind == "ram"
    with pytest.raises(DoesNotFit, match="--resident ram: all features take 1.1 kB, and 1.0 kB are free in memory"):
        choose_residency("ram", 1100, CPU)
    with pytest.raises(DoesNotFit, match="trained on the CPU. Use --resident ram"):
        choose_residency("gpu", 1, CPU)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_kernel_and_the_cgroups_leave(tmp_path: Path, version: int) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    7000 kB\n")
    assert free_ram(tmp_path) == 7000 * 1024
    mount = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    group = mount / "jobs" / "mine"
    group.mkdir(parents=True)
    line, limit, used, cache = (
        ("4:memory:/jobs/mine", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("0::/jobs/mine", "memory.max", "memory.current", "inactive_file")
    )
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:cpu:/x\n{line}\n")
    for folder, most in ((group, str(2**63 - 4096) if version == 1 else "max"), (mount / "jobs", "5000000")):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("4000000\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} 300000\n")
    assert free_ram(tmp_path) == 1_300_000
    assert free_ram() > 0
