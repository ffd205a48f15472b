"""Small splits, several classes a video, heads that are lost in odd places, runs that are moved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stops import stop_after
from torch import Tensor
from viewed import fill_view, manifest, video_ids, viewed_store

from vcache.heads.linear import LinearHead
from vcache.pipelines.evaluation.metrics import Metrics, ScoresError
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training import engine
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.group import Member, train_group
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import create_store

Vcache = Callable[..., tuple[int, str, str]]


def config(store: Path, out: Path, **fields: Any) -> TrainingConfig:
    settings = {"epochs": 3, "batch_size": 5, **fields.pop("settings", {})}
    return TrainingConfig(head="linear", store=store, out=out, device="cpu", settings=settings, **fields)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "head.safetensors")


def several_classes(path: Path) -> Path:
    """7 and 5 videos of none to three of three classes, in one view."""
    made: Manifest = manifest({"train": 7, "val": 5}, definitions=())
    tables = {}
    for split, number in made.splits.items():
        hot = (np.arange(number)[:, None] % np.array([2, 3, 4]) == 0).astype(np.uint8)
        ids = video_ids(number, split)
        tables[split] = VideoTable(ids, ids, np.where(hot.any(axis=1), hot.argmax(axis=1), -1), {"multi_hot": hot})
    made.facts["multi_label"] = True  # type: ignore[index]
    create_store(path, made, tables)
    with FeatureStore.open(path) as store:
        for split in made.splits:
            fill_view(store, split, 0)
    return path


def test_several_classes_a_video_go_through_a_stopped_sweep_to_eval(
    vcache: Vcache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sweep = several_classes(tmp_path / "s.zarr"), tmp_path / "sweep"
    line = (
        f"sweep linear --store {store} --epochs 2 --batch-size 3 --seeds 2 --device cpu --set mixup=0.4 --out {sweep}"
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert vcache(line)[0] == 130
    status, printed, err = vcache(f"resume {sweep} --json")
    assert status == 0, err
    for seed, row in enumerate(json.loads(printed)["runs"]):
        alone = tmp_path / str(seed)
        line = f"train-head linear --store {store} --epochs 2 --batch-size 3 --seed {seed} --set mixup=0.4 --device cpu"
        assert vcache(f"{line} --out {alone}")[0] == 0
        torch.testing.assert_close(weights(Path(row["run"])), weights(alone), rtol=0, atol=0)
        metrics = json.loads(vcache(f"eval {row['run']} --json --no-save")[1])
        assert metrics["mean_average_precision"] == pytest.approx(row["metrics"]["mean_average_precision"], abs=1e-12)
        assert row["metrics"]["top1"] is None


@pytest.mark.parametrize("videos", [0, 1])
def test_a_validation_split_may_be_of_one_video_or_of_none_that_can_be_read(tmp_path: Path, videos: int) -> None:
    store, ids = tmp_path / "s.zarr", {"train": video_ids(4), "val": video_ids(1, "w")}
    viewed_store(store, ids=ids, failed=() if videos else {("val", 0, 0)}).close()
    summary = train_head(config(store, tmp_path / "run", patience=1))
    assert summary.num_val == videos and summary.last is not None
    assert (summary.last.val_top1 in (0.0, 1.0)) if videos else (summary.last.val_top1 is None)
    assert (tmp_path / "run" / "best.safetensors").exists() == bool(videos)


@pytest.fixture
def lost_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a norm, the head gives NaN where it is not trained."""
    forward = LinearHead.forward

    def lost(self: LinearHead, features: Any) -> Tensor:
        logits = forward(self, features)
        return logits if self.training or self.config.norm else logits * float("nan")

    monkeypatch.setattr(LinearHead, "forward", lost)


@pytest.mark.usefixtures("lost_in_validation")
def test_a_head_that_is_lost_in_validation_alone_stops_itself_and_no_other(float32_store: Path, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"norm": False}, {"lr": 1e-2}]
    together = [
        Member(name=str(i), config=config(float32_store, tmp_path, settings=one), run=tmp_path / str(i))
        for i, one in enumerate(settings)
    ]
    found = train_group(together)
    assert [summary.error is None for summary in found] == [True, False, True]
    assert "the scores of 6 of 6 videos are not finite" in str(found[1].error)
    train_head(config(float32_store, tmp_path / "alone", settings=settings[2]))
    torch.testing.assert_close(weights(tmp_path / "2"), weights(tmp_path / "alone"), rtol=0, atol=0)
    with pytest.raises(ScoresError, match="not finite"):
        train_head(config(float32_store, tmp_path / "lost", settings=settings[1]))
    assert not (tmp_path / "lost" / "head.safetensors").exists()


def test_a_group_of_which_every_head_is_lost_ends(float32_store: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, with a validation that nobody needs."""
    lost = [
        Member(
            name=str(i),
            config=config(float32_store, tmp_path, seed=i, settings={"lr": 1e30}),
            run=tmp_path / str(i),
        )
        for i in range(2)
    ]
    found = train_group(lost)
    assert ["the loss is nan" in str(summary.error) for summary in found] == [True, True]
    assert not list(tmp_path.glob("*/head.safetensors"))


def test_a_run_that_was_begun_with_relative_paths_and_moved_goes_on(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder."""
    shutil.copytree(float32_store, tmp_path / "there" / "s.zarr")
    monkeypatch.chdir(tmp_path / "there")
    train_head(config(Path("s.zarr"), Path("whole")))
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 4)
        train_head(config(Path("s.zarr"), Path("run")))
    shutil.move(tmp_path / "there" / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    resume_run(Path("moved"))
    torch.testing.assert_close(weights(tmp_path / "moved"), weights(tmp_path / "there" / "whole"), rtol=0, atol=0)
    assert not (tmp_path / "there" / "run").exists()
    assert len(Run.open(tmp_path / "moved").metrics()) == 3


def test_features_in_memory_train_the_head_that_those_on_disk_do(tmp_path: Path) -> None:
    """Of several views, shuffled either way."""
    store = tmp_path / "s.zarr"
    viewed_store(store).close()
    for shuffle in ("full", "shards"):
        runs = [tmp_path / f"{shuffle}-{resident}" for resident in ("ram", "disk")]
        for run in runs:
            train_head(config(store, run, shuffle=shuffle, resident=run.name.split("-")[1]))
        torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=0, atol=0)


@pytest.mark.parametrize("fields", [{"data_seed": -1}, {"data_seed": -1, "shots": 1}])
def test_a_seed_of_the_data_below_0_is_refused_in_words(
    float32_store: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    with pytest.raises(SettingError, match=r"data_seed \(-1\) must be at least 0"):
        train_head(config(float32_store, tmp_path / "run", **fields))


def test_a_damaged_config_is_said_to_be(float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 1)
        train_head(config(float32_store, tmp_path / "run"))
    file = tmp_path / "run" / "config.json"
    text = file.read_text()
    file.write_text(text[:-9])
    with pytest.raises(RunError, match="config.json is damaged"):
        resume_run(tmp_path / "run")
    file.write_text(text.replace('"patience": null', '"patience": null, "of_tomorrow": 3'))
    with pytest.raises(RunError, match="of_tomorrow.*another version of vcache"):
        resume_run(tmp_path / "run")


def test_what_a_head_alone_needs_is_read_no_more_once_it_is_done(float32_store: Path, tmp_path: Path) -> None:
    """EVL takes tokens, queries and keys for one epoch; a linear head CLS for three, and reads them alone from then on."""

    def linear(name: str) -> Member:
        return Member(name=name, config=config(float32_store, tmp_path, resident="disk"), run=tmp_path / name)

    def read(run: Path) -> list[int]:
        return [epoch["read_bytes"] for epoch in Run.open(run).metrics()]

    settings = {"epochs": 1, "batch_size": 5, "layers": "-1:"}
    evl = TrainingConfig(head="evl", store=float32_store, resident="disk", device="cpu", settings=settings)
    train_group([linear("beside"), Member(name="evl", config=evl, run=tmp_path / "evl")])
    train_group([linear("alone")])
    assert read(tmp_path / "evl")[0] == read(tmp_path / "beside")[0] > read(tmp_path / "alone")[0] > 0
    assert read(tmp_path / "beside")[1:] == read(tmp_path / "alone")[1:]


def test_of_equal_validations_the_first_is_the_best(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience, too, counts from the first."""
    equal = Metrics(num_videos=6, top1=0.5, top5=1.0, mean_class_accuracy=0.5, loss=1.0)
    monkeypatch.setattr(engine, "compute_metrics", lambda *given: equal)
    summary = train_head(config(float32_store, tmp_path / "run", patience=2, settings={"epochs": 5}))
    assert [epoch["best"] for epoch in Run.open(tmp_path / "run").metrics()] == [True, False, False]
    assert summary.best_epoch == 0 and summary.stopped_early


def one_class(path: Path, labels: dict[str, list[int]]) -> Path:
    """Videos of one of three classes, or of -1, which is none."""
    made = manifest({split: len(found) for split, found in labels.items()}, definitions=())
    tables = {}
    for split, found in labels.items():
        ids = video_ids(len(found), split)
        tables[split] = VideoTable(ids, ids, np.array(found, dtype=np.int64), {})
    create_store(path, made, tables)
    with FeatureStore.open(path) as store:
        for split in labels:
            fill_view(store, split, 0)
    return path


def test_videos_without_a_label_are_not_trained_on_and_not_validated_on(tmp_path: Path) -> None:
    store = one_class(tmp_path / "store.zarr", {"train": [0, 1, -1, 2, -1], "test": [0, 1, 2]})
    with pytest.raises(SettingError, match="2 of 5 videos of split 'train' in store.zarr have no label. Choose"):
        train_head(config(store, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    summary = train_head(config(store, tmp_path / "run", train_split="test"))
    assert (summary.num_train, summary.num_val) == (3, 0)
    hidden = one_class(tmp_path / "hidden.zarr", {"train": [0, 1, 2, 1], "test": [-1, -1, -1]})
    summary = train_head(config(hidden, tmp_path / "hidden"))
    assert (summary.num_train, summary.num_val, summary.best_epoch) == (4, 0, None)
