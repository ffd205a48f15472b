"""Reports of trainings that never were, all fields different."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.heads.requirements import Recipe
from vcache.pipelines.training.reports import EpochReport, HeadProgress, StepReport, TrainingPlan


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., TrainingPlan]:
    def make(**fields: object) -> TrainingPlan:
        defaults: dict[str, object] = {
            "run": Path("runs/evl-1"),
            "store": Path("k400.zarr"),
            "num_train": 400,
            "num_val": 200,
            "num_views": 1,
            "num_parameters": 1032330,
            "epochs": 20,
            "steps": 500,
            "precision": "float32",
            "recipe": Recipe(lr=2e-3, weight_decay=0.05, batch_size=16, epochs=20),
            "residency": "",
            "shuffle": "full",
        }
        return TrainingPlan(**{**defaults, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_head() -> Callable[..., HeadProgress]:
    def make(**fields: object) -> HeadProgress:
        defaults: dict[str, object] = {
            "name": "evl-1",
            "step": 120,
            "num_steps": 500,
            "epoch": 4,
            "lr": 1.5e-3,
            "loss": 1.234,
            "train_top1": 0.456,
            "val": 0.5,
            "best": 0.525,
            "state": "training",
        }
        return HeadProgress(**{**defaults, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_report() -> Callable[..., StepReport]:
    def make(*heads: HeadProgress, **fields: object) -> StepReport:
        defaults: dict[str, object] = {
            "steps_per_second": 35.23,
            "read_bytes_per_second": 1.2e8,
            "waiting": 0.73,
            "limited_by": "reading",
            "source": "disk",
            "seconds_left": 11.0,
        }
        return StepReport(heads=heads, **{**defaults, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_epoch() -> Callable[..., EpochReport]:
    def make(**fields: object) -> EpochReport:
        defaults: dict[str, object] = {
            "head": "evl-1",
            "epoch": 4,
            "step": 125,
            "lr": 1.4e-3,
            "train_loss": 1.2,
            "train_top1": 0.46,
            "val_loss": 1.3,
            "val_top1": 0.51,
            "val_top5": 0.9,
            "val_mean_class_accuracy": 0.48,
            "val_mean_average_precision": None,
            "best": False,
            "seconds": 12.3,
            "read_bytes": 965_000_000,
            "waiting_seconds": 3.5,
        }
        return EpochReport(**{**defaults, **fields})  # type: ignore[arg-type]

    return make
