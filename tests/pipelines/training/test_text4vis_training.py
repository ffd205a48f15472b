"""Text4Vis trained from stores: every classifier, what it is made of, and a stop in between."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logged import metrics_of
from named import named_store
from safetensors.torch import load_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from stops import stop_after
from torch import Tensor

from vcache.pipelines.class_text import text_constant
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.fitting_store import NoFittingStore
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.runs import Run
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.store.constants import Constant, write_constants
from vcache.store.reader import FeatureStore

CLASSES = ("jump", "run", "clap hands", "wave", "sit")
E, T, NUM_TRAIN, NUM_VAL = 7, 4, 40, 15


def number(video: str) -> int:
    return int(video.strip("trainvl"))


def embedded(video: str) -> np.ndarray:
    """Frames near the centre of the video's class."""
    rng = np.random.default_rng([5, *video.encode()])
    centres = np.random.default_rng(1).normal(size=(len(CLASSES), E))
    return 2.5 * centres[number(video) % len(CLASSES)] + rng.normal(size=(T, E))


def videos(several: bool = False) -> dict[str, list[tuple[str, Any]]]:
    def label(i: int) -> Any:
        return {CLASSES[i % len(CLASSES)]} if several else CLASSES[i % len(CLASSES)]

    return {s: [(f"{s}{i}", label(i)) for i in range(n)] for s, n in (("train", NUM_TRAIN), ("val", NUM_VAL))}


def text(templates: int, seed: int, width: int = E) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(CLASSES), templates, width)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the sets of templates "label", "many" of four, and "wide" of another encoder."""
    path = named_store(tmp_path_factory.mktemp("store") / "s.zarr", CLASSES, videos(), embed=embedded, text=text(1, 2))
    dims = ("class", "template", "channel")
    sets = {"many": text(1, 2) + 0.1 * text(4, 3), "wide": text(2, 4, width=11)}
    with FeatureStore.open(path) as opened:
        write_constants(opened, {text_constant(name): Constant(dims, values) for name, values in sets.items()})
    return path


def told(store: Path, out: Path, settings: dict[str, Any], **fields: Any) -> TrainingConfig:
    settings = {"temporal": "tap", "templates": "label", "epochs": 4, "batch_size": 16, "lr": 0.05, **settings}
    settings |= {"warmup_epochs": 0.0, "schedule_every": 1}
    return TrainingConfig(head="text4vis", store=store, out=out, device="cpu", settings=settings, **fields)


def trained(store: Path, out: Path, settings: dict[str, Any], **fields: Any) -> Run:
    train_head(told(store, out, settings, **fields))
    return Run.open(out)


def rows_of(run: Run) -> Tensor:
    return load_file(run.path / "head.safetensors")["classifier.embeddings"]


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "text": ({}, True),
    "text of a transformer": ({"temporal": "t_trans", "lr": 0.001}, True),
    "text of a convolution": ({"temporal": "t1d"}, True),
    "unfrozen text": ({"frozen": False}, True),
    "many templates": ({"training_templates": "many", "temporal": "t_trans", "lr": 0.001}, True),
    "another encoder": ({"templates": "wide", "temporal": "t_trans", "lr": 0.001}, True),
    "random": ({"classifier": "random", "temporal": "t_trans", "lr": 0.001}, False),
    "orthogonal": ({"classifier": "orthogonal", "temporal": "t_trans", "lr": 0.001}, False),
    "learned": ({"classifier": "learned"}, False),
    "discriminants": ({"classifier": "lda"}, False),
    "unfrozen discriminants": ({"classifier": "lda", "frozen": False, "lr": 0.001, "ema_decay": 0.9}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_every_classifier_trains_and_is_evaluated_as_it_was_validated(store: Path, tmp_path: Path, name: str) -> None:
    settings, by_text = CASES[name]
    run = trained(store, tmp_path / "run", settings)
    epochs = run.metrics()
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert evaluate(run.path, device="cpu").metrics.top1 == epochs[-1]["val_top1"]
    assert (run.requirements().text is None) != by_text
    if "discriminants" in name:
        assert epochs[-1]["val_top1"] > 0.7


def features_of(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The mean embeddings of videos of the train split, and their classes."""
    means = [embedded(f"train{i}").astype(np.float32).mean(axis=0) for i in rows]
    return np.stack(means), np.array(rows) % len(CLASSES)


def test_discriminants_are_those_of_the_clips_that_are_trained_on(store: Path, tmp_path: Path) -> None:
    """40 clips, 8 of each class; some of a class, some classes, and the order of the store's classes."""
    unshrunk = {"classifier": "lda", "epochs": 1, "lda_shrinkage": 0.0}
    run = trained(store, tmp_path / "all", unshrunk)
    check_rows(rows_of(run), list(range(NUM_TRAIN)))
    run = trained(store, tmp_path / "out", unshrunk, leave_out=("jump", "wave"))
    check_rows(rows_of(run), [i for i in range(NUM_TRAIN) if i % 5 not in (0, 3)])
    few = trained(store, tmp_path / "few", {"classifier": "lda", "epochs": 1, "lda_videos": 3}, data_seed=2)
    shots = trained(store, tmp_path / "shots", {"classifier": "lda", "epochs": 1}, shots=3, data_seed=2)
    torch.testing.assert_close(rows_of(few), rows_of(shots), rtol=0, atol=0)  # the same three of each class
    assert not torch.equal(rows_of(few), rows_of(Run.open(tmp_path / "all")))
    shrunk = trained(store, tmp_path / "shrunk", {"classifier": "lda", "epochs": 1, "lda_shrinkage": 1.0})
    features, labels = features_of(list(range(NUM_TRAIN)))
    means = np.stack([features[labels == k].mean(axis=0) for k in range(5)]) - features.mean(axis=0)
    torch.testing.assert_close(rows_of(shrunk), normalised(means), rtol=1e-5, atol=1e-5)


def check_rows(rows: Tensor, videos: list[int]) -> None:
    expected = LinearDiscriminantAnalysis().fit(*features_of(videos)).coef_
    torch.testing.assert_close(rows, normalised(expected), rtol=1e-4, atol=1e-4)


def normalised(rows: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).float()


@pytest.mark.parametrize(
    "settings",
    [
        {"classifier": "lda", "temporal": "t1d", "frozen": False, "ema_decay": 0.9},
        {"training_templates": "many", "temporal": "t1d"},
        {"templates": "wide", "temporal": "t1d"},
    ],
    ids=str,
)
def test_a_stop_changes_no_bit_and_a_resume_fits_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    whole = trained(store, tmp_path / "whole", settings)
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 4)
        train_head(told(store, tmp_path / "run", settings))
    monkeypatch.setattr("vcache.pipelines.training.group.fit_head", None)  # what is called would fail
    resume_run(tmp_path / "run")
    for file in ("head.safetensors", "best.safetensors"):
        torch.testing.assert_close(load_file(tmp_path / "run" / file), load_file(whole.path / file), rtol=0, atol=0)
    assert metrics_of(tmp_path / "run") == metrics_of(whole.path)


def test_a_run_that_was_killed_before_its_first_checkpoint_is_fitted_when_it_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"classifier": "lda", "temporal": "t1d"}
    whole = trained(store, tmp_path / "whole", settings)

    def killed(self: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vcache.pipelines.training.engine.TrainingLoop.run", killed)
        train_head(told(store, tmp_path / "run", settings))
    resume_run(tmp_path / "run")
    torch.testing.assert_close(rows_of(Run.open(tmp_path / "run")), rows_of(whole), rtol=0, atol=0)


def test_in_training_the_templates_are_drawn_from_their_set_and_validated_with_the_other(
    store: Path, tmp_path: Path
) -> None:
    one, other = (
        trained(store, tmp_path / name, {"temporal": "t1d", **settings})
        for name, settings in (("many", {"training_templates": "many"}), ("alone", {}))
    )
    torch.testing.assert_close(rows_of(one), rows_of(other), rtol=0, atol=0)
    assert one.metrics()[0]["train_loss"] != other.metrics()[0]["train_loss"]
    assert "training_texts" not in load_file(one.path / "head.safetensors")


def test_templates_to_train_on_that_are_not_there_are_named_with_the_command(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = told(store, tmp_path / "run", {"training_templates": "clip_kinetics"})
    with pytest.raises(HeadStoreMismatch, match=r"'clip_kinetics'.\nAdd them with:  vcache text .* clip_kinetics"):
        train_head(config)
    monkeypatch.setenv("VCACHE_HOME", str(store.parent))
    with pytest.raises(NoFittingStore, match="none of the templates 'clip_kinetics'"):
        train_head(told(None, tmp_path / "run", {"training_templates": "clip_kinetics"}))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_videos_of_several_classes_are_refused_with_the_heads_that_take_them(tmp_path: Path) -> None:
    path = named_store(tmp_path / "s.zarr", CLASSES, videos(several=True))
    with pytest.raises(HeadStoreMismatch, match="may have several. Heads that can be trained on it: .*evl"):
        trained(path, tmp_path / "run", {"classifier": "lda"})
    with pytest.raises(HeadStoreMismatch, match="may have several"):
        trained(path, tmp_path / "run", {})


def test_too_few_clips_to_fit_on_leave_no_run_folder(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="'text4vis' cannot be fitted on these videos: .* as two of one class do"):
        trained(store, tmp_path / "run", {"classifier": "lda", "lda_videos": 1})
    with pytest.raises(SettingError, match="'text4vis' is fitted on how the videos of a class differ, and --shots 1"):
        trained(store, tmp_path / "run", {"classifier": "lda"}, shots=1)
    assert not (tmp_path / "run").exists()


def test_more_classes_than_channels_have_no_orthogonal_rows(tmp_path: Path) -> None:
    names = tuple(f"c{i}" for i in range(E + 1))
    path = named_store(
        tmp_path / "s.zarr", names, {"train": [(f"v{i}", n) for i, n in enumerate(names)]}, text=text(1, 1)
    )
    with pytest.raises(SettingError, match=f"cannot have {E + 1} rows of {E} channels"):
        trained(path, tmp_path / "run", {"classifier": "orthogonal"})
