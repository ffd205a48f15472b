"""`vcache eval` on stores with several evaluation views: their softmax averaged, and which they are said."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from viewed import ARRAYS, CLS, DEFINITIONS, HELD, TOKENS, evaluation, training, viewed_store

from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics
from vcache.pipelines.evaluation.predicting import predict_logits, predict_scores
from vcache.pipelines.loading.loader import ClipLoader, IncompleteSplit
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

GRID_3X1 = (3, 4, 5)


def train(store: Path, out: Path) -> Path:
    settings = {"epochs": 6, "batch_size": 5, "lr": 0.1}
    train_head(TrainingConfig(head="linear", store=store, out=out, device="cpu", settings=settings))
    return out


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of 12 videos to train on in 3 views and 7 to validate with in 3x1, and a run on it; read only."""
    folder = tmp_path_factory.mktemp("evaluation")
    viewed_store(folder / "views.zarr").close()
    return folder / "views.zarr", train(folder / "views.zarr", folder / "run")


def oracle(run: Path, store: Path, views: tuple[int, ...], rows: list[int]) -> Mapping[str, float]:
    """Metrics of the mean softmax, in NumPy from the weights and the store alone."""
    weights = {name: x.double().numpy() for name, x in Run.open(run).load_head().state_dict().items()}
    with FeatureStore.open(store) as opened:
        labels = opened.videos("val").labels[rows]
        total = 0.0
        for view in views:
            x = opened.read("val", "cls/2", rows, view=view).astype(np.float64).mean(axis=1)
            x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
            logits = (x * weights["norm.weight"] + weights["norm.bias"]) @ weights["classify.weight"].T
            powers = np.exp(logits + weights["classify.bias"])
            total = total + powers / powers.sum(axis=1, keepdims=True)
    hits = total.argmax(axis=1) == labels
    probabilities = total[np.arange(len(rows)), labels] / len(views)
    return {
        "top1": hits.mean(),
        "loss": -np.log(probabilities).mean(),
        "mean_class_accuracy": np.mean([hits[labels == label].mean() for label in np.unique(labels)]),
    }


def assert_metrics(metrics: Metrics, expected: Mapping[str, float]) -> None:
    assert {name: getattr(metrics, name) for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_scores_of_the_largest_grid_are_averaged(made: tuple[Path, Path]) -> None:
    store, run = made
    metrics = evaluate_run(run, device="cpu", batch_size=3)
    assert (metrics.num_videos, metrics.views) == (7, "3x1")
    expected = oracle(run, store, GRID_3X1, list(range(7)))
    assert_metrics(metrics, expected)
    assert expected["loss"] != pytest.approx(oracle(run, store, (0,), list(range(7)))["loss"], rel=1e-3)


def test_one_view_gives_the_numbers_of_the_last_epoch_bit_for_bit(made: tuple[Path, Path]) -> None:
    """Validation is on view 0; its scores are the logits, which nothing is done to."""
    store, run = made
    metrics, last = evaluate_run(run, views=(1, 1), device="cpu", batch_size=5), Run.open(run).metrics()[-1]
    assert metrics.views == "1x1"
    for name in ("loss", "top1", "top5", "mean_class_accuracy"):
        assert getattr(metrics, name) == last[f"val_{name}"]
    assert_metrics(metrics, oracle(run, store, (0,), list(range(7))))


def test_a_grid_that_is_not_there_is_refused_with_those_that_are(made: tuple[Path, Path]) -> None:
    store, run = made
    with pytest.raises(RunError) as caught:
        evaluate_run(run, views=(10, 3))
    assert str(caught.value).startswith(
        "--views 10x3: split 'val' of views.zarr holds 1x1, 3x1.\nAdd them with:  vcache extract toy --layers 2: "
    )
    assert f"--eval-views 10x3 --cross-frame none --store {store}" in str(caught.value)
    with pytest.raises(
        RunError, match="split 'train' of views.zarr holds 1x1. .* of the splits val, .* alone; leave --views out"
    ):
        evaluate_run(run, split="train", views=(3, 1))
    assert evaluate_run(run, split="train").views == "1x1"


def test_a_grid_that_is_not_complete_is_averaged_only_where_that_is_asked_for(tmp_path: Path) -> None:
    """4x1 has begun, 3x1 is there for all: an evaluation beside the extraction takes what is whole."""
    definitions = (*DEFINITIONS, *(evaluation(t, 4) for t in range(4)))
    held = {**HELD, "val": (*HELD["val"], 6, 7, 8, 9)}
    store = tmp_path / "store.zarr"
    viewed_store(store, definitions=definitions, held=held, missing={("val", 8, 1)}).close()
    run = train(store, tmp_path / "run")
    assert evaluate_run(run).views == "3x1"
    with pytest.raises(
        IncompleteSplit, match="2 of 7 videos of split 'val' .* yet in view 8. Finish with: .*--eval-views 4x1"
    ):
        evaluate_run(run, views=(4, 1))
    metrics = evaluate_run(run, views=(4, 1), allow_incomplete=True)
    assert (metrics.num_videos, metrics.views) == (5, "4x1")
    assert_metrics(metrics, oracle(run, store, (6, 7, 8, 9), [0, 1, 2, 3, 4]))


def test_a_video_that_failed_in_a_view_is_left_out_of_its_grid(tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    viewed_store(store, failed={("val", 4, 2)}).close()
    run = train(store, tmp_path / "run")
    metrics = evaluate_run(run)
    assert (metrics.num_videos, metrics.views) == (6, "3x1")
    assert_metrics(metrics, oracle(run, store, GRID_3X1, [0, 1, 3, 4, 5, 6]))
    assert evaluate_run(run, views=(1, 1)).num_videos == 7


def test_a_grid_of_other_layers_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    viewed_store(store, arrays={3: ARRAYS, 4: (TOKENS,), 5: ARRAYS}).close()
    run = train(store, tmp_path / "run")
    assert evaluate_run(run).views == "1x1"
    with pytest.raises(HeadStoreMismatch, match="view 4 of split 'val' .* tokens of layers 2.\n.*--eval-views 3x1 "):
        evaluate_run(run, views=(3, 1))


def test_a_grid_needs_nothing_of_view_0(tmp_path: Path) -> None:
    viewed_store(tmp_path / "store.zarr").close()
    run = train(tmp_path / "store.zarr", tmp_path / "run")
    viewed_store(tmp_path / "val.zarr", held={"val": HELD["val"]}, arrays={0: (TOKENS,)}).close()
    assert evaluate_run(run, store=tmp_path / "val.zarr").views == "3x1"


@pytest.mark.parametrize(
    "definitions",
    [
        (evaluation(0, 1), training(1, seed=5), training(2)),
        (evaluation(0, 1), evaluation(0, 2), evaluation(1, 2)),
    ],
)
def test_a_store_in_which_a_view_means_something_else_is_refused(
    made: tuple[Path, Path], tmp_path: Path, definitions: tuple[dict[str, Any], ...]
) -> None:
    viewed_store(tmp_path / "other.zarr", definitions=definitions, held={"val": (0, 1, 2)}).close()
    with pytest.raises(RunError, match="was trained on view 1 as .*training.*; in .*other.zarr view 1 is .* --store"):
        evaluate_run(made[1], store=tmp_path / "other.zarr")


def test_a_store_that_was_made_to_evaluate_alone_is_taken(made: tuple[Path, Path], tmp_path: Path) -> None:
    """It says nothing of the views that the run was trained on, so nothing else either. So it is with runs of before."""
    viewed_store(tmp_path / "val.zarr", definitions=(), held={"val": (0,)}).close()
    assert evaluate_run(made[1], store=tmp_path / "val.zarr").num_videos == 7
    old = tmp_path / "old"
    Run.create(old, {k: v for k, v in Run.open(made[1]).config.items() if k != "views"}, ("a", "b", "c"))
    (old / "head.safetensors").write_bytes((made[1] / "head.safetensors").read_bytes())
    assert evaluate_run(old) == evaluate_run(made[1])


class Sure(nn.Module):
    """Logits so large that all but one softmax are 0 in float32: the class is the sign of the first feature."""

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        x = features.cls[-1][:, 0, :3]
        return 300 * x


def test_scores_of_a_head_that_is_sure_are_finite_and_in_order(made: tuple[Path, Path]) -> None:
    plan = ReadPlan(tokens={}, cls={-1: 2}, maps={}, embed=False)
    with FeatureStore.open(made[0]) as store:
        loader = ClipLoader(
            store, "val", plan, batch_size=3, device=torch.device("cpu"), views=GRID_3X1, all_views=True
        )
        scores, labels = predict_scores(Sure(), loader)
        logits = [predict_logits(Sure(), loader.in_order(view))[0].numpy().astype(np.longdouble) for view in GRID_3X1]
    assert scores.isfinite().all()
    assert np.isfinite(compute_metrics(scores, labels).loss)
    shifted = [x - x.max(axis=1, keepdims=True) for x in logits]
    logs = [x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in shifted]
    expected = np.logaddexp(np.logaddexp(logs[0], logs[1]), logs[2]) - np.log(np.longdouble(3))
    np.testing.assert_allclose(scores.numpy(), expected.astype(np.float64), rtol=1e-10)
    assert (np.exp(scores.float().numpy()) == 0).any()  # so the logarithms were needed


def test_the_command_line_says_what_was_averaged(
    vcache: Callable[[str], tuple[int, str, str]], made: tuple[Path, Path]
) -> None:
    _, run = made
    assert "(7 videos, mean of 3x1 views)" in vcache(f"eval {run} --no-save")[1]
    assert "(7 videos, 1 view)" in vcache(f"eval {run} --views 1x1 --no-save")[1]
    printed = json.loads(vcache(f"eval {run} --views 3x1 --json --no-save")[1])
    assert printed["views"] == "3x1"
    assert printed.items() >= asdict(evaluate_run(run)).items()
    status, _, err = vcache(f"eval {run} --views 3")
    assert (status, "say TxS" in err) == (1, True)


def test_the_values_of_the_views_differ_so_that_a_mixed_one_would_show(made: tuple[Path, Path]) -> None:
    with FeatureStore.open(made[0]) as store:
        means = [store.read("val", CLS.name, range(7), view=view).mean() for view in HELD["val"]]
    assert np.all(np.diff(means) > 5)
