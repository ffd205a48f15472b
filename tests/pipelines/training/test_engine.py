"""Many heads on one stream: each is what it would be alone, and none stops another."""

from pathlib import Path

import pytest
import torch
from logged import metrics_of
from safetensors.torch import load_file
from stops import stop_after
from torch import Tensor

from vcache.heads.linear import LinearHead
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.training.checkpoints import Checkpoints
from vcache.pipelines.training.config import TrainingConfig, TrainingError
from vcache.pipelines.training.group import Member, TrainingEvents, train_group
from vcache.pipelines.training.reports import EpochReport, TrainingPlan
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

SETTINGS: list[dict[str, object]] = [
    {"head": "linear", "seed": 0, "settings": {"epochs": 3, "lr": 1e-2}},
    {"head": "evl", "seed": 1, "settings": {"epochs": 3, "layers": "-1:", "temporal_cross_attention": "off"}},
    {"head": "evl", "seed": 0, "settings": {"epochs": 2, "layers": "-2:", "lr": 1e-3}},
    {"head": "linear", "seed": 2, "settings": {"steps": 4, "layer": "-2"}},
]


def members(store: Path, folder: Path, configs: list[dict[str, object]]) -> list[Member]:
    made = []
    for number, fields in enumerate(configs):
        given = {**fields, "settings": {"batch_size": 5, **fields["settings"]}}  # type: ignore[dict-item]
        config = TrainingConfig(store=store, device="cpu", **given)  # type: ignore[arg-type]
        made.append(Member(name=f"head {number}", config=config, run=folder / str(number)))
    return made


def weights(run: Path, name: str = "head") -> dict[str, Tensor]:
    return load_file(run / f"{name}.safetensors")


def test_each_of_many_heads_is_bit_for_bit_what_it_is_alone(float32_store: Path, tmp_path: Path) -> None:
    """Two kinds of heads, other seeds, layers, rates and lengths; dropout is on."""
    together = members(float32_store, tmp_path / "together", SETTINGS)
    train_group(together)
    for member, alone in zip(together, members(float32_store, tmp_path / "alone", SETTINGS), strict=True):
        train_group([alone])
        for file in ("head", "best"):
            torch.testing.assert_close(weights(member.run, file), weights(alone.run, file), rtol=0, atol=0)
        assert metrics_of(member.run) == metrics_of(alone.run)


def test_a_batch_is_read_once_however_many_heads_take_it(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    read_many = FeatureStore.read_many

    def counted(self: FeatureStore, split: str, names: object, wanted: object, **options: object) -> object:
        rows.extend(wanted if split == "train" else ())  # type: ignore[arg-type]
        return read_many(self, split, names, wanted, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureStore, "read_many", counted)
    configs = [{**config, "resident": "disk"} for config in SETTINGS]
    train_group(members(float32_store, tmp_path, configs))
    assert sorted(rows) == sorted([*range(12)] * 3)  # the longest takes three epochs


def test_a_head_that_fails_does_not_stop_the_others(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LinearHead.forward

    def failing(self: LinearHead, features: object) -> Tensor:
        if self.config.layer == -2 and self.training:
            raise RuntimeError("no luck")
        return forward(self, features)  # type: ignore[arg-type]

    monkeypatch.setattr(LinearHead, "forward", failing)
    lost = {"head": "linear", "settings": {"lr": 1e30, "epochs": 3}}
    found = train_group(members(float32_store, tmp_path / "all", [lost, *SETTINGS]))
    assert [summary.error for summary in found][1:4] == [None, None, None]
    assert "the loss is nan at step" in str(found[0].error) and found[4].error == "no luck"
    alone = members(float32_store, tmp_path / "alone", SETTINGS[:1])
    train_group(alone)
    torch.testing.assert_close(weights(tmp_path / "all" / "1"), weights(alone[0].run), rtol=0, atol=0)
    assert not (tmp_path / "all" / "0" / "head.safetensors").exists()


def test_alone_a_head_that_fails_raises(float32_store: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="smaller --lr"):
        train_group(members(float32_store, tmp_path, [{"head": "linear", "settings": {"lr": 1e30, "epochs": 3}}]))


def test_a_head_stops_after_its_patience_and_keeps_its_best_weights(float32_store: Path, tmp_path: Path) -> None:
    patient = {"head": "linear", "patience": 2, "settings": {"epochs": 50, "lr": 3e-2}}
    stopped, other = members(float32_store, tmp_path, [patient, SETTINGS[0]])
    reports: list[EpochReport] = []
    summaries = train_group([stopped, other], TrainingEvents(on_epoch=reports.append))
    own = [report for report in reports if report.head == stopped.name]
    best = max(range(len(own)), key=lambda epoch: (own[epoch].val_top1, -epoch))
    assert len(own) == best + 1 + 2 < 50
    assert [report.best for report in own].count(True) >= 1 and own[best].best
    assert (summaries[0].stopped_early, summaries[0].epochs, summaries[0].steps) == (True, 50, own[-1].step)
    assert [report.epoch for report in reports if report.head == other.name] == [0, 1, 2]


def test_seeds_change_the_head_and_data_seeds_the_order(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: dict[str, list[int]] = {}
    epoch = ClipLoader.epoch

    def recorded(self: ClipLoader, number: int, **options: object) -> object:
        for batch in epoch(self, number, **options):  # type: ignore[arg-type]
            orders.setdefault(name, []).extend(batch.rows.tolist())
            yield batch

    monkeypatch.setattr(ClipLoader, "epoch", recorded)
    found = {}
    for name, seeds in {"a": (0, 0), "b": (1, 0), "c": (0, 1)}.items():
        config = TrainingConfig(
            head="linear",
            store=float32_store,
            out=tmp_path / name,
            seed=seeds[0],
            data_seed=seeds[1],
            settings={"epochs": 1, "batch_size": 5},
        )
        train_head(config)
        found[name] = weights(tmp_path / name)
    assert orders["a"] == orders["b"] != orders["c"]
    assert sorted(orders["a"]) == sorted(orders["c"])
    for name in "bc":
        assert not torch.equal(found["a"]["classify.weight"], found[name]["classify.weight"])


def test_training_leaves_the_random_numbers_of_the_caller_alone(float32_store: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train_group(members(float32_store, tmp_path, SETTINGS[:1]))
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_heads_of_unlike_lengths_go_on_together_wherever_they_were_stopped(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ends in the middle of an epoch, one at its end, one by its patience; those that are done are not trained again."""
    patient = {"head": "linear", "patience": 1, "settings": {"epochs": 3, "lr": 3e-2}}
    configs = [patient, *SETTINGS]
    whole = members(float32_store, tmp_path / "whole", configs)
    train_group(whole)
    for num_batches in range(1, 9):
        stopped = members(float32_store, tmp_path / str(num_batches), configs)
        with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
            stop_after(patch, num_batches)
            train_group(stopped)
        left = [member for member in stopped if not (member.run / "head.safetensors").exists()]
        assert {number for member in left for number in Checkpoints(member.run).numbers()} == {num_batches}
        train_group(left, resume=True)
        for one, other in zip(stopped, whole, strict=True):
            torch.testing.assert_close(weights(one.run), weights(other.run), rtol=0, atol=0)
            torch.testing.assert_close(weights(one.run, "best"), weights(other.run, "best"), rtol=0, atol=0)
            assert metrics_of(one.run) == metrics_of(other.run)


def test_the_plan_says_what_a_subset_took_and_reading_into_memory_is_told_over_all_splits(
    float32_store: Path, tmp_path: Path
) -> None:
    plans: list[TrainingPlan] = []
    loads: list[tuple[int, int]] = []
    config = TrainingConfig(
        head="linear",
        store=float32_store,
        out=tmp_path / "run",
        settings={"epochs": 2, "batch_size": 2},
        shots=2,
        balanced=True,
        resident="ram",
        device="cpu",
    )
    train_head(config, on_plan=plans.append, on_load=lambda done, total: loads.append((done, total)))
    assert plans[0].num_train == 6
    assert plans[0].subset == "6 of 12 videos are trained on, 2 of each class; every class is drawn equally often"
    done, totals = zip(*loads, strict=True)
    assert done[0] == 0 and done[-1] == totals[0] and list(done) == sorted(set(done)) and len(set(totals)) == 1
    assert len(done) == 3, "nothing, the train split, the validation split"
