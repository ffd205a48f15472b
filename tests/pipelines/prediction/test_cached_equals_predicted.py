"""The promise of `vcache predict`: of the same video a head says what `vcache eval` says of the stored features."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.prediction.predict import PredictConfig, Prediction, predict
from vcache.pipelines.prediction.video_model import open_video_model
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head

MakeConfig = Callable[..., ExtractionConfig]
SHORT = {"epochs": 1, "batch_size": 6, "lr": 0.02}
EVL = {"layers": "-2:", "mlp_dropout": 0.0}
AIM = {"blocks": 2, "bottleneck": 0.25}

CASES = {
    "linear float16": ("linear", {}, {"dtype": "float16", "cross_frame": "none"}, 1),
    "evl float16 maps": ("evl", EVL, {"dtype": "float16", "cross_frame": "maps"}, 1),
    "evl bfloat16 derive": ("evl", EVL, {"dtype": "bfloat16", "cross_frame": "derive"}, 1),
    "evl int8 qk, every 2nd frame": ("evl", EVL, {"dtype": "int8", "cross_frame": "qk", "frames": 6}, 2),
    "aim int8": ("aim", AIM, {"dtype": "int8", "cross_frame": "none", "layers": "0:"}, 1),
    "text4vis float16": ("text4vis", {}, {"dtype": "float16", "layers": "none", "cross_frame": "none"}, 1),
}
"""Head, its settings, the store, --frame-step."""


def trained(store: Path, out: Path, head: str, frame_step: int = 1, **settings: object) -> Path:
    both = {**SHORT, **settings}
    train_head(TrainingConfig(head=head, store=store, out=out, device="cpu", frame_step=frame_step, settings=both))
    return out


def scores_of(found: Prediction) -> np.ndarray:
    assert not found.failures
    return torch.stack([one.scores for one in found.whole if one.scores is not None]).numpy()


def predicted(run: Path, videos: Sequence[object], **options: object) -> Prediction:
    config = PredictConfig(run=run, videos=tuple(map(str, videos)), device="cpu", decode_workers=2, **options)  # type: ignore[arg-type]
    return predict(config)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_stored_features_bit_for_bit(
    case: str, config: MakeConfig, video_folder: Path, worded_clip: Path, tmp_path: Path
) -> None:
    """In batches of as many clips as the store was made in: sums then have the same order."""
    head, settings, words, frame_step = CASES[case]
    if head == "text4vis":
        words = {**words, "model": f"local-dir:{worded_clip}"}
    made = config(**words, max_error=1.0)
    run_extraction(made)
    assert made.store is not None
    run = trained(Path(str(made.store)), tmp_path / "run", head, frame_step, **settings)
    expected = evaluate(run, device="cpu", batch_size=3).predictions
    assert expected.paths is not None and len(expected) == 6
    found = predicted(run, [video_folder / path for path in expected.paths])
    np.testing.assert_array_equal(scores_of(found), expected.scores)
    assert np.ptp(expected.scores, axis=0).max() > 1e-4  # the videos are told apart
    assert found.model.class_names == expected.class_names


@pytest.fixture(scope="module")
def evl_run(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return trained(float32_store, tmp_path_factory.mktemp("runs") / "evl", "evl", **EVL)


def test_dist_with_its_pixels_and_text_in_batches_of_another_size(dist_run: Path, video_folder: Path) -> None:
    expected = evaluate(dist_run, device="cpu").predictions
    assert expected.paths is not None
    found = predicted(dist_run, [video_folder / path for path in expected.paths], batch_size=2)
    np.testing.assert_allclose(scores_of(found), expected.scores, atol=1e-5, rtol=1e-5)


def test_views_are_averaged_as_an_evaluation_averages_them(
    evl_run: Path, config: MakeConfig, video_folder: Path
) -> None:
    """Of a store that has no such views; the evaluation reads another one that has them."""
    made = config(eval_views="2x3")
    run_extraction(made)
    expected = evaluate(evl_run, store=made.store, device="cpu").predictions
    assert expected.paths is not None and expected.views == "2x3"
    found = predicted(evl_run, [video_folder / path for path in expected.paths], views=(2, 3))
    np.testing.assert_allclose(scores_of(found), expected.scores, atol=1e-5, rtol=1e-5)


def test_mean_embeddings_are_classified_once(
    config: MakeConfig, worded_clip: Path, video_folder: Path, tmp_path: Path
) -> None:
    made = config(
        model=f"local-dir:{worded_clip}", dtype="float16", layers="none", cross_frame="none", eval_views="3x1"
    )
    run_extraction(made)
    run = trained(Path(str(made.store)), tmp_path / "run", "text4vis")
    expected = evaluate(run, device="cpu").predictions
    assert expected.paths is not None and expected.average == "embeddings"
    found = predicted(run, [video_folder / path for path in expected.paths], views=(3, 1))
    assert found.average == "embeddings"
    np.testing.assert_allclose(scores_of(found), expected.scores, atol=1e-5, rtol=1e-5)


def test_the_best_weights_are_others_than_the_last(float32_store: Path, video_folder: Path, tmp_path: Path) -> None:
    run = trained(float32_store, tmp_path / "run", "linear", epochs=3, lr=3.0)
    (run / "best.safetensors").write_bytes(
        (trained(float32_store, tmp_path / "b", "linear") / "head.safetensors").read_bytes()
    )
    video = video_folder / "val/jump/j1.mp4"
    last, best = (scores_of(predicted(run, [video], which=which)) for which in ("last", "best"))
    np.testing.assert_array_equal(best, scores_of(predicted(tmp_path / "b", [video])))
    assert np.abs(last - best).max() > 1e-3


def test_the_model_holds_no_store_open_and_needs_none_of_its_videos(evl_run: Path, float32_store: Path) -> None:
    model = open_video_model(evl_run, device="cpu")
    assert [spec.name for spec in model.arrays] == list(model.plan.arrays)
    assert model.usual_frames == 5 * 3 and model.store is not None and Path(str(model.store)) == float32_store
