"""What a prediction says besides its scores: probabilities of several classes, completeness, crops that there are none of; and
that an exported folder keeps what is not in the weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.extract.datasets.base import Video
from vcache.extract.video import Segment, VideoError
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.prediction.export import export_run
from vcache.pipelines.prediction.predict import PredictConfig, PredictError, Prediction, predict
from vcache.pipelines.prediction.screen import described, save_predictions
from vcache.pipelines.prediction.stream import VideoScores
from vcache.pipelines.prediction.video_model import VideoModel, open_video_model
from vcache.pipelines.prediction.windows import Timeline
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head

VIDEO = Video("v", "/v.mp4", -1, "none", segment=Segment(0.0, 3.0, "seconds"))
SCORES = torch.tensor([2.0, -1.0, 0.5])


@pytest.fixture(scope="module")
def run(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "linear"
    short = {"epochs": 1, "batch_size": 6, "lr": 0.1}
    train_head(TrainingConfig(head="linear", store=float32_store, out=out, device="cpu", settings=short))
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> VideoModel:
    return open_video_model(run, device="cpu")


def prediction(model: VideoModel, *whole: VideoScores, timelines: tuple[Timeline, ...] = ()) -> Prediction:
    return Prediction(model=model, views=(1, 1), average="softmax", num_others=0, whole=whole, timelines=timelines)


def test_where_a_video_may_have_several_classes_each_has_a_probability_of_its_own(
    model: VideoModel, tmp_path: Path
) -> None:
    several = replace(model, multi_label=True)
    one = VideoScores(video=VIDEO, scores=SCORES, num_video_frames=9, fps=3.0)
    wanted = 1 / (1 + np.exp(-SCORES.double().numpy()))
    found = prediction(several, one)
    told = {top["class"]: top["probability"] for top in described(found, 3, None, [])["videos"][0]["top"]}
    np.testing.assert_allclose([told[name] for name in several.class_names], wanted, rtol=1e-9)
    np.testing.assert_allclose(Timeline.of(several, VIDEO, [one]).probabilities[0], wanted, rtol=1e-6)
    save_predictions(found, tmp_path / "p.npz")
    saved = Predictions.load(tmp_path / "p.npz")
    np.testing.assert_allclose(saved.probabilities()[0], wanted, rtol=1e-5)


def test_a_prediction_with_a_window_that_could_not_be_read_is_not_complete(model: VideoModel) -> None:
    read, broken = VideoScores(video=VIDEO, scores=SCORES), VideoScores(video=VIDEO, failure=VideoError("timeout", "x"))
    assert prediction(model, read).is_complete and not prediction(model, read, broken).is_complete
    for windows, complete in [((read, read), True), ((read, broken), False)]:
        timeline = Timeline.of(model, VIDEO, windows)
        assert prediction(model, timelines=(timeline,)).is_complete is complete
        assert np.isnan(timeline.probabilities).all(axis=1).tolist() == [False, not complete]


def test_squashed_frames_have_one_crop(model: VideoModel, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    squashed = replace(model.extractor.preprocessing, resize_mode="squash")
    monkeypatch.setattr(model.extractor, "preprocessing", squashed)
    monkeypatch.setattr("vcache.pipelines.prediction.predict.open_video_model", lambda *_, **__: model)
    with pytest.raises(PredictError, match=r"--views 2x3: .* Say --views 2x1"):
        predict(PredictConfig(run=run, videos=("nothing",), views=(2, 3), device="cpu"))


def test_an_exported_folder_keeps_what_is_not_in_the_weights(
    model: VideoModel, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(model, multi_label=True, outputs=(2, 0, 1), usual_frames=77)
    monkeypatch.setattr("vcache.pipelines.prediction.export.open_video_model", lambda *_, **__: made)
    exported = open_video_model(export_run(run, out=tmp_path / "folder").folder, device="cpu")
    for name in ("name", "multi_label", "outputs", "usual_frames", "class_names", "store_key", "arrays", "plan"):
        assert getattr(exported, name) == getattr(made, name), name
    for name in ("batch_size", "num_threads", "decoder", "sampling", "preprocessing"):
        assert getattr(exported.extractor, name) == getattr(made.extractor, name), name
    outputs = torch.tensor([[10.0, 11.0, 12.0]])
    assert exported._of_classes(outputs).tolist() == [[12.0, 10.0, 11.0]]
