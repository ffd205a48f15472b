"""vcache train-head and eval: from the cache alone, reproducible, and honest about what is missing."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.evaluation.metrics import compute_metrics
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.fitting_store import NoFittingStore
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import ClipLoader, IncompleteSplit
from vcache.pipelines.loading.residency import DoesNotFit
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run, RunError, next_run_folder
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig, TrainingError
from vcache.pipelines.training.train_head import train_head
from vcache.store.errors import StoreKeyMismatch
from vcache.store.reader import FeatureStore

SHORT = {"epochs": 2, "batch_size": 5}


def train(store: Path | None, out: Path, head: str = "evl", **settings: object) -> Run:
    layers = {"layers": "-2:"} if head == "evl" else {}
    config = TrainingConfig(head=head, store=store, out=out, device="cpu", settings={**SHORT, **layers, **settings})
    train_head(config)
    return Run.open(out)


@pytest.mark.parametrize("head", ["linear", "evl"])
def test_training_opens_no_video(
    config: Callable[..., ExtractionConfig], video_folder: Path, tmp_path: Path, head: str
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(video_folder, videos)
    run_extraction(config(dataset=str(videos)))
    shutil.rmtree(videos)
    run = train(config().store, tmp_path / "run", head)
    assert len(run.metrics()) == 2


def test_a_run_folder_says_everything_needed_to_build_it_again(float32_store: Path, tmp_path: Path) -> None:
    run = train(float32_store, tmp_path / "run", lr="1e-3")
    with FeatureStore.open(float32_store) as store:
        assert run.config["store_key"] == store.manifest.key
    assert run.config["recipe"]["lr"] == 1e-3
    assert run.config["recipe"]["weight_decay"] == 0.05  # the paper's
    assert run.config["head_config"]["num_classes"] == 3
    assert (run.path / "classes.txt").read_text().splitlines() == ["clap hands", "jump", "wave"]
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [0, 1]
    assert metrics[-1]["step"] == 2 * math.ceil(12 / 5)
    state = run.load_head().state_dict()
    assert state.keys() == load_file(run.path / "head.safetensors").keys()


def test_eval_gives_the_numbers_of_the_last_epoch(float32_store: Path, tmp_path: Path) -> None:
    run = train(float32_store, tmp_path / "run")
    metrics = evaluate_run(run.path, device="cpu")
    last = run.metrics()[-1]
    assert metrics.num_videos == 6
    assert metrics.top1 == last["val_top1"]
    assert metrics.loss == pytest.approx(last["val_loss"], rel=1e-5)


def test_training_learns_the_train_split(float32_store: Path, tmp_path: Path) -> None:
    run = train(float32_store, tmp_path / "run", "linear", epochs=200, lr=3e-2)
    assert run.metrics()[-1]["train_top1"] == 1.0


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(float32_store: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = TrainingConfig(head="linear", store=float32_store, out=tmp_path / name, seed=seed, settings=SHORT)
        train_head(config)
        runs.append(load_file(tmp_path / name / "head.safetensors"))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert not torch.equal(runs[0]["classify.weight"], runs[2]["classify.weight"])


def test_without_a_store_the_one_that_fits_is_found(config: Callable[..., ExtractionConfig], tmp_path: Path) -> None:
    with pytest.raises(NoFittingStore, match="there is no store under .* yet"):
        train(None, tmp_path / "none")
    made = run_extraction(config(store=None))
    assert Path(train(None, tmp_path / "found").config["store"]) == Path(made.store).resolve()
    run_extraction(config(store=None, frames=4, split=("train",)))
    with pytest.raises(NoFittingStore, match="2 stores under .* fit head 'evl'") as caught:
        train(None, tmp_path / "two")
    assert str(caught.value).count("--store ") == 2


def test_depth_reads_the_last_layers(float32_store: Path, tmp_path: Path) -> None:
    config = TrainingConfig(
        head="evl", store=float32_store, out=tmp_path / "run", device="cpu", settings={**SHORT, "depth": "2"}
    )
    train_head(config)
    assert Run.open(tmp_path / "run").config["head_config"]["layers"] == [1, 2]  # of three blocks


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        (
            {"layers": "0:"},
            HeadStoreMismatch,
            "reads tokens of layers 0-2, Q/K of layers 0-2; split 'train' of tiny.zarr holds tokens of layers 1-2",
        ),
        ({"layers": "-7"}, HeadStoreMismatch, "reads a layer that .* does not have"),
        ({"num_frames": "16"}, HeadStoreMismatch, "clips of 16 frames; tiny.zarr holds clips of 5"),
        ({"widht": "3"}, SettingError, "unknown setting 'widht'. Did you mean 'width'"),
        ({"lr": "fast"}, SettingError, "float expected"),
        ({"num_classes": "2"}, SettingError, "num_classes: it comes from the store, which has 3"),
        ({"lr": "-1"}, SettingError, "lr .* must be above 0"),
        ({"epochs": 1, "steps": 3}, SettingError, "a run has one length"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(
    float32_store: Path, tmp_path: Path, setting: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        train(float32_store, tmp_path / "run", **setting)
    assert not (tmp_path / "run").exists()


def test_unfinished_extraction_is_refused_and_failed_videos_are_left_out(
    config: Callable[..., ExtractionConfig], video_folder: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(video_folder, videos)
    (videos / "train" / "jump" / "j2.mp4").write_bytes(b"")
    run_extraction(config(dataset=str(videos)))
    summary = train_head(TrainingConfig(head="linear", store=config().store, out=tmp_path / "run", settings=SHORT))
    assert (summary.num_train, summary.num_val, summary.num_failed) == (11, 6, 1)
    for record in (config().store / "_commit").rglob("train-*.json"):
        record.unlink()
    with pytest.raises(IncompleteSplit, match="12 of 12 videos of split 'train' .* are not extracted yet") as caught:
        train(config().store, tmp_path / "other", "linear")
    assert "vcache extract" in str(caught.value)


def test_a_run_is_never_written_over_and_an_unfinished_one_is_not_evaluated(
    float32_store: Path, tmp_path: Path
) -> None:
    run = train(float32_store, tmp_path / "run", "linear")
    with pytest.raises(RunError, match="is not empty"):
        train(float32_store, tmp_path / "run", "linear")
    (run.path / "head.safetensors").unlink()
    with pytest.raises(RunError, match="training did not finish"):
        evaluate_run(run.path)
    with pytest.raises(RunError, match="not a run folder"):
        evaluate_run(tmp_path)
    assert next_run_folder("evl", tmp_path / "runs").name == "evl-1"


def test_a_run_refuses_a_store_with_another_key(
    float32_store: Path, config: Callable[..., ExtractionConfig], tmp_path: Path
) -> None:
    run = train(float32_store, tmp_path / "run", "linear")
    run_extraction(config(preprocess="exact"))
    with pytest.raises(StoreKeyMismatch, match="preprocessing"):
        evaluate_run(run.path, store=config().store)
    with pytest.raises(RunError, match="has no split 'tset'; it has: train, val"):
        evaluate_run(run.path, split="tset")


def test_an_epoch_is_a_permutation_fixed_by_seed_and_number(float32_store: Path) -> None:
    plan = ReadPlan(tokens={}, cls={-1: 2}, maps={}, embed=False)

    def order(seed: int, epoch: int, batch_size: int) -> list[int]:
        with FeatureStore.open(float32_store) as store:
            made = {"batch_size": batch_size, "device": torch.device("cpu"), "order": EpochOrder(seed)}
            loader = ClipLoader(store, "train", plan, **made)
            return [int(row) for batch in loader.epoch(epoch) for row in batch.rows]

    assert sorted(order(0, 0, 5)) == list(range(12))
    assert order(0, 0, 5) == order(0, 0, 4) == order(0, 0, 12)
    assert len({tuple(order(seed, epoch, 5)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_metrics_equal_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 7, generator=generator), torch.randint(0, 6, (40,), generator=generator)
    metrics = compute_metrics(logits, labels)
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels, strict=True)]
    assert metrics.top1 == pytest.approx(np.mean([rank == 0 for rank in ranks]))
    assert metrics.top5 == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    per_class = [np.mean([rank == 0 for rank, y in zip(ranks, labels, strict=True) if y == c]) for c in range(6)]
    assert metrics.mean_class_accuracy == pytest.approx(np.mean(per_class))
    assert compute_metrics(logits[:, :3], labels % 3).top5 == 1.0


def test_a_loss_that_is_not_finite_ends_the_training(float32_store: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss is nan at step .* smaller --lr"):
        train(float32_store, tmp_path / "run", "linear", lr=1e30, epochs=5)
    with pytest.raises(RunError, match="training did not finish"):
        evaluate_run(tmp_path / "run")


def test_a_run_on_a_file_is_refused(float32_store: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file, and a run is a folder"):
        train(float32_store, tmp_path / "run", "linear")


def test_a_run_refuses_a_store_with_other_classes(
    float32_store: Path, config: Callable[..., ExtractionConfig], video_folder: Path, tmp_path: Path
) -> None:
    """The key is the same: it says how features were made, not of what."""
    run = train(float32_store, tmp_path / "run", "linear")
    shutil.copytree(video_folder, tmp_path / "other")
    for split in ("train", "val"):
        (tmp_path / "other" / split / "wave").rename(tmp_path / "other" / split / "dive")
    run_extraction(config(dataset=str(tmp_path / "other")))
    with pytest.raises(RunError, match="3 classes of .* that are not the same"):
        evaluate_run(run.path, store=config().store)


def test_a_run_trained_on_val_is_not_evaluated_on_val_unless_asked(float32_store: Path, tmp_path: Path) -> None:
    train_head(
        TrainingConfig(
            head="linear", store=float32_store, out=tmp_path / "run", settings=SHORT, train_split="val", device="cpu"
        )
    )
    with pytest.raises(RunError, match="no split to validate on .* besides 'val'; it has: train, val"):
        evaluate_run(tmp_path / "run")
    assert evaluate_run(tmp_path / "run", split="val").num_videos == 6


def test_an_incomplete_split_is_evaluated_where_that_is_asked_for(
    config: Callable[..., ExtractionConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    run_extraction(config())
    run = train(config().store, tmp_path / "run", "linear")
    next((config().store / "_commit").rglob("val-view-0-0.json")).unlink()
    with pytest.raises(IncompleteSplit, match="4 of 6 videos of split 'val' .*\n.*--allow-incomplete"):
        evaluate_run(run.path)
    assert evaluate_run(run.path, allow_incomplete=True).num_videos == 2


def test_a_store_that_cannot_fit_does_not_hide_the_one_that_does(
    config: Callable[..., ExtractionConfig], float32_store: Path, tmp_path: Path
) -> None:
    """No train split; damaged metadata; a backbone with too few blocks for the asked layers."""
    made = Path(run_extraction(config(store=None)).store)
    run_extraction(config(store=None, frames=4, split=("val",)))
    shutil.copytree(float32_store, made.parent / "damaged.zarr")
    (made.parent / "damaged.zarr" / "train" / "view-0" / "cls" / "2" / "zarr.json").write_text("{")
    assert Path(train(None, tmp_path / "run", "linear").config["store"]) == made.resolve()
    with pytest.raises(NoFittingStore, match="3 blocks"):
        train(None, tmp_path / "deep", layers="-9:")


def test_averaged_weights_are_validated_and_kept(float32_store: Path, tmp_path: Path) -> None:
    own = train(float32_store, tmp_path / "own", "linear")
    averaged = train(float32_store, tmp_path / "averaged", "linear", ema_decay=0.5)
    assert averaged.metrics()[-1]["train_loss"] == own.metrics()[-1]["train_loss"]
    assert averaged.metrics()[-1]["val_loss"] != own.metrics()[-1]["val_loss"]
    assert evaluate_run(averaged.path, device="cpu").loss == pytest.approx(averaged.metrics()[-1]["val_loss"], rel=1e-5)


def test_a_recipe_that_the_head_cannot_be_trained_by_leaves_no_run(float32_store: Path, tmp_path: Path) -> None:
    for settings, words in (
        ({"cutmix": 1.0}, "reads none"),
        ({"no_decay": ("nrom.*",)}, "fits no trainable parameter"),
    ):
        with pytest.raises(SettingError, match=words):
            train(float32_store, tmp_path / "run", "linear", **settings)
        assert not (tmp_path / "run").exists()


def test_a_folder_of_runs_is_no_run_and_one_of_them_is_named(float32_store: Path, tmp_path: Path) -> None:
    train(float32_store, tmp_path / "runs" / "linear-1", "linear")
    with pytest.raises(RunError, match="holds 1 run. Name one of them, as in:  .*runs/linear-1"):
        Run.open(tmp_path / "runs")


def test_features_that_do_not_fit_where_they_are_asked_for_leave_no_run_folder(
    float32_store: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(head="linear", store=float32_store, out=tmp_path / "run", resident="gpu", device="cpu")
    with pytest.raises(DoesNotFit, match="--resident ram"):
        train_head(config)
    assert not (tmp_path / "run").exists()
