"""`vcache eval --classes`: on stores where features and text are made so that every answer is known."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from named import E, NamedHead, named_store

from vcache.heads import registry
from vcache.pipelines.evaluation.ensemble import EnsembleConfig, run_ensemble
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.evaluation.members import find_predictions
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.evaluation.saving import save_predictions
from vcache.pipelines.evaluation.zero_shot import chance, group_metrics, harmonic_mean
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.errors import StoreKeyMismatch

Vcache = Callable[..., tuple[int, str, str]]
CLASSES = ("jump", "run", "clap", "wave", "spin")
LEFT_OUT = ("run", "wave")


@pytest.fixture(autouse=True)
def _named_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._HEADS, "named", NamedHead)


def looks_like(classes: tuple[str, ...]) -> Callable[[str], np.ndarray]:
    """The embedding of "clap-3" is the text of "clap"; that of "clap-as-run-4" the text of "run", and a little of "clap"."""

    def embed(video: str) -> np.ndarray:
        *name, _ = video.split("-")
        weights = {name[0]: 0.1, name[-1]: 1.0}
        return sum((weight * np.eye(E)[classes.index(seen)] for seen, weight in weights.items()), np.zeros(E))

    return embed


def store_of(path: Path, classes: tuple[str, ...], val: list[str], **options: Any) -> Path:
    train = [f"{name}-{i}" for name in classes for i in range(2)]
    videos = {split: [(v, v.split("-")[0]) for v in names] for split, names in (("train", train), ("val", val))}
    return named_store(path, classes, videos, embed=looks_like(classes), **options)


VAL = [
    *("jump-0", "jump-1", "jump-as-run-2", "clap-0", "spin-0", "spin-as-clap-1"),  # 6 trained on
    *("run-0", "run-as-wave-1", "wave-0", "wave-as-jump-1", "wave-as-spin-2"),  # 5 left out
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A head that was trained, by steps too small to change its answers, without two of five classes."""
    store = store_of(tmp_path / "toy.zarr", CLASSES, VAL)
    settings = {"lr": 1e-6, "epochs": 1}
    train_head(
        TrainingConfig(
            head="named", store=store, out=tmp_path / "run", device="cpu", settings=settings, leave_out=LEFT_OUT
        )
    )
    return tmp_path / "run"


def right(run: Path, **options: Any) -> dict[str, bool]:
    """By video."""
    found = evaluate(run, device="cpu", batch_size=3, **options).predictions
    assert found.video_ids is not None and found.targets is not None and found.class_names is not None
    assert [found.class_names[k] for k in found.targets] == [video.split("-")[0] for video in found.video_ids]
    hits = found.scores.argmax(axis=1) == found.targets
    return dict(zip(found.video_ids, hits.tolist(), strict=True))


def test_left_out_classes_are_told_apart_by_their_text(run: Path) -> None:
    """Among themselves: what looks like a trained class besides is taken for the left-out one that it looks like a little."""
    expected = {"run-0": True, "run-as-wave-1": False, "wave-0": True, "wave-as-jump-1": True, "wave-as-spin-2": True}
    assert right(run, classes="left-out") == expected


def test_of_all_classes_each_video_is_held_against_all_names(run: Path) -> None:
    assert right(run, classes="all") == {video: "-as-" not in video for video in VAL}
    found = evaluate(run, device="cpu", classes="all").predictions
    assert found.trained_on is not None and found.trained_on.tolist() == [name not in LEFT_OUT for name in CLASSES]
    trained, left_out = groups = group_metrics(found)
    assert (trained.name, trained.num_classes, trained.metrics.num_videos, trained.metrics.top1) == (
        "trained",
        3,
        6,
        4 / 6,
    )
    assert (left_out.name, left_out.num_classes, left_out.metrics.num_videos, left_out.metrics.top1) == (
        "left-out",
        2,
        5,
        2 / 5,
    )
    assert harmonic_mean(groups) == pytest.approx(2 * (4 / 6) * (2 / 5) / (4 / 6 + 2 / 5))


def test_trained_classes_are_what_is_evaluated_unless_it_is_said(run: Path) -> None:
    expected = {video: video != "spin-as-clap-1" for video in VAL[:6]}  # run is no name to be taken for
    assert right(run) == right(run, classes="trained") == expected
    assert group_metrics(evaluate(run, device="cpu").predictions) == ()


def test_another_dataset_is_named_by_its_own_text_at_the_scale_of_training(run: Path, tmp_path: Path) -> None:
    classes = ("bow", "jump", "kick", "throw")
    val = ["bow-0", "jump-0", "kick-0", "throw-as-bow-0"]
    other = store_of(tmp_path / "other.zarr", classes, val, logit_scale=3.0, dataset="ucf 101")
    assert right(run, store=other, classes="all") == {video: "-as-" not in video for video in val}
    assert right(run, store=other, classes="left-out") == {"bow-0": True, "kick-0": True, "throw-as-bow-0": False}
    found = evaluate(run, device="cpu", store=other, classes="all")
    assert found.dataset == "ucf 101" and found.predictions.class_names == classes
    assert found.predictions.trained_on is not None
    assert found.predictions.trained_on.tolist() == [False, True, False, False]  # a name that was trained on
    np.testing.assert_allclose(found.predictions.scores[0], np.exp(2.0) * np.eye(4)[0], atol=1e-3)


def test_another_dataset_is_refused_unless_all_is_said(run: Path, tmp_path: Path) -> None:
    other = store_of(tmp_path / "other.zarr", ("bow", "kick"), ["bow-0"], dataset="ucf101")
    with pytest.raises(RunError, match=r"ucf101 with 2 classes that are not the same.* with --classes all"):
        evaluate(run, device="cpu", store=other)
    other = store_of(tmp_path / "coarse.zarr", ("bow", "kick"), ["bow-0"], spec={"model": "tiny", "dtype": "float16"})
    with pytest.raises(StoreKeyMismatch):
        evaluate(run, device="cpu", store=other, classes="all")


def test_a_head_without_text_knows_its_own_classes_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path / "toy.zarr", CLASSES, VAL)
    config = TrainingConfig(
        head="linear", store=store, out=tmp_path / "run", device="cpu", settings={"epochs": 1}, leave_out=LEFT_OUT
    )
    train_head(config)
    assert evaluate(tmp_path / "run", device="cpu").metrics.num_videos == 6
    for classes in ("left-out", "all"):
        with pytest.raises(
            RunError, match=f"--classes {classes}: head 'linear' .* by text can be asked for any: "
        ) as said:
            evaluate(tmp_path / "run", device="cpu", classes=classes)
        of_itself, with_setting = str(said.value).split(", and with --set classifier=text: ")
        assert {"dist", "named", "text4vis"} <= set(of_itself.split("any: ")[1].split(", "))
        assert {"aim", "finetune-top", "st-adapter"} <= set(with_setting.removesuffix(".").split(", "))


def test_what_there_is_nothing_of_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--classes 'unseen' is none of trained, left-out, all"):
        evaluate(run, device="cpu", classes="unseen")
    store = store_of(tmp_path / "kept.zarr", tuple(name for name in CLASSES if name not in LEFT_OUT), ["jump-0"])
    with pytest.raises(
        RunError, match="was trained on all 3 classes of .*kept.zarr: none was left out. Train with --leave-out"
    ):
        evaluate(run, device="cpu", store=store, classes="left-out")
    store = store_of(tmp_path / "few.zarr", CLASSES, ["jump-0"])
    with pytest.raises(RunError, match="no readable video of the left-out classes"):
        evaluate(run, device="cpu", store=store, classes="left-out")


def test_an_imported_head_without_text_is_given_that_of_the_store(run: Path, tmp_path: Path) -> None:
    config = {
        **Run.open(run).config,
        "store": None,
        "store_key": None,
        "store_spec": None,
        "train_split": None,
        "left_out": [],
    }
    config |= {"imported": {"settings": {}, "extract": "vcache extract toy"}}
    config["head_config"] = {**config["head_config"], "num_classes": 9}  # that no store has
    store = tmp_path / "toy.zarr"
    head = NamedHead(NamedHead.Config(num_classes=9, embed_dim=E))
    head.text.logit_scale.fill_(1.0)  # a checkpoint's own
    for name, names in (("named", CLASSES[::-1]), ("unnamed", None)):
        made = Run.create(tmp_path / name, config, names)
        made.save_head(head.state_dict())
        for classes in ("trained", "all"):
            assert right(made.path, store=store, classes=classes) == {video: "-as-" not in video for video in VAL}
        found = evaluate(made.path, device="cpu", store=store).predictions
        assert found.class_names == CLASSES and (found.trained_on is None) == (names is None)
        np.testing.assert_allclose(found.scores[0], np.exp(1.0) * np.eye(5)[0], atol=1e-3)
    with pytest.raises(RunError, match="imported without class names, so nobody knows"):
        evaluate(tmp_path / "unnamed", device="cpu", store=store, classes="left-out")
    other = store_of(tmp_path / "other.zarr", ("bow", "jump"), ["bow-0"])
    with pytest.raises(RunError, match="'spin' and 3 more are not among them.* with --classes all"):
        evaluate(tmp_path / "named", device="cpu", store=other)
    assert right(tmp_path / "named", store=other, classes="all") == {"bow-0": True}


def test_of_videos_with_several_classes_those_with_a_left_out_one_are_taken(tmp_path: Path) -> None:
    """Every class has a video of its own, so mean average precisions are 1 where nothing is taken for it."""
    rows = [
        ("jump-0", {"jump"}),
        ("run-1", {"run", "jump"}),
        ("clap-2", {"clap"}),
        ("wave-3", {"wave"}),
        ("spin-4", {"spin"}),
    ]
    rows += [("clap-as-run-5", {"clap"}), ("jump-6", set())]
    store = named_store(tmp_path / "s.zarr", CLASSES, {"train": rows, "val": rows}, embed=looks_like(CLASSES))
    train_head(
        TrainingConfig(
            head="named",
            store=store,
            out=tmp_path / "run",
            device="cpu",
            settings={"lr": 1e-6, "epochs": 1},
            leave_out=LEFT_OUT,
        )
    )
    taken = {}
    for classes in ("trained", "left-out", "all"):
        found = evaluate(tmp_path / "run", device="cpu", classes=classes).predictions
        assert found.targets is not None and found.class_names is not None and found.video_ids is not None
        taken[classes] = found.video_ids
        for video, target in zip(found.video_ids, found.targets, strict=True):
            assert {found.class_names[k] for k in np.flatnonzero(target)} == dict(rows)[video] & {*found.class_names}
    assert taken["left-out"] == ("run-1", "wave-3")
    assert sorted(taken["trained"] + taken["left-out"]) == sorted(taken["all"]) == sorted(video for video, _ in rows)
    trained, left_out = group_metrics(found)
    # run: "run-1" and "clap-as-run-5" both score for it, the first more; wave is alone
    assert left_out.metrics.mean_average_precision == pytest.approx(1.0)
    assert trained.metrics.mean_average_precision is not None and trained.metrics.num_videos == 7
    shares = np.array([1 + 1, 1, 2, 1, 1]) / 7
    assert chance(found) == {"mean_average_precision": pytest.approx(shares.mean())}


def test_chance_is_one_of_the_names(run: Path) -> None:
    found = chance(evaluate(run, device="cpu", classes="left-out").predictions)
    assert found == {"top1": 0.5, "top5": 1.0, "mean_class_accuracy": 0.5}
    assert chance(Predictions(scores=np.zeros((1, 20), np.float32), targets=np.zeros(1, np.int64)))["top5"] == 0.25


def test_the_harmonic_mean_is_none_of_a_group_of_which_nothing_is_right() -> None:
    scores = np.array([[1, 0], [1, 0]], dtype=np.float32)
    predictions = Predictions(scores=scores, targets=np.array([0, 1]), trained_on=np.array([True, False]), views="1x1")
    groups = group_metrics(predictions)
    assert [group.metrics.top1 for group in groups] == [1, 0] and harmonic_mean(groups) == 0
    assert harmonic_mean(()) is None


def test_each_choice_is_printed_and_saved_under_its_own_name(run: Path, tmp_path: Path, vcache: Vcache) -> None:
    status, out, _ = vcache(f"eval {run} --device cpu --classes left-out")
    assert status == 0
    assert "top-1                 80.0%" in out and "chance 50.0%" in out
    assert "(5 videos of the 2 classes that were not trained on, 1 view)" in out
    status, out, _ = vcache(f"eval {run} --device cpu --classes all")
    assert "chance 20.0%" in out and "(11 videos of all 5 classes, 1 view)" in out
    assert "trained               66.7%   top-1 of 3 classes, 6 videos" in out
    assert "left-out              40.0%   top-1 of 2 classes, 5 videos" in out
    assert "harmonic mean         50.0%" in out
    status, out, _ = vcache(f"eval {run} --device cpu")
    assert "chance" not in out and "harmonic" not in out and "(6 videos, 1 view)" in out
    other = store_of(tmp_path / "other.zarr", ("bow", "kick"), ["bow-0"], dataset="ucf 101")
    status, out, _ = vcache(f"eval {run} --device cpu --store {other} --classes all --json")
    described = json.loads(out)
    assert (described["of_classes"], described["num_classes"], described["chance"]["top1"]) == ("all", 2, 0.5)
    assert (described["groups"], described["harmonic_mean"]) == ([], None)
    names = {file.name for file in (run / "predictions").iterdir()}
    stems = ("val-1x1", "val-1x1-left-out", "val-1x1-all", "val-1x1-all-ucf_101")
    assert names == {f"{stem}.{end}" for stem in stems for end in ("npz", "csv")}
    found = Predictions.load(run / "predictions/val-1x1-all.npz")
    assert found.of_classes == "all" and found.trained_on is not None and found.trained_on.sum() == 3
    with (run / "predictions/val-1x1-all.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["classes"] for line in lines] == ["trained"] * 6 + ["left-out"] * 5
    with (run / "predictions/val-1x1.csv").open() as file:
        assert "classes" not in next(csv.reader(file))


def test_an_ensemble_takes_the_trained_classes_and_others_by_their_file(run: Path) -> None:
    for classes in ("trained", "all"):
        save_predictions(evaluate(run, device="cpu", classes=classes), run)
    assert find_predictions(run).name == "val-1x1.npz"
    alone = Predictions.load(find_predictions(run))
    reversed_ = run.parent / "reversed.npz"
    every = Predictions.load(run / "predictions/val-1x1-all.npz")
    assert every.targets is not None and every.class_names is not None and every.trained_on is not None
    assert alone.class_names == tuple(name for name in CLASSES if name not in LEFT_OUT)
    Predictions(
        scores=every.scores[:, ::-1].copy(),
        targets=4 - every.targets,
        video_ids=every.video_ids,
        class_names=every.class_names[::-1],
        trained_on=every.trained_on[::-1].copy(),
        of_classes="all",
        split="val",
        views="1x1",
    ).save(reversed_)
    found = run_ensemble(EnsembleConfig(members=(run / "predictions/val-1x1-all.npz", reversed_)))
    assert found.predictions.class_names == CLASSES
    assert found.predictions.trained_on is not None
    assert found.predictions.trained_on.tolist() == every.trained_on.tolist()
    assert torch.allclose(found.predictions.probabilities(), every.probabilities(), atol=1e-6)
