"""`vcache eval` where videos have several classes each, or none: mean sigmoid over the views, mAP, and what is saved."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from viewed import D, K, viewed_store

from vcache.heads.linear import LinearHead
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.runs import Run
from vcache.store.reader import FeatureStore
from vcache.store.writer import record_facts


def multi_hot(labels: np.ndarray) -> np.ndarray:
    """Two classes of every third video, none of every fifth."""
    hot = np.eye(K, dtype=np.uint8)[labels]
    hot[::3] |= np.roll(hot[::3], 1, axis=1)
    hot[4::5] = 0
    return hot


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with weights as they are drawn, on a store with 3x1 views of 7 videos."""
    store = tmp_path / "several.zarr"
    with viewed_store(store, columns={"multi_hot": multi_hot}) as opened:
        record_facts(opened, {"multi_label": True})
        manifest = opened.manifest
    config = {"head": "linear", "head_config": {"num_classes": K, "width": D}, "store": str(store), "dataset": "toy"}
    config |= {"store_key": manifest.key, "store_spec": manifest.spec, "train_split": "train"}
    made = Run.create(tmp_path / "run", config, manifest.class_names)
    made.save_head(LinearHead(LinearHead.Config(num_classes=K, width=D)).state_dict())
    return made.path


def expected_scores(run: Path) -> np.ndarray:
    """The mean sigmoid of the three views, in NumPy."""
    head = {name: x.double().numpy() for name, x in Run.open(run).load_head().state_dict().items()}
    with FeatureStore.open(Run.open(run).config["store"]) as store:
        x = np.stack([store.read("val", "cls/2", range(7), view=view) for view in (3, 4, 5)]).mean(axis=2)
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    logits = x @ head["classify.weight"].T + head["classify.bias"]  # the norm is as it was made: weight 1, bias 0
    return (1 / (1 + np.exp(-logits))).mean(axis=0)


def test_sigmoids_are_averaged_and_the_precision_of_each_class_is_their_ranking(run: Path) -> None:
    evaluation, scores = evaluate(run, device="cpu", batch_size=3), expected_scores(run)
    truth = multi_hot(np.arange(7) % K)
    np.testing.assert_allclose(evaluation.predictions.probabilities(), scores, rtol=1e-5)
    assert evaluation.predictions.kind == "sigmoid"
    np.testing.assert_array_equal(evaluation.predictions.targets, truth)
    expected = [average_precision_score(truth[:, k], scores[:, k]) for k in range(K)]
    metrics = evaluation.metrics
    assert metrics.mean_average_precision == pytest.approx(np.mean(expected))
    assert (metrics.top1, metrics.top5, metrics.mean_class_accuracy, metrics.views) == (None, None, None, "3x1")
    losses = -np.where(truth, np.log(scores), np.log1p(-scores))
    assert metrics.loss == pytest.approx(losses.mean(), rel=1e-5)
    rows = evaluation.per_class()
    assert [row.average_precision for row in rows] == pytest.approx(expected)
    assert [row.num_videos for row in rows] == truth.sum(axis=0).tolist()


def test_the_command_prints_and_saves_them(run: Path, vcache: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = vcache(f"eval {run} --per-class", columns=80)
    assert (status, err) == (0, "")
    evaluation, lines = evaluate(run, device="cpu"), out.splitlines()
    assert lines[0].split()[:3] == ["class", "videos", "AP"]
    shown = f"{evaluation.metrics.mean_average_precision:.1%} ["
    assert any(line.startswith("mAP ") and shown in line for line in lines)
    assert not any(line.startswith("top-1") for line in lines)
    assert "[low, high]: 95% of 500 bootstrap resamples of the videos" in lines
    loaded = Predictions.load(run / "predictions" / "val-3x1.npz")
    assert loaded.metrics() == evaluation.metrics
    with (run / "predictions" / "val-3x1.csv").open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert labels[:5] == ["a; b", "b", "c", "a; b", ""]
    printed = json.loads(vcache(f"eval {run} --json --no-save")[1])
    assert printed["monitored"] == {"name": "mAP", "value": evaluation.metrics.mean_average_precision}
