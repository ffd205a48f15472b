"""Training from a store in a bucket, on moto's S3 server: a stopped sweep goes on, and a store may be moved there meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stops import stop_after
from viewed import viewed_store

from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_file import read_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.store.object_path import store_path


@pytest.fixture
def stores(bucket: str, s3: Any, tmp_path: Path) -> tuple[Path, str]:
    """The same store in a folder and in a bucket."""
    local = tmp_path / "views.zarr"
    viewed_store(local).close()
    for file in (file for file in local.rglob("*") if file.is_file()):
        s3.upload_file(str(file), bucket, f"views.zarr/{file.relative_to(local).as_posix()}")
    return local, f"s3://{bucket}/views.zarr"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "head.safetensors")


def test_a_sweep_on_a_bucket_that_is_stopped_goes_on_to_the_weights_of_its_heads_alone(
    stores: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": "2", "batch_size": "5", "device": "cpu", "store": stores[1], "resident": "disk"}
    sweep = Sweep.create(tmp_path / "sweep", plan_sweep(read_sweep("linear", settings, {}, 2)))
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 2)
        run_sweep(sweep)
    assert run_sweep(Sweep.open(sweep.path), resume=True).num_failed == 0
    for seed, member in enumerate(sweep.plan.members):
        alone = TrainingConfig(
            head="linear",
            store=stores[0],
            out=tmp_path / str(seed),
            seed=seed,
            shuffle="shards",
            device="cpu",
            settings={"epochs": 2, "batch_size": 5},
        )
        train_head(alone)
        torch.testing.assert_close(weights(sweep.path / member.folder), weights(tmp_path / str(seed)), rtol=0, atol=0)


def test_a_run_goes_on_after_its_store_was_moved_to_a_bucket(
    stores: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shuffled as it was, although a training that is begun there is shuffled by shards."""
    settings = {"epochs": 2, "batch_size": 5}
    whole = TrainingConfig(head="linear", store=stores[0], out=tmp_path / "whole", device="cpu", settings=settings)
    train_head(whole)
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 2)
        train_head(
            TrainingConfig(head="linear", store=stores[0], out=tmp_path / "run", device="cpu", settings=settings)
        )
    resume_run(tmp_path / "run", store=store_path(stores[1]))
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_sweep_goes_on_after_its_store_was_moved_to_a_bucket(
    stores: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": "2", "batch_size": "5", "device": "cpu", "store": str(stores[0])}
    whole, moved = (
        Sweep.create(tmp_path / name, plan_sweep(read_sweep("linear", settings, {}, 2), together=1))
        for name in ("whole", "moved")
    )
    run_sweep(whole)
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 2)
        run_sweep(moved)
    assert run_sweep(Sweep.open(moved.path).moved(store_path(stores[1])), resume=True).num_failed == 0
    for member in whole.plan.members:
        torch.testing.assert_close(
            weights(moved.path / member.folder), weights(whole.path / member.folder), rtol=0, atol=0
        )
