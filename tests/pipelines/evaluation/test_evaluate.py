"""`vcache eval` on real stores: ways to average, labels of other kinds, what is saved and what is printed."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from viewed import DEFINITIONS, K, viewed_store

from vcache.pipelines.evaluation.evaluate import evaluate, evaluate_run
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore
from vcache.store.writer import record_facts

Vcache = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a store of 12 videos to train on and 7 to validate with in 3x1 views; read only."""
    folder = tmp_path_factory.mktemp("evaluate")
    viewed_store(folder / "views.zarr").close()
    settings = {"epochs": 6, "batch_size": 5, "lr": 0.1}
    train_head(
        TrainingConfig(head="linear", store=folder / "views.zarr", out=folder / "run", device="cpu", settings=settings)
    )
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The same to write into."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def outputs(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(views, videos, width) mean CLS and (views, videos, classes) logits of 3x1, in NumPy."""
    weights = {name: x.double().numpy() for name, x in Run.open(run).load_head().state_dict().items()}
    with FeatureStore.open(Run.open(run).config["store"]) as store:
        cls = np.stack([store.read("val", "cls/2", range(7), view=view).mean(axis=1) for view in (3, 4, 5)])
    return cls, classified(cls, weights)


def classified(cls: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    x = (cls - cls.mean(axis=-1, keepdims=True)) / np.sqrt(cls.var(axis=-1, keepdims=True) + 1e-5)
    x = x * weights["norm.weight"] + weights["norm.bias"]
    return x @ weights["classify.weight"].T + weights["classify.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def test_each_way_to_average_is_what_it_says(trained: Path) -> None:
    cls, logits = outputs(trained)
    weights = {name: x.double().numpy() for name, x in Run.open(trained).load_head().state_dict().items()}
    expected = {
        "softmax": softmax(logits).mean(axis=0),
        "logits": softmax(logits.mean(axis=0)),
        "embeddings": softmax(classified(cls.mean(axis=0), weights)),
    }
    for average, probabilities in expected.items():
        found = evaluate(trained, average=average, device="cpu", batch_size=3).predictions
        assert (found.average, found.views) == (average, "3x1")
        np.testing.assert_allclose(found.probabilities(), probabilities, rtol=1e-4)
    assert np.abs(expected["softmax"] - expected["embeddings"]).max() > 0.01
    default = evaluate(trained, device="cpu").predictions
    np.testing.assert_allclose(default.probabilities(), expected["softmax"], rtol=1e-4)


@pytest.mark.parametrize("average", ["softmax", "logits", "embeddings"])
def test_of_one_view_nothing_is_averaged(trained: Path, average: str) -> None:
    one = evaluate(trained, views=(1, 1), average=average, device="cpu")
    assert one.metrics == evaluate_run(trained, views=(1, 1), device="cpu")


def test_predictions_say_where_they_come_from_and_give_the_same_metrics(trained: Path) -> None:
    evaluation = evaluate(trained, device="cpu")
    found, config = evaluation.predictions, Run.open(trained).config
    assert found.metrics() == evaluation.metrics
    assert (found.video_ids, found.paths) == (
        tuple(f"w{row}" for row in range(7)),
        tuple(f"w{row}.mp4" for row in range(7)),
    )
    assert (found.class_names, found.kind, found.split) == (("a", "b", "c"), "softmax", "val")
    assert (found.store_key, found.run) == (config["store_key"], str(trained))
    assert found.targets is not None and found.targets.tolist() == [row % K for row in range(7)]


def test_a_video_that_failed_has_no_prediction(tmp_path: Path) -> None:
    viewed_store(tmp_path / "s.zarr", failed={("val", 4, 2)}).close()
    settings = {"epochs": 1, "batch_size": 5}
    config = TrainingConfig(
        head="linear", store=tmp_path / "s.zarr", out=tmp_path / "run", device="cpu", settings=settings
    )
    train_head(config)
    evaluation = evaluate(tmp_path / "run", device="cpu")
    assert evaluation.num_failed == 1
    assert evaluation.predictions.video_ids == tuple(f"w{row}" for row in (0, 1, 3, 4, 5, 6))
    assert evaluation.predictions.metrics() == evaluation.metrics


def test_the_best_weights_are_taken_where_they_are_asked_for(run: Path, vcache: Vcache) -> None:
    last = evaluate_run(run, device="cpu")
    (run / "best.safetensors").unlink()
    with pytest.raises(RunError, match="has no best.safetensors, as runs have that were validated .*  --which last"):
        evaluate_run(run, which="best", device="cpu")
    with pytest.raises(RunError, match="--which 'first' is not there; a run has weights last and best"):
        evaluate_run(run, which="first", device="cpu")
    Run.open(run).save_head({name: x + 1 for name, x in Run.open(run).load_head().state_dict().items()})
    (run / "head.safetensors").rename(run / "best.safetensors")
    (run / "head.safetensors").write_bytes((run / "best.safetensors").read_bytes())
    assert evaluate_run(run, device="cpu") == evaluate_run(run, which="best", device="cpu") != last
    assert vcache(f"eval {run} --which best")[0] == 0
    assert (run / "predictions" / "val-3x1-best.npz").is_file()


def test_predictions_are_written_beside_the_run(run: Path, vcache: Vcache) -> None:
    status, out, err = vcache(f"eval {run}")
    assert (status, err) == (0, "")
    assert f"saved {run}/predictions/val-3x1.npz and .csv" in out
    loaded = Predictions.load(run / "predictions" / "val-3x1.npz")
    assert loaded.metrics() == evaluate_run(run, device="cpu")
    with (run / "predictions" / "val-3x1.csv").open() as file:
        assert [row["video_id"] for row in csv.DictReader(file)] == list(loaded.video_ids or ())
    vcache(f"eval {run} --average logits")
    vcache(f"eval {run} --average logits --views 1x1")
    vcache(f"eval {run} --split train")
    stems = {file.stem for file in (run / "predictions").iterdir()}
    assert stems == {"val-3x1", "val-3x1-logits", "val-1x1", "train-1x1"}


def test_predictions_are_written_where_it_is_said_or_nowhere(run: Path, tmp_path: Path, vcache: Vcache) -> None:
    vcache(f"eval {run} --save {tmp_path}/scores.npz")
    vcache(f"eval {run} --save {tmp_path}/folder")
    assert {file.name for file in tmp_path.glob("scores.*")} == {"scores.npz", "scores.csv"}
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"val-3x1.npz", "val-3x1.csv"}
    status, out, _ = vcache(f"eval {run} --no-save")
    assert status == 0 and "saved" not in out
    assert not (run / "predictions").exists()
    assert vcache(f"eval {run} --no-save --save {tmp_path}/x.npz")[0] == 2


def test_a_run_that_cannot_be_written_into_is_evaluated_all_the_same(run: Path, tmp_path: Path, vcache: Vcache) -> None:
    (run / "predictions").write_text("a file where a folder should be")
    status, out, err = vcache(f"eval {run}")
    assert (status, "top-1" in out) == (0, True)
    assert "note: the predictions are not saved: " in err and "Name a place with --save, or say --no-save." in err
    (tmp_path / "file").touch()
    status, _, err = vcache(f"eval {run} --save {tmp_path}/file/x.npz")
    assert (status, "error: " in err) == (1, True)


def test_the_json_has_everything(run: Path, vcache: Vcache) -> None:
    printed = json.loads(vcache(f"eval {run} --json")[1])
    evaluation = evaluate(run, device="cpu")
    assert printed.items() >= asdict(evaluation.metrics).items()
    assert printed["monitored"] == {"name": "top-1", "value": evaluation.metrics.top1}
    assert (printed["which"], printed["split"], printed["average"], printed["kinds"]) == ("last", "val", "softmax", [])
    assert printed["intervals"]["top1"] == asdict(evaluation.intervals()["top1"])
    assert printed["classes"] == [asdict(row) for row in evaluation.per_class()]
    assert printed["saved"] == [str(run / "predictions" / f"val-3x1{suffix}") for suffix in (".npz", ".csv")]


def test_the_screen_fits_into_80_columns(run: Path, vcache: Vcache) -> None:
    _, out, _ = vcache(f"eval {run} --per-class --no-save --average logits", columns=80)
    evaluation = evaluate(run, average="logits", device="cpu")
    lines, interval = out.splitlines(), evaluation.intervals()["top1"]
    assert max(map(len, lines)) <= 80
    assert evaluation.metrics.top1 is not None
    shown = f"{evaluation.metrics.top1:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    assert any(line.startswith("top-1 ") and line.endswith(f" {shown}") for line in lines)
    assert "(7 videos, mean of 3x1 views), averaged: logits" in lines
    assert "[low, high]: 95% of 2000 bootstrap resamples of the videos" in lines
    assert lines[0].split() == ["class", "videos", "top-1", "most", "confused", "with"]
    assert {line.split()[0] for line in lines[1:4]} == {"a", "b", "c"}
    worst = [float(line.split()[2].rstrip("%")) for line in lines[1:4]]
    assert worst == sorted(worst)


def test_verb_and_noun_are_printed_beside_the_action(trained: Path, vcache: Vcache, tmp_path: Path) -> None:
    """The same features in a store whose videos have a verb and a noun: classes a and b share a verb, b and c a noun."""
    store, verbs, nouns = tmp_path / "epic.zarr", np.array([0, 0, 1]), np.array([0, 1, 1])
    columns = {"verb": verbs, "noun": nouns}
    with viewed_store(store, columns={kind: values.__getitem__ for kind, values in columns.items()}) as opened:
        record_facts(opened, {"label_names": {"verb": ["take", "put"], "noun": ["cup", "pan"]}})
    evaluation = evaluate(trained, store=store, device="cpu")
    probabilities, labels = evaluation.predictions.probabilities().numpy(), np.arange(7) % K
    for kind, values in zip(evaluation.kinds, (nouns, verbs), strict=True):
        summed = np.stack([probabilities[:, values == value].sum(axis=1) for value in (0, 1)], axis=1)
        assert kind.top1 == pytest.approx((summed.argmax(axis=1) == values[labels]).mean())
    assert [kind.kind for kind in evaluation.kinds] == ["noun", "verb"]
    out = vcache(f"eval {trained} --store {store} --no-save")[1]
    assert f"verb                 top-1 {evaluation.kinds[1].top1:6.1%}   top-5 100.0%" in out
    printed = json.loads(vcache(f"eval {trained} --store {store} --no-save --json")[1])
    assert printed["kinds"] == [asdict(kind) for kind in evaluation.kinds]


def test_views_of_the_store_are_those_that_the_tests_think() -> None:
    assert [definition["temporal"] for definition in DEFINITIONS[3:]] == [[0, 3], [1, 3], [2, 3]]
