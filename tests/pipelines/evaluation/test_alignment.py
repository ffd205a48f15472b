"""Members of an ensemble are of the same videos, classes and targets, or the error says where they differ."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcache.pipelines.evaluation.alignment import EnsembleError
from vcache.pipelines.evaluation.members import Members, find_predictions, read_members
from vcache.pipelines.runs import Run, RunError

IDS = np.array(["a", "b", "c", "d", "e"])
NAMES = np.array(["jump", "run", "sit"])
TARGETS = np.array([0, 2, 1, 1, 0])
SCORES = np.arange(15, dtype=np.float32).reshape(5, 3) % 7
MULTI_HOT = np.eye(3, dtype=np.uint8)[TARGETS]


def write(path: Path, **fields: Any) -> Path:
    known: dict[str, Any] = {"scores": SCORES, "video_ids": IDS, "class_names": NAMES, "targets": TARGETS}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in {**known, **fields}.items() if value is not None})
    return path


def read(tmp_path: Path, one: dict[str, Any], other: dict[str, Any], **options: bool) -> Members:
    return read_members([write(tmp_path / "one.npz", **one), write(tmp_path / "other.npz", **other)], **options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"video_ids": np.array(["a", "b", "c", "d", "x"])},
            r"one.npz and other.npz are not of the same videos: 1 only in one.npz \(e\), 1 only in other.npz \(x\). Add "
            "--common to use the 4 that both have.",
        ),
        ({"video_ids": np.array(["v", "w", "x", "y", "z"])}, "have no video in common: a, b, c, ...; v, w, x, ..."),
        ({"class_names": np.array(["jump", "walk", "sit"])}, "class 'walk' that one.npz has not, which has class 'run' instead"),
        ({"class_names": np.array(["sit", "sit", "run"])}, "other.npz has class 'sit' 2 times"),
        ({"scores": np.zeros((5, 4), np.float32), "class_names": None}, "other.npz has 4 classes and one.npz 3"),
        (
            {"targets": np.array([0, 2, 1, 2, 1])},
            r"video 'd' is 'run' in one.npz and 'sit' in other.npz \(2 of 5 differ\). Name predictions of one annotation",
        ),
        ({"targets": np.array([0, 2, 3, 1, 0])}, "other.npz has a video of class 3, and 3 classes, which are numbered from 0"),
        ({"targets": np.array([0, 2, -1, 1, 0])}, "other.npz has a video of class -1, and 3 classes"),
        ({"targets": MULTI_HOT}, "other.npz has videos of several classes, and one.npz one class for each"),
        ({"kind": "sigmoid"}, "the scores of other.npz are for sigmoid, and the videos have one class each, which takes softmax"),
        ({"video_ids": None, "scores": SCORES[:4], "targets": None}, "other.npz has 4 videos and no video_ids, and 5 of one.npz"),
    ],
)  # fmt: skip
def test_members_that_differ_are_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match=message):
        read(tmp_path, {}, other)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    odd = SCORES.copy()
    odd[3, 1] = value
    with pytest.raises(
        EnsembleError, match="other.npz has scores that are no numbers, those of 1 videos, the first in row 3"
    ):
        read(tmp_path, {}, {"scores": odd, "kind": "softmax"})


def test_probabilities_of_zero_and_one_are_numbers(tmp_path: Path) -> None:
    """Their logarithms and log-odds are infinite."""
    certain = np.eye(3, dtype=np.float32)[TARGETS]
    members = read(tmp_path, {"scores": certain}, {"scores": certain.astype(np.float16)})
    assert all(p.equal(torch.from_numpy(certain).double()) for p in members.probabilities)
    members = read(tmp_path, {"scores": certain, "targets": MULTI_HOT}, {"scores": SCORES, "targets": MULTI_HOT})
    assert members.probabilities[0].equal(torch.from_numpy(certain).double())
    assert members.complements[0].equal(torch.from_numpy(1 - certain).double())


def test_scores_of_one_kind_do_not_go_with_the_targets_of_the_other(tmp_path: Path) -> None:
    """A file without targets and kind is read as one with a class for each video."""
    sigmoid = {"targets": MULTI_HOT, "kind": "sigmoid"}
    with pytest.raises(
        EnsembleError, match="other.npz are for softmax, .* may have several classes, which takes sigmoid. Add"
    ):
        read(tmp_path, sigmoid, {"targets": None})
    assert read(tmp_path, sigmoid, {"targets": None, "kind": "sigmoid"}).multi_label
    with pytest.raises(EnsembleError, match="video 'b' is 'sit' in one.npz and of no class in other.npz"):
        read(
            tmp_path, sigmoid, {"targets": MULTI_HOT * np.array([[1], [0], [1], [1], [1]], np.uint8), "kind": "sigmoid"}
        )


def test_targets_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match="none of one.npz, other.npz has targets, so no average can be measured"):
        read(tmp_path, {"targets": None}, {"targets": None})


def test_the_targets_of_one_are_those_of_all(tmp_path: Path) -> None:
    """In the order of the first member, whoever knows them."""
    order, classes = np.array([3, 1, 4, 0, 2]), np.array([2, 0, 1])
    shuffled = {
        "scores": SCORES[order][:, classes],
        "video_ids": IDS[order],
        "class_names": NAMES[classes],
        "targets": np.argsort(classes)[TARGETS][order],
    }
    members = read(tmp_path, {"targets": None}, shuffled)
    assert members.targets.tolist() == TARGETS.tolist()
    assert members.first.video_ids == tuple(IDS.tolist())
    assert members.probabilities[0].equal(members.probabilities[1])


def test_common_videos_are_used_where_asked_for(tmp_path: Path) -> None:
    keep = np.array([4, 1, 2])
    other = {"scores": SCORES[keep], "video_ids": np.array(["e", "b", "x"]), "targets": TARGETS[keep]}
    members = read(tmp_path, {}, other, common=True)
    assert members.first.video_ids == ("b", "e")
    assert members.targets.tolist() == TARGETS[[1, 4]].tolist()
    assert members.probabilities[0].equal(members.probabilities[1])
    assert "only the 2 videos that all members have are used." in members.notes


def test_common_videos_of_a_member_without_ids_cannot_be_known(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "one.npz"),
        write(tmp_path / "two.npz", video_ids=np.array(["a", "b", "c", "d", "x"])),
        write(tmp_path / "no-ids.npz", video_ids=None),
    ]
    with pytest.raises(
        EnsembleError, match="no-ids.npz has 5 videos and no video_ids, and 4 of one.npz are to be used"
    ):
        read_members(paths, common=True)


def test_members_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    x, y = write(tmp_path / "x" / "predictions" / "val.npz"), write(tmp_path / "y" / "predictions" / "val.npz")
    z = write(tmp_path / "x" / "predictions" / "val-3x1.npz")
    assert read_members([x, y]).names == ("x", "y")
    assert read_members([x, z]).names == ("val.npz", "val-3x1.npz")
    with pytest.raises(EnsembleError, match=r"x/predictions/val.npz is given twice. Name each member once"):
        read_members([x, x])


# A run folder as a member


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = Run.create(tmp_path / "run", {"head": "linear", "store": "s.zarr"}, tuple(NAMES.tolist()))
    made.save_head({})
    return made.path


def test_a_runs_only_predictions_are_taken(run: Path) -> None:
    path = write(run / "predictions" / "val-1x1.npz", split="val", views="1x1")
    assert find_predictions(run) == find_predictions(run, split="val") == find_predictions(path) == path


def test_the_last_weights_and_the_usual_average_come_before_others(run: Path) -> None:
    for suffix in ("", "-best", "-logits", "-best-logits"):
        write(run / "predictions" / f"val-1x1{suffix}.npz", split="val", views="1x1")
    assert find_predictions(run).name == "val-1x1.npz"


def test_of_several_the_split_and_the_views_choose(run: Path) -> None:
    for split, views in (("val", "1x1"), ("val", "3x1"), ("test", "1x1")):
        write(run / "predictions" / f"{split}-{views}.npz", split=split, views=views)
    assert find_predictions(run, split="test").name == "test-1x1.npz"
    assert find_predictions(run, split="val", views="3x1").name == "val-3x1.npz"
    with pytest.raises(
        EnsembleError, match=r"holds val-1x1.npz, val-3x1.npz: name one of them, or choose by --split and"
    ):
        find_predictions(run, split="val")


def test_a_run_without_predictions_is_sent_to_eval(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match=rf"{run} has no predictions. Make them with:  vcache eval {run}$"):
        find_predictions(run)
    with pytest.raises(
        EnsembleError, match=rf"in 3x1 views. Make them with:  vcache eval {run} --split val --views 3x1$"
    ):
        find_predictions(run, split="val", views="3x1")
    with pytest.raises(EnsembleError, match="gone is not there. Name a run folder, or a .npz with an array `scores`"):
        find_predictions(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty is not a run folder"):
        find_predictions(tmp_path / "empty")
