"""The weighted average of several models' probabilities against NumPy and scikit-learn, and `vcache ensemble`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score
from viewed import viewed_store

from vcache.pipelines.evaluation import ensemble as module
from vcache.pipelines.evaluation.alignment import EnsembleError
from vcache.pipelines.evaluation.ensemble import Ensemble, EnsembleConfig, num_combinations, run_ensemble, simplex
from vcache.pipelines.evaluation.predictions import Predictions

M, K = 23, 6
TENTHS = [i / 10 for i in range(11)]
Vcache = Callable[..., tuple[int, str, str]]


def scores(seed: int, *, targets: np.ndarray, gain: float = 1.0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(len(targets), K))
    x[np.arange(len(targets)), targets] += gain
    return x.astype(np.float32)


def targets_of(seed: int = 0, num: int = M) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, K, num)


def ids_of(num: int = M) -> np.ndarray:
    return np.array([f"video {i:03}.mp4" for i in range(num)])


def member(path: Path, seed: int, **fields: Any) -> Path:
    """Predictions of a model for M videos, in a file."""
    given_targets = fields.get("targets", targets_of())
    known: dict[str, Any] = {
        "scores": scores(seed, targets=targets_of()),
        "targets": given_targets,
        "video_ids": ids_of(),
        "class_names": np.array([f"class {k}" for k in range(K)]),
        "kind": "softmax",
        "split": "val",
        "views": "1x1",
    }
    np.savez(path, **{name: value for name, value in {**known, **fields}.items() if value is not None})
    return path


def ensemble(*paths: Path, **fields: Any) -> Ensemble:
    return run_ensemble(EnsembleConfig(members=paths, **fields))


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num=st.integers(2, 4))
def test_each_combination_is_the_weighted_mean_of_the_softmax(
    data: st.DataObject, num: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("members")
    num_videos, targets = (M, targets_of(data.draw(st.integers(0, 99))))
    all_scores = [scores(data.draw(st.integers(0, 999)), targets=targets, gain=i) for i in range(num)]
    paths = [member(folder / f"{i}.npz", i, scores=x, targets=targets) for i, x in enumerate(all_scores)]
    step = 0.1 if num < 4 else 0.25
    found = ensemble(*paths, step=step)
    assert len(found.combinations) == num_combinations(num, round(1 / step))
    for combination in found.combinations:
        p = sum(weight * softmax(x) for weight, x in zip(combination.weights, all_scores, strict=True))
        assert combination.value == pytest.approx(accuracy_score(targets, p.argmax(axis=1)), abs=1e-12)
    best = max(found.combinations, key=lambda each: each.value)
    assert found.best.value == best.value == found.metrics.top1
    assert (found.measure, found.metrics.num_videos, found.num_tuned, found.optimistic) == (
        "top-1",
        num_videos,
        num_videos,
        True,
    )


def test_of_two_members_alpha_goes_from_the_second_alone_to_the_first_alone(tmp_path: Path) -> None:
    a, b = (scores(seed, targets=targets_of(), gain=2) for seed in (3, 4))
    found = ensemble(member(tmp_path / "a.npz", 0, scores=a), member(tmp_path / "b.npz", 0, scores=b))
    assert [combination.weights for combination in found.combinations] == [
        pytest.approx((alpha, 1 - alpha)) for alpha in TENTHS
    ]
    assert found.combinations[0].value == found.alone[1].top1 == accuracy_score(targets_of(), b.argmax(axis=1))
    assert found.combinations[-1].value == found.alone[0].top1 == accuracy_score(targets_of(), a.argmax(axis=1))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), tune=st.sampled_from([(), ("half",)]))
def test_the_order_of_a_members_videos_and_classes_changes_nothing(
    seed: int, tune: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, drawn = tmp_path_factory.mktemp("permuted"), np.random.default_rng(seed)
    one, other = member(folder / "a.npz", 1), member(folder / "b.npz", 2)
    rows, columns = drawn.permutation(M), drawn.permutation(K)
    with np.load(other) as there:
        shuffled = member(
            folder / "shuffled.npz",
            2,
            scores=there["scores"][rows][:, columns],
            targets=np.argsort(columns)[there["targets"]][rows],
            video_ids=there["video_ids"][rows],
            class_names=there["class_names"][columns],
        )
    whole, again = ensemble(one, other, tune_on=tune), ensemble(one, shuffled, tune_on=tune)
    assert (again.combinations, again.metrics, again.alone) == (whole.combinations, whole.metrics, whole.alone)
    reverse = ensemble(shuffled, one, tune_on=tune)
    assert reverse.metrics.num_videos == whole.metrics.num_videos
    assert [each.value for each in reverse.combinations] == [each.value for each in whole.combinations][::-1]


@given(num=st.integers(1, 5), steps=st.integers(1, 10))
def test_the_weights_tried_are_all_that_sum_to_one_each_once(num: int, steps: int) -> None:
    tried = list(simplex(num, steps))
    assert len(set(tried)) == len(tried) == num_combinations(num, steps)
    whole = np.rint(np.array(tried) * steps).astype(int)
    assert (whole.sum(axis=1) == steps).all() and (whole >= 0).all()


def test_of_equally_good_weights_the_most_equal_ones_are_chosen(tmp_path: Path) -> None:
    x = scores(5, targets=targets_of(), gain=20)  # everything is right with any weights
    found = ensemble(*(member(tmp_path / f"{name}.npz", 0, scores=x + i) for i, name in enumerate("abc")), step=0.25)
    assert found.best.value == 1 and sorted(found.best.weights) == [0.25, 0.25, 0.5]


def test_the_half_that_chooses_is_not_the_half_that_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The halves are put together again by the targets: here the number of the video."""
    monkeypatch.setattr(module, "compute_metrics", original := Recorder(module.compute_metrics))
    numbers = np.arange(M)
    paths = [
        member(tmp_path / f"{i}.npz", i, scores=np.eye(M, dtype=np.float32), targets=numbers, class_names=None)
        for i in range(2)
    ]
    found = ensemble(*paths, tune_on=("half",), seed=7)
    tuned, reported = original.targets[0], original.targets[-1]
    assert sorted([*tuned, *reported]) == numbers.tolist() and set(tuned).isdisjoint(reported)
    assert (found.num_tuned, found.metrics.num_videos, found.optimistic) == (M // 2, M - M // 2, False)
    ensemble(*paths, tune_on=("half",), seed=8)
    assert original.targets[-1] != reported


class Recorder:
    """Notes the targets of each call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.targets = call, []

    def __call__(self, x: Any, targets: Any, **options: Any) -> Any:
        self.targets.append(targets.tolist())
        return self.call(x, targets, **options)


def test_weights_chosen_on_other_files_are_used_on_the_members(tmp_path: Path) -> None:
    """On the other videos the second member is right and the first is not."""
    targets, others = targets_of(), targets_of(9, 11)
    a, b = member(tmp_path / "a.npz", 1), member(tmp_path / "b.npz", 2)
    names = {"targets": others, "video_ids": np.array([f"train {i}" for i in range(11)])}
    wrong = member(tmp_path / "a-train.npz", 0, scores=scores(0, targets=(others + 1) % K, gain=9), **names)
    right = member(tmp_path / "b-train.npz", 0, scores=scores(1, targets=others, gain=7), **names)
    found = ensemble(a, b, tune_on=(str(wrong), str(right)))
    assert (found.num_tuned, found.metrics.num_videos, found.optimistic) == (11, M, False)
    assert found.best.value == 1 and found.best.weights[1] > 0.5
    with np.load(a) as one, np.load(b) as two:
        p = found.best.weights[0] * softmax(one["scores"]) + found.best.weights[1] * softmax(two["scores"])
    assert found.metrics.top1 == pytest.approx(accuracy_score(targets, p.argmax(axis=1)))
    with pytest.raises(EnsembleError, match=r"--tune-on: 23 of its videos are reported on, too \(video 000.mp4\)"):
        ensemble(a, b, tune_on=(str(a), str(b)))


def test_given_weights_are_used_as_they_are(tmp_path: Path) -> None:
    a, b = member(tmp_path / "a.npz", 1), member(tmp_path / "b.npz", 2)
    found = ensemble(a, b, weights=(1.0, 3.0))
    with np.load(a) as one, np.load(b) as two:
        p = 0.25 * softmax(one["scores"]) + 0.75 * softmax(two["scores"])
    assert found.best.weights == (0.25, 0.75) and len(found.combinations) == 1
    assert found.metrics.top1 == pytest.approx(accuracy_score(targets_of(), p.argmax(axis=1)))
    assert (found.num_tuned, found.optimistic) == (0, False)


def test_saved_averages_are_members_of_other_averages(tmp_path: Path) -> None:
    a, b, c = (member(tmp_path / f"{name}.npz", seed) for seed, name in enumerate("abc"))
    inner = ensemble(a, b, weights=(1.0, 3.0))
    inner.predictions.save(tmp_path / "ab.npz")
    saved = Predictions.load(tmp_path / "ab.npz")
    assert (saved.kind, saved.split, saved.views, saved.run) == (
        "softmax",
        "val",
        "1x1",
        "ensemble of 0.25 a.npz, 0.75 b.npz",
    )
    nested, flat = ensemble(tmp_path / "ab.npz", c, weights=(0.8, 0.2)), ensemble(a, b, c, weights=(0.2, 0.6, 0.2))
    np.testing.assert_allclose(nested.predictions.scores, flat.predictions.scores, rtol=1e-5)
    np.testing.assert_allclose(softmax(nested.predictions.scores).sum(axis=1), 1)
    assert nested.metrics.top1 == flat.metrics.top1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), form=st.sampled_from(["logits", "probabilities"]))
def test_of_several_classes_a_video_the_sigmoids_are_averaged(
    seed: int, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drawn, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("multi-label")
    targets = (drawn.random((M, K)) < 0.4).astype(np.uint8)
    targets[0] = 1
    logits = [(drawn.normal(size=(M, K)) + i * targets).astype(np.float32) for i in range(2)]
    p = [1 / (1 + np.exp(-x.astype(np.float64))) for x in logits]
    paths = [member(folder / f"{i}.npz", 0, scores=x, targets=targets, kind="sigmoid") for i, x in enumerate(logits)]
    if form == "probabilities":
        np.savez(paths[1], scores=p[1], targets=targets, video_ids=ids_of())
    found = ensemble(*paths)
    assert (found.measure, found.metrics.top1, len(found.combinations)) == ("mAP", None, 11)
    for (a, b), value in ((each.weights, each.value) for each in found.combinations):
        expected = average_precision_score(targets, a * p[0] + b * p[1], average="macro")
        assert value == pytest.approx(expected, abs=1e-6)
    saved = 1 / (1 + np.exp(-found.predictions.scores.astype(np.float64)))
    np.testing.assert_allclose(saved, sum(w * x for w, x in zip(found.best.weights, p, strict=True)), rtol=1e-4)
    assert found.predictions.kind == "sigmoid" and found.predictions.targets is not None
    assert found.predictions.targets.tolist() == targets.tolist()


def test_certain_classes_keep_their_order_where_sigmoid_is_one(tmp_path: Path) -> None:
    """In float64 the sigmoid of 40 and that of 60 are the same number."""
    scores = np.array([[60, -9], [40, 9], [-40, -8], [-60, 8]], np.float32)
    targets = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.uint8)
    known = {"targets": targets, "kind": "sigmoid", "video_ids": None, "class_names": None}
    found = ensemble(*(member(tmp_path / f"{i}.npz", 0, scores=scores, **known) for i in range(2)), weights=(1.0, 1.0))
    np.testing.assert_allclose(found.predictions.scores, scores, rtol=1e-6)
    assert found.metrics.monitored == pytest.approx(average_precision_score(targets, scores, average="macro"))


@pytest.mark.parametrize("form", ["probabilities", "half probabilities", "logits"])
def test_scores_of_an_unknown_kind_are_judged_by_their_values(form: str, tmp_path: Path) -> None:
    x = scores(2, targets=targets_of())
    given_scores = {"probabilities": softmax(x), "half probabilities": softmax(x).astype(np.float16), "logits": x}[form]
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, scores=given_scores)
    known, other = member(tmp_path / "known.npz", 2), member(tmp_path / "other.npz", 4)
    notes: list[str] = []
    found = run_ensemble(EnsembleConfig(members=(other, foreign)), on_note=notes.append)
    assert found.metrics.top1 == ensemble(other, known).metrics.top1
    assert tuple(notes) == found.notes
    kind = "taken for logits, of which softmax" if form == "logits" else "are probabilities, and averaged as they are"
    for words in ("foreign.npz: no class_names", "foreign.npz: no video_ids", "foreign.npz: its scores"):
        assert any(note.startswith(words) for note in notes)
    assert any(kind in note for note in notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": (1.0,)}, "--weights has 1 numbers for 2 members. Give one for each"),
        ({"weights": (-1.0, 2.0)}, "--weights -1,2: weights are 0 or more, and not all of them 0"),
        ({"weights": (float("nan"), 2.0)}, "--weights nan,2: weights are 0 or more"),
        ({"weights": (1.0, 1.0), "tune_on": ("half",)}, "--weights says what --tune-on would choose"),
        ({"step": 0.3}, "--step 0.3 does not divide 1. Give 0.1, 0.05 or 0.25"),
        ({"step": 0.0}, "--step 0 does not divide 1"),
        ({"step": 0.0005}, "2 members in steps of 0.0005 have 2,001 combinations of weights, and 1,001 is the most"),
        (
            {"tune_on": ("a.npz",)},
            "--tune-on has 1 files for 2 members. Give one for each, in their order, or --tune-on half",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match=message):
        ensemble(member(tmp_path / "a.npz", 1), member(tmp_path / "b.npz", 2), **fields)


def test_six_members_are_refused_with_the_larger_step_that_works(tmp_path: Path) -> None:
    paths = [member(tmp_path / f"{i}.npz", i) for i in range(6)]
    with pytest.raises(EnsembleError, match=r"3,003 combinations .* --step 0.25, or give --weights"):
        ensemble(*paths)
    assert len(ensemble(*paths, step=0.25).combinations) == 126


# `vcache ensemble`


def test_the_command_shows_each_alpha_and_says_that_the_choice_is_optimistic(tmp_path: Path, vcache: Vcache) -> None:
    for name, seed in (("a", 3), ("b", 4)):
        member(tmp_path / f"{name}.npz", seed)
    found = ensemble(tmp_path / "a.npz", tmp_path / "b.npz")
    status, out, err = vcache(f"ensemble {tmp_path / 'a.npz'} {tmp_path / 'b.npz'}", columns=80)
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    lines = out.splitlines()
    assert lines[1].split() == ["A", "a.npz", *percents(found.alone[0])]
    assert [line.split()[:3] for line in lines[6:17]] == [
        [f"{w[0]:.1f}", f"{w[1]:.1f}", f"{each.value:.1%}"] for each in found.combinations for w in [each.weights]
    ]
    assert [line.split()[0] for line in lines if line.endswith("best")] == [f"{found.best.weights[0]:.1f}"]
    assert "11 combinations. Chosen on the 23 videos reported on, as in EVL's paper" in " ".join(lines)


def percents(metrics: Any) -> Sequence[str]:
    return [f"{value:.1%}" for value in (metrics.top1, metrics.top5, metrics.mean_class_accuracy)]


def test_the_command_saves_and_prints_json(tmp_path: Path, vcache: Vcache) -> None:
    a, b = member(tmp_path / "a.npz", 3), member(tmp_path / "b.npz", 4, class_names=None)
    saved = tmp_path / "new" / "ab.npz"
    status, out, err = vcache(f"ensemble {a} {b} --tune-on half --save {saved} --json")
    assert (status, err) == (0, "note: b.npz: no class_names, so the order of the classes is taken on trust.\n")
    told = json.loads(out)
    assert (told["members"], told["num_tuned"], told["optimistic"]) == (["a.npz", "b.npz"], 11, False)
    assert len(told["combinations"]) == 11 and told["metrics"]["num_videos"] == 12 and told["metrics"]["views"] == "1x1"
    assert len(Predictions.load(saved).scores) == M
    status, out, err = vcache(f"ensemble {a} {b} --weights 1,a")
    assert status == 1 and "--weights 1,a: numbers are expected, one for each member, as 0.3,0.7." in err


def test_runs_are_averaged_from_what_eval_wrote(tmp_path: Path, vcache: Vcache) -> None:
    viewed_store(tmp_path / "views.zarr").close()
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    for seed, run in enumerate(runs):
        words = f"--store {tmp_path / 'views.zarr'} --out {run} --device cpu --epochs 3 --batch-size 5 --set lr=0.1"
        assert vcache(f"train-head linear {words} --seed {seed}")[0] == 0
    status, _, err = vcache(f"ensemble {runs[0]} {runs[1]}")
    assert status == 1 and f"one has no predictions. Make them with:  vcache eval {runs[0]}" in err
    for run in runs:
        assert vcache(f"eval {run} --device cpu")[0] == 0
    status, out, err = vcache(f"ensemble {runs[0]} {runs[1]} --json")
    told = json.loads(out)
    assert (status, err, told["members"], told["notes"]) == (0, "", ["one", "two"], [])
    assert [each["value"] for each in told["combinations"]][::10] == [alone["top1"] for alone in told["alone"]][::-1]
    for run, alone in zip(runs, told["alone"], strict=True):
        _, out, _ = vcache(f"eval {run} --device cpu --no-save --json")
        assert alone["top1"] == json.loads(out)["top1"] and alone["views"] == "3x1"
