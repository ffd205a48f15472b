"""The file of predictions: a round trip, files of others, and files that are refused."""

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vcache.pipelines.evaluation.metrics import ScoresError, compute_metrics
from vcache.pipelines.evaluation.predictions import Predictions, PredictionsError

M, K = 5, 3
SCORES = np.random.default_rng(0).normal(size=(M, K)).astype(np.float32)
TARGETS = np.array([0, 2, 1, 1, 0])
SEVERAL = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=np.uint8)
IDS = tuple(f"v{row}" for row in range(M))
FULL: dict[str, Any] = {
    "scores": SCORES,
    "targets": TARGETS,
    "video_ids": IDS,
    "paths": ("a b/ä.mp4", "", "c,d.mp4", 'e"f.mp4', "g\nh.mp4"),
    "class_names": ("clap; hands", "jump, high", "wave"),
    "split": "val",
    "views": "3x1",
    "average": "softmax",
    "store_key": "k",
    "run": "runs/evl-1",
}


def assert_same(first: Predictions, second: Predictions) -> None:
    for name in Predictions.__dataclass_fields__:
        ours, theirs = getattr(first, name), getattr(second, name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs, name


@pytest.mark.parametrize("changes", [{}, {"targets": SEVERAL, "kind": "sigmoid"}, {"targets": None, "paths": None}])
def test_what_is_saved_is_loaded_without_unpickling(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved = Predictions(**FULL | changes)
    saved.save(tmp_path / "made" / "p.npz")
    assert_same(Predictions.load(tmp_path / "made" / "p.npz"), saved)
    with np.load(tmp_path / "made" / "p.npz", allow_pickle=False) as opened:
        assert all(opened[name].dtype.kind in "fiuU" for name in opened.files)
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["p.npz"]


@given(
    arrays.arrays(np.float32, (4, 2), elements=st.floats(-(2**60), 2**60, width=32, allow_subnormal=False)),
    st.lists(st.text(), min_size=4, max_size=4, unique=True),
)
def test_any_scores_and_any_names_are_kept(
    tmp_path_factory: pytest.TempPathFactory, scores: np.ndarray, ids: list[str]
) -> None:
    """Text may end in no NUL, which NumPy drops; no path can have one."""
    ids = [f"{name}." for name in ids]
    path = tmp_path_factory.mktemp("any") / "p.npz"
    Predictions(scores=scores, video_ids=tuple(ids)).save(path)
    loaded = Predictions.load(path)
    np.testing.assert_array_equal(loaded.scores, scores)
    assert loaded.video_ids == tuple(ids)


def test_scores_alone_are_enough(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", scores=SCORES.astype(np.float64))
    loaded = Predictions.load(tmp_path / "p.npz")
    assert_same(loaded, Predictions(scores=SCORES, read_as="logits"))
    with pytest.raises(PredictionsError, match="without targets, so nothing can be measured"):
        loaded.metrics()


def test_the_kind_follows_from_the_targets_where_a_file_does_not_say_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", scores=SCORES, targets=SEVERAL.astype(bool))
    loaded = Predictions.load(tmp_path / "p.npz")
    assert loaded.kind == "sigmoid"
    np.testing.assert_array_equal(loaded.targets, SEVERAL)
    np.testing.assert_allclose(loaded.probabilities(), 1 / (1 + np.exp(-SCORES.astype(np.float64))), rtol=1e-12)


def test_rows_that_are_probabilities_are_read_as_such(tmp_path: Path) -> None:
    probabilities = np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)
    probabilities[0] = [1, 0, 0]
    np.savez(tmp_path / "p.npz", scores=probabilities)
    np.testing.assert_allclose(Predictions.load(tmp_path / "p.npz").probabilities(), probabilities, rtol=1e-6)
    np.savez(tmp_path / "said.npz", scores=probabilities, kind="softmax")
    np.testing.assert_array_equal(Predictions.load(tmp_path / "said.npz").scores, probabilities)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"logits": SCORES}, "has no array 'scores'; it has logits"),
        ({"scores": SCORES[0]}, "scores are float32 of shape (3,); they must be floating-point (videos, classes)"),
        ({"scores": TARGETS[:, None]}, "scores are int64 of shape (5, 1)"),
        ({"scores": SCORES, "video_ids": np.array(IDS[:4])}, "4 video_ids for scores of 5 videos x 3 classes"),
        ({"scores": SCORES, "video_ids": np.array(["v"] * M)}, "a video id is there twice"),
        ({"scores": SCORES, "video_ids": np.arange(M)}, "video_ids are int64 of shape (5,); they must be a list of text"),
        ({"scores": SCORES, "class_names": np.array(["a"])}, "1 class_names for scores"),
        ({"scores": SCORES, "targets": TARGETS[:2]}, "targets of shape (2,) for scores of 5 videos x 3 classes"),
        ({"scores": SCORES, "targets": SEVERAL[:, :2]}, "targets of shape (5, 2) for scores"),
        ({"scores": SCORES, "targets": TARGETS.astype(float)}, "targets are float64 of shape (5,); they must be whole"),
        ({"scores": SCORES, "kind": "tanh"}, "kind is 'tanh'; it must be 'softmax' or 'sigmoid'"),
        ({"scores": SCORES, "run": np.array([1])}, "run is int64 of shape (1,); it must be one text"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_belong_together_are_refused_by_name(
    arrays: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(PredictionsError) as caught:
        Predictions.load(tmp_path / "p.npz")
    assert str(caught.value).startswith(f"{tmp_path / 'p.npz'}: ") and words in str(caught.value)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    marker, payload = tmp_path / "marker", Payload(tmp_path / "marker")
    np.savez(tmp_path / "array.npz", scores=np.array([payload], dtype=object), allow_pickle=True)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(payload))
    (tmp_path / "text.npz").write_text("scores")
    (tmp_path / "empty.npz").touch()
    whole = (tmp_path / "array.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("array", "bare", "text", "empty", "cut"):
        with pytest.raises(PredictionsError, match=f"{name}.npz is no npz of plain arrays"):
            Predictions.load(tmp_path / f"{name}.npz")
    assert not marker.exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()  # so it would have shown


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One byte changed, or the rest cut off; the checksum of the zip finds most of it."""
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    Predictions(**FULL).save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[:place] if data.draw(st.booleans()) else content)
    try:
        Predictions.load(path)
    except PredictionsError as error:
        assert str(path) in str(error)


def test_a_file_that_is_not_there_and_a_single_array_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError, match="p.npz is not there. `vcache eval RUN` writes one into RUN/predictions"):
        Predictions.load(tmp_path / "p.npz")
    np.save(tmp_path / "p.npy", SCORES)
    with pytest.raises(PredictionsError, match="is one array; save it as the `scores` of an npz"):
        Predictions.load(tmp_path / "p.npy")


def test_a_failed_save_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.npz"
    Predictions(**FULL).save(path)
    before = path.read_bytes()

    def fail(*args: Any, **arrays: Any) -> None:
        args[0].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        Predictions(**FULL).save(path)
    assert (path.read_bytes(), [file.name for file in tmp_path.iterdir()]) == (before, ["p.npz"])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_csv_agrees_with_the_metrics(tmp_path: Path) -> None:
    predictions = Predictions(**FULL)
    predictions.save_csv(tmp_path / "p.csv")
    rows = read_csv(tmp_path / "p.csv")
    assert [row["video_id"] for row in rows] == list(IDS)
    assert [row["path"] for row in rows] == list(FULL["paths"])
    best = SCORES.argmax(axis=1)
    names = FULL["class_names"]
    assert [row["predicted"] for row in rows] == [names[k] for k in best]
    assert [row["label"] for row in rows] == [names[k] for k in TARGETS]
    assert np.mean([int(row["correct"]) for row in rows]) == pytest.approx(predictions.metrics().top1)
    probabilities = (np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)).max(axis=1)
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities, abs=1e-6)
    assert rows[0]["top5"] == "; ".join(names[k] for k in np.argsort(-SCORES[0]))


def test_the_csv_of_several_classes_and_of_no_truth(tmp_path: Path) -> None:
    Predictions(scores=SCORES, targets=SEVERAL, kind="sigmoid").save_csv(tmp_path / "several.csv")
    rows = read_csv(tmp_path / "several.csv")
    assert [row["label"] for row in rows] == ["0; 2", "", "0; 1; 2", "1", "2"]
    assert [int(row["correct"]) for row in rows] == SEVERAL[np.arange(M), SCORES.argmax(axis=1)].tolist()
    unknown = np.where(np.arange(M) == 1, -1, TARGETS)
    Predictions(scores=SCORES, targets=unknown).save_csv(tmp_path / "unknown.csv")
    assert [row["correct"] == "" for row in read_csv(tmp_path / "unknown.csv")] == [False, True, False, False, False]
    Predictions(scores=SCORES).save_csv(tmp_path / "none.csv")
    assert {(row["video_id"], row["label"], row["correct"]) for row in read_csv(tmp_path / "none.csv")} == {
        ("", "", "")
    }


def test_metrics_of_a_file_are_those_of_its_scores() -> None:
    import torch

    several = Predictions(scores=SCORES, targets=SEVERAL, kind="sigmoid", views="3x1").metrics()
    assert several == compute_metrics(torch.from_numpy(SCORES), torch.from_numpy(SEVERAL).float(), views="3x1")
    with pytest.raises(ScoresError, match="not finite"):
        Predictions(scores=SCORES * np.nan, targets=TARGETS).metrics()
