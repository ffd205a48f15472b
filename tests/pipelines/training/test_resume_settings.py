"""Whatever a training is told, it goes on from the middle of an epoch bit for bit, and reads from memory what is on disk."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import viewed
from labelled import labelled_store
from safetensors.torch import load_file
from stops import stop_after
from viewed import fill_view, video_ids, viewed_store

from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.store.manifest import VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import add_split, add_videos

SETTINGS: dict[str, dict[str, Any]] = {
    "ema": {"settings": {"ema_decay": "0.9"}},
    "bfloat16": {"precision": "bfloat16"},
    "balanced": {"balanced": True},
    "shots": {"shots": 3, "data_seed": 4},
    "fraction": {"fraction": 0.7},
    "classes left out": {"leave_out": ("b",)},
    "shards": {"shuffle": "shards"},
    "frame step": {"frame_step": 2},
    "one view": {"views": 1},
    "mixup, with a multiplier as JSON has it": {
        "settings": {"mixup": 0.8, "lr_multipliers": (("classify.*", 0.5),), "warmup_epochs": 0.5, "clip_grad": 1}
    },
    "patience": {"patience": 1},
    "resident": {"resident": "ram"},
    "shorter than an epoch": {"settings": {"epochs": None, "steps": 3}},
    "a batch larger than the split": {"settings": {"batch_size": 50}},
}


@pytest.fixture(scope="module")
def views_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 videos to train on in 3 views, 7 to validate with."""
    path = tmp_path_factory.mktemp("views") / "views.zarr"
    viewed_store(path).close()
    return path


def config(store: Path, out: Path, **fields: Any) -> TrainingConfig:
    settings = {"epochs": 4, "batch_size": 3, "lr": "3e-2", **fields.pop("settings", {})}
    settings = {name: value for name, value in settings.items() if value is not None}
    return TrainingConfig(head="linear", store=store, out=out, device="cpu", settings=settings, **fields)


def same_runs(one: Path, other: Path) -> None:
    for file in ("head.safetensors", "best.safetensors"):
        assert (one / file).is_file() == (other / file).is_file()
        if (one / file).is_file():
            torch.testing.assert_close(load_file(one / file), load_file(other / file), rtol=0, atol=0)
    clock = ("seconds", "waiting_seconds", "read_bytes", "head")
    lines = [
        [{k: v for k, v in line.items() if k not in clock} for line in Run.open(run).metrics()] for run in (one, other)
    ]
    assert lines[0] == lines[1]


def stopped_after(monkeypatch: pytest.MonkeyPatch, num_batches: int, config: TrainingConfig) -> None:
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, num_batches)
        train_head(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_goes_on_from_the_middle_of_an_epoch_bit_for_bit(
    views_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train_head(config(views_store, tmp_path / "whole", **SETTINGS[name]))
    stopped_after(monkeypatch, 2, config(views_store, tmp_path / "stopped", **SETTINGS[name]))
    resume_run(tmp_path / "stopped")
    same_runs(tmp_path / "stopped", tmp_path / "whole")


def grown(path: Path) -> None:
    """By as many videos again, of which three shots of a class take some."""
    with FeatureStore.open(path) as store:
        labels = np.arange(12) % 3
        ids = video_ids(12, "new")
        part = add_videos(store, "train", VideoTable(ids, tuple(f"{name}.mp4" for name in ids), labels))
        for view in (0, 1, 2):
            fill_view(store, part, view)


def test_a_store_that_grew_under_a_subset_of_the_same_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shots are drawn by video: of more videos other ones, and as many as before."""
    store = tmp_path / "views.zarr"
    viewed_store(store).close()
    stopped_after(monkeypatch, 2, config(store, tmp_path / "run", shots=3))
    grown(store)
    with pytest.raises(RunError, match="other videos to train on than when it began"):
        resume_run(tmp_path / "run")


def test_other_videos_to_validate_on_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch would be chosen among numbers that cannot be compared."""
    store = tmp_path / "views.zarr"
    viewed_store(store, failed={("val", 0, 2)}).close()
    stopped_after(monkeypatch, 2, config(store, tmp_path / "run"))
    shutil.rmtree(store)
    viewed_store(store, failed={("val", 0, 3)}).close()
    with pytest.raises(RunError, match="other videos to validate on than when it began"):
        resume_run(tmp_path / "run")


@pytest.mark.parametrize("change", ["class names", "ids", "views that can be read"])
def test_a_store_of_the_same_key_with_other_videos_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A key says how features were made, not of which videos."""
    store, failed = tmp_path / "views.zarr", {("train", 1, 4)}
    viewed_store(store, failed=failed).close()
    stopped_after(monkeypatch, 2, config(store, tmp_path / "run"))
    shutil.rmtree(store)
    ids = {"train": video_ids(12, "u" if change == "ids" else "v"), "val": video_ids(7, "w")}
    if change == "class names":
        made = viewed.manifest
        monkeypatch.setattr(viewed, "manifest", lambda *a, **k: replace(made(*a, **k), class_names=("b", "a", "c")))
    viewed_store(store, ids=ids, failed={("train", 2, 4)} if "views" in change else failed).close()
    with pytest.raises(RunError, match="other videos to train on than when it began, or other classes or views"):
        resume_run(tmp_path / "run")


def test_a_store_of_the_same_videos_with_another_label_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled_store(tmp_path / "s.zarr", [0, 1, 2, 0, 1, 2, 0]).close()
    stopped_after(monkeypatch, 2, config(tmp_path / "s.zarr", tmp_path / "run"))
    labelled_store(tmp_path / "other.zarr", [0, 1, 2, 0, 1, 2, 1]).close()
    with pytest.raises(RunError, match="other videos to train on"):
        resume_run(tmp_path / "run", store=tmp_path / "other.zarr")


def test_shards_of_another_size_are_refused_where_they_are_shuffled_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows_per_shard in (3, 4):
        labelled_store(tmp_path / str(rows_per_shard), [0, 1, 2] * 4, rows_per_shard=rows_per_shard).close()
    for shuffle in ("shards", "full"):
        stopped_after(monkeypatch, 2, config(tmp_path / "3", tmp_path / shuffle, shuffle=shuffle))
    with pytest.raises(RunError, match="other videos to train on"):
        resume_run(tmp_path / "shards", store=tmp_path / "4")
    resume_run(tmp_path / "full", store=tmp_path / "4")


def test_a_split_that_the_run_does_not_read_may_grow(
    views_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "views.zarr"
    shutil.copytree(views_store, store)
    train_head(config(store, tmp_path / "whole"))
    stopped_after(monkeypatch, 2, config(store, tmp_path / "run"))
    with FeatureStore.open(store) as opened:
        ids = video_ids(5, "t")
        add_split(opened, "extra", VideoTable(ids, ids, np.arange(5) % 3))
    resume_run(tmp_path / "run")
    same_runs(tmp_path / "run", tmp_path / "whole")
