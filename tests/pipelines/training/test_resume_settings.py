"""Whatever a training is told, it goes on from the middle of an epoch bit for bit, and reads from memory what is on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import labelled_store
from safetensors.torch import load_file
from stops import stop_after
from viewed import viewed_store

from vcache.pipelines.runs import Run
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import resume_run, train_head

SETTINGS: dict[str, dict[str, Any]] = {
    "ema": {"settings": {"ema_decay": "0.9"}},
    "bfloat16": {"precision": "bfloat16"},
    "balanced": {"balanced": True},
    "shots": {"shots": 3, "data_seed": 4},
    "fraction": {"fraction": 0.7},
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
    lines = [[{k: v for k, v in line.items() if k not in clock} for line in Run.open(run).metrics()] for run in (one, other)]
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
