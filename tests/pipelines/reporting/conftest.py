"""A browser, and runs to report on."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.sweep_spec import HeadGrid, expand
from vcache.pipelines.training.train_head import train_head

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window. Where there is none the test is skipped, or fails under VCACHE_BROWSER=required."""
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            path = next(filter(None, map(shutil.which, CHROMIUM)), None)
            options = ["--no-sandbox"] if os.geteuid() == 0 else []
            chromium = playwright.chromium.launch(executable_path=path, args=[*options, "--disable-dev-shm-usage"])
            yield chromium
            chromium.close()
    except Exception as error:
        if os.environ.get("VCACHE_BROWSER") == "required":
            pytest.fail(f"VCACHE_BROWSER=required, and there is no Chromium to look at reports with: {error}")
        pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def trained_evl(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small EVL after three epochs; read only."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reported") / "evl"
    settings = {"epochs": 3, "batch_size": 5, "lr": 0.01, "layers": "-2:"}
    train_head(TrainingConfig(head="evl", store=float32_store, out=out, device="cpu", settings=settings))
    return out


@pytest.fixture
def evl_run(trained_evl: Path, tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(trained_evl, tmp_path / "evl-run"))


@pytest.fixture(scope="session")
def finished_sweep(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear head at two rates and two seeds, and one at a rate at which it is lost; read only."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reported") / "sweep"
    fixed = {"epochs": "3", "batch_size": "5", "device": "cpu", "store": str(float32_store)}
    blocks = [
        HeadGrid(head="linear", settings=fixed, grid={"lr": ("0.01", "0.1")}, seeds=(0, 1)),
        HeadGrid(head="linear", settings={**fixed, "lr": "1e30"}, seeds=(0,)),
    ]
    run_sweep(Sweep.create(out, plan_sweep(expand(blocks))))
    return out


@pytest.fixture
def made_predictions() -> Callable[..., Predictions]:
    """made_predictions(num_videos, num_classes, seed=0, several=False): scores at random that lean to the truth."""

    def make(num_videos: int, num_classes: int, *, seed: int = 0, several: bool = False) -> Predictions:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, num_classes, num_videos)
        hot = np.eye(num_classes, dtype=np.uint8)[labels]
        if several:
            hot |= (rng.random(hot.shape) < 1 / num_classes).astype(np.uint8)
        scores = rng.standard_normal(hot.shape) + 2 * hot
        return Predictions(
            scores=scores.astype(np.float32),
            kind="sigmoid" if several else "softmax",
            targets=hot if several else labels.astype(np.int64),
            video_ids=tuple(f"video {number}" for number in range(num_videos)),
            class_names=tuple(f'class <{number}> & "co"' for number in range(num_classes)),
            split="val",
            views="1x1",
            average="softmax",
        )

    return make
