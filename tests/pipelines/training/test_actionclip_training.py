"""ActionCLIP trained from a store: texts are drawn at each step, and a video may have several classes, or none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logged import metrics_of
from named import E, named_store
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from stops import stop_after

from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.runs import Run
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.store.reader import FeatureStore

CLASSES = ("jump", "run", "clap", "wave")
M = 3


def texts() -> np.ndarray:
    """(K, M, E): a direction for each class, and a little of another for each template."""
    rng = np.random.default_rng(2)
    return np.eye(E)[: len(CLASSES), None] + 0.3 * rng.normal(size=(len(CLASSES), M, E))


def embedding(video: str) -> np.ndarray:
    """Of "clap+run-3": between both classes, turned by one place, so that there is something to learn; of none far from all."""
    names = video.split("-")[0].split("+")
    own = sum((np.eye(E)[CLASSES.index(name) + 1 if name else -1] for name in names), np.zeros(E))
    return own + 0.1 * np.random.default_rng(list(video.encode())).normal(size=E)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One class a video: 12 to train on, 4 to validate on."""
    videos = {
        split: [(f"{name}-{split}{i}", name) for i in range(n) for name in CLASSES]
        for split, n in (("train", 3), ("val", 1))
    }
    return named_store(tmp_path / "one.zarr", CLASSES, videos, embed=embedding, text=texts())


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Two classes, one or none."""
    kinds = ["jump+run", "run+clap", "clap", "wave+jump", "wave", ""]
    videos = {
        split: [(f"{kind}-{split}{i}", set(kind.split("+")) - {""}) for i in range(n) for kind in kinds]
        for split, n in (("train", 3), ("val", 2))
    }
    return named_store(tmp_path / "several.zarr", CLASSES, videos, embed=embedding, text=texts())


def config(store: Path, out: Path, **settings: Any) -> TrainingConfig:
    said = {
        "templates": "label",
        "epochs": 3,
        "batch_size": 5,
        "lr": 1e-2,
        "warmup_epochs": 0,
        "prompt": "lstm",
        **settings,
    }
    return TrainingConfig(head="actionclip", store=store, out=out, device="cpu", settings=said)


@pytest.mark.parametrize("num_steps", [4])
def test_a_stopped_training_goes_on_with_the_texts_that_it_would_have_drawn(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    train_head(config(store, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, num_steps)
        train_head(config(store, tmp_path / "stopped"))
    torch.rand(7)  # of other random numbers nothing depends
    resume_run(tmp_path / "stopped")
    ours, theirs = (load_file(tmp_path / name / "head.safetensors") for name in ("stopped", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")


def test_the_texts_that_are_drawn_depend_on_the_seed(store: Path, tmp_path: Path) -> None:
    """MeanP has no weights to be drawn: its scale is all that is trained, by texts that differ."""
    scales = {}
    for seed in (0, 1):
        train_head(TrainingConfig(**{**vars(config(store, tmp_path / f"{seed}", prompt="meanp")), "seed": seed}))
        scales[seed] = load_file(tmp_path / f"{seed}" / "head.safetensors")["logit_scale"].item()
    assert scales[0] != scales[1]


@pytest.mark.parametrize("matches", ["softmax", "ideal"])
def test_it_learns_what_the_texts_mean(store: Path, tmp_path: Path, matches: str) -> None:
    """Without training every video is taken for the next class."""
    train_head(config(store, tmp_path / "run", epochs=20, lr=0.05, matches=matches))
    assert evaluate(tmp_path / "run", device="cpu").metrics.top1 == 1.0


def test_several_classes_a_video_are_trained_on_and_ranked_by_their_probability(several: Path, tmp_path: Path) -> None:
    train_head(config(several, tmp_path / "before", lr=1e-9, epochs=1))
    train_head(config(several, tmp_path / "after", lr=0.05, epochs=40))
    found = {name: evaluate(tmp_path / name, device="cpu") for name in ("before", "after")}
    precision = {name: one.metrics.mean_average_precision for name, one in found.items()}
    assert precision["after"] > 0.8 > 0.5 > precision["before"]
    with FeatureStore.open(several) as opened:
        videos = opened.videos("val")
        embeds = torch.tensor(opened.read("val", "embed", range(len(videos.ids))))
        truth = videos.columns["multi_hot"]
    with torch.inference_mode():
        p = Run.open(tmp_path / "before").load_head()(ClipFeatures(embed=embeds)).exp().numpy()
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    expected = np.mean([average_precision_score(truth[:, k], p[:, k]) for k in range(len(CLASSES))])
    assert precision["before"] == pytest.approx(expected)
    assert found["before"].predictions.kind == "sigmoid"


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"label_smoothing": 0.1}])
def test_what_its_loss_has_no_meaning_for_is_refused_before_there_is_a_run(
    store: Path, tmp_path: Path, settings: dict[str, float]
) -> None:
    with pytest.raises(SettingError, match="ActionCLIP has a loss of its own"):
        train_head(config(store, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
