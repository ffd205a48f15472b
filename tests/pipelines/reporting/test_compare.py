"""`vcache compare` on predictions of known models, on runs, and on a sweep."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from vcache.pipelines.evaluation.alignment import EnsembleError
from vcache.pipelines.reporting.compare_entrants import CompareError, Entrant, entrants, group_names, groups_of
from vcache.pipelines.reporting.compare_seeds import seed_spread
from vcache.pipelines.reporting.compare_words import conclusions
from vcache.pipelines.reporting.comparing import CompareConfig, run_comparison
from vcache.pipelines.reporting.comparison import Comparison
from vcache.pipelines.runs import Run, RunError

M, K = 60, 7
Vcache = Callable[..., tuple[int, str, str]]


def predictions(path: Path, seed: int, gain: float = 1.0, order: int | None = None, num: int = M) -> Path:
    """A model for `num` videos, in a file: `gain` makes it better; `order` shuffles its videos and classes."""
    drawn, targets = np.random.default_rng(seed), np.arange(num) % K
    scores = drawn.normal(size=(num, K)).astype(np.float32)
    scores[np.arange(num), targets] += gain
    rows, columns = np.arange(num), np.arange(K)
    if order is not None:
        rows, columns = (np.random.default_rng(order).permutation(size) for size in (num, K))
    arrays: dict[str, Any] = {
        "scores": scores[rows][:, columns],
        "targets": np.argsort(columns)[targets[rows]],
        "video_ids": np.array([f"video {row:03}" for row in rows]),
        "class_names": np.array([f"class {k}" for k in columns]),
        "kind": "softmax",
        "split": "val",
        "views": "1x1",
    }
    np.savez(path, **arrays)
    return path


def several_classes(path: Path, seed: int, gain: float) -> Path:
    drawn = np.random.default_rng(99)
    targets = (drawn.random((M, K)) < 0.3).astype(np.uint8)
    scores = np.random.default_rng(seed).normal(size=(M, K)) + gain * targets
    np.savez(
        path, scores=scores.astype(np.float32), targets=targets, kind="sigmoid", video_ids=np.arange(M).astype(str)
    )
    return path


def compared(*runs: Path, **fields: Any) -> Comparison:
    return run_comparison(CompareConfig(runs=runs, **fields))


def right(path: Path) -> np.ndarray:
    """By video, in the order of their names."""
    with np.load(path) as there:
        return (there["scores"].argmax(axis=1) == there["targets"])[np.argsort(there["video_ids"])]


def test_values_are_scikit_learns_and_counts_are_of_videos(tmp_path: Path) -> None:
    paths = [predictions(tmp_path / "a.npz", 1, 1.0), predictions(tmp_path / "b.npz", 2, 2.0, order=3)]
    found = compared(*paths)
    pair, (old, new) = found.pairs[0], map(right, paths)
    top1, top5, mean_class = pair.measures
    for side, path in (("reference", paths[0]), ("other", paths[1])):
        with np.load(path) as there:
            scores, targets = there["scores"], there["targets"]
        assert getattr(top1, side) == pytest.approx(accuracy_score(targets, scores.argmax(axis=1)))
        assert getattr(top5, side) == pytest.approx(top_k_accuracy_score(targets, scores, k=5))
        assert getattr(mean_class, side) == pytest.approx(balanced_accuracy_score(targets, scores.argmax(axis=1)))
    assert (top1.only_reference, top1.only_other) == ((old & ~new).sum(), (new & ~old).sum())
    assert (pair.both_right, pair.neither_right) == ((old & new).sum(), (~old & ~new).sum())
    assert [row.num_videos for row in sorted(pair.classes, key=lambda row: row.name)] == [9, 9, 9, 9, 8, 8, 8]
    for row in pair.classes:
        of_class = np.arange(M) % K == int(row.name.split()[1])
        assert (row.reference, row.other) == pytest.approx((old[of_class].mean(), new[of_class].mean()))
        assert (row.only_reference, row.only_other) == ((old & ~new)[of_class].sum(), (new & ~old)[of_class].sum())
    assert [row.difference for row in pair.classes] == sorted(row.difference for row in pair.classes)


def test_the_order_of_videos_and_classes_in_a_file_changes_nothing(tmp_path: Path) -> None:
    a, b, shuffled = (
        predictions(tmp_path / f"{name}.npz", seed, gain, order)
        for name, seed, gain, order in (("a", 1, 1.0, None), ("b", 2, 2.0, None), ("c", 2, 2.0, 8))
    )
    plain, again = compared(a, b).pairs[0], compared(a, shuffled).pairs[0]
    assert (plain.measures, plain.classes, plain.gained) == (again.measures, again.classes, again.gained)


def test_the_other_way_round_is_the_same_with_the_other_sign(tmp_path: Path) -> None:
    a, b = predictions(tmp_path / "a.npz", 1, 1.0), predictions(tmp_path / "b.npz", 2, 2.0)
    forth, back = compared(a, b).pairs[0], compared(a, b, reference="b.npz").pairs[0]
    for one, other in zip(forth.measures, back.measures, strict=True):
        assert one.difference == pytest.approx(-other.difference)
        assert one.interval.low == pytest.approx(-other.interval.high, abs=0.03)
        assert one.p_value == other.p_value
    assert [row.video for row in forth.gained] == [row.video for row in back.lost]


def test_where_they_differ_most_is_the_probability_of_the_right_class(tmp_path: Path) -> None:
    paths = [predictions(tmp_path / f"{i}.npz", i) for i in (1, 2)]
    p = []
    for path in paths:
        with np.load(path) as there:
            x = np.exp(there["scores"].astype(np.float64))
            p.append((x / x.sum(axis=1, keepdims=True))[np.arange(M), there["targets"]])
    order, pair = np.argsort(p[1] - p[0]), compared(*paths).pairs[0]
    assert [row.video for row in pair.lost] == [f"video {row:03}" for row in order[:5]]
    assert [row.video for row in pair.gained] == [f"video {row:03}" for row in order[::-1][:5]]
    assert (pair.gained[0].reference, pair.gained[0].other) == pytest.approx((p[0][order[-1]], p[1][order[-1]]))
    assert pair.gained[0].label == f"class {order[-1] % K}"


def test_several_classes_a_video_are_compared_by_map(tmp_path: Path) -> None:
    paths = [several_classes(tmp_path / f"{i}.npz", i, gain) for i, gain in ((1, 0.0), (2, 3.0))]
    found = compared(*paths)
    (measure,), values = found.pairs[0].measures, []
    for path in paths:
        with np.load(path) as there:
            values.append(average_precision_score(there["targets"], there["scores"], average="macro"))
    assert (measure.measure, measure.p_value) == ("mean_average_precision", None)
    assert (measure.reference, measure.other) == pytest.approx(values)
    assert measure.interval.low > 0 and all(row.interval and not row.p_value for row in found.pairs[0].classes)
    assert "1.npz" in conclusions(found)[0] and "is better than" in conclusions(found)[0]


@pytest.mark.parametrize(
    ("gains", "words"),
    [((0.5, 6.0), "is better than"), ((6.0, 0.5), "is worse than"), ((1.0, 1.0), "cannot be told apart")],
)
def test_the_first_sentence_says_what_the_test_says(tmp_path: Path, gains: Sequence[float], words: str) -> None:
    found = compared(*(predictions(tmp_path / f"{i}.npz", i, gain) for i, gain in enumerate(gains, start=1)))
    first = found.pairs[0].measures[0]
    assert first.p_value is not None and (first.p_value < 0.05) == (words != "cannot be told apart")
    assert words in conclusions(found)[0] and "--seeds 3" in conclusions(found)[1]


def test_too_few_videos_to_differ_on_are_told(tmp_path: Path) -> None:
    same = predictions(tmp_path / "a.npz", 1), predictions(tmp_path / "b.npz", 1)
    found = compared(*same)
    assert "They differ on 0, too few" in conclusions(found)[0]
    assert (found.pairs[0].measures[0].p_value, found.pairs[0].gained) == (1.0, ())


def test_p_values_of_several_are_corrected_and_the_best_is_said_to_be_chosen(tmp_path: Path) -> None:
    paths = [predictions(tmp_path / f"{i}.npz", i, gain) for i, gain in enumerate((0.5, 3.0, 1.5))]
    found = compared(*paths, reference="best")
    assert found.reference.name == "1.npz" and [pair.other for pair in found.pairs] == ["0.npz", "2.npz"]
    raw = [pair.measures[0].p_value or 0 for pair in found.pairs]
    assert sorted(pair.p_holm or 0 for pair in found.pairs)[0] == pytest.approx(2 * min(raw))
    told = " ".join(conclusions(found))
    assert "Holm's correction keeps" in told and "chosen as the best of 3" in told


def test_trainings_that_differ_in_the_seed_alone_are_one_setting() -> None:
    def run(name: str, setting: str, seed: int) -> Entrant:
        return Entrant(path=Path(name), setting=setting, seed=seed)

    found = [run("a-1", "a", 0), run("b-1", "b", 0), run("a-2", "a", 1), Entrant(path=Path("x.npz"))]
    assert groups_of(found, each=False) == [[0, 2], [1], [3]]
    assert groups_of(found, each=True) == [[0], [1], [2], [3]]
    assert groups_of(found[::2], each=False) == [[0], [1]]  # one setting, with nothing beside it
    assert groups_of([*found, run("again", "a", 1)], each=False) == [[0], [1], [2], [3], [4]]
    names = ["a-1", "b-1", "a-2", "x.npz"]
    assert group_names(found, names, [[0, 2], [1], [3]]) == ["a", "b-1", "x.npz"]


def test_seeds_of_one_setting_stay_one_setting_on_another_machine(tmp_path: Path) -> None:
    for place, (lr, seed, device) in enumerate([(1, 0, "cpu"), (2, 0, "cpu"), (1, 1, "H100"), (2, 1, "H100")]):
        config = {"head": "linear", "recipe": {"lr": lr}, "seed": seed, "device": device}
        Run.create(tmp_path / str(place), config, None).save_head({"weight": torch.zeros(1)})
    found = entrants([tmp_path / str(place) for place in range(4)], on_note=lambda note: None)
    assert groups_of(found, each=False) == [[0, 2], [1, 3]]


def test_seeds_that_agree_to_the_last_video_prove_nothing_of_other_seeds(tmp_path: Path) -> None:
    worse, better = predictions(tmp_path / "a.npz", 1, 0.0), predictions(tmp_path / "b.npz", 2, 6.0)
    pair = compared(worse, better).pairs[0]
    first = replace(pair.measures[0], p_value=None, seeds=seed_spread([0.2, 0.2], [0.9, 0.9]))
    found = replace(compared(worse, better), pairs=(replace(pair, measures=(first,), p_holm=first.tested),))
    assert "No two seeds of either differ" in conclusions(found)[0] and "More than" not in conclusions(found)[0]


def test_a_sweep_is_compared_by_the_means_of_its_settings(vcache: Vcache, float32_store: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    line = f"sweep linear --store {float32_store} --grid lr=0.001,0.1 --seeds 2 --epochs 1 --batch-size 4 --out {sweep}"
    assert vcache(line)[0] == 0
    status, out, err = vcache(f"compare {sweep} --json --out {tmp_path / 'all.csv'}")
    assert status == 0, err
    assert "4 runs had no such predictions: evaluated now" in err
    found = json.loads(out)
    assert [len(one["runs"]) for one in found["contenders"]] == [2, 2]
    with (sweep / "summary.csv").open() as file:
        means = [float(row["top1_mean"]) for row in csv.DictReader(file)]
    measure = found["pairs"][0]["measures"][0]
    assert (measure["reference"], measure["other"]) == pytest.approx(means)
    assert measure["p_value"] is None and measure["seeds"]["first_std"] is not None
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["measure"] for row in rows if not row["class"]] == ["top1", "mean_class_accuracy"]
    assert float(rows[0]["difference"]) == pytest.approx(means[1] - means[0])
    status, out, err = vcache(f"compare {sweep} --per-class", columns=80)
    assert status == 0 and "evaluated" not in err and "2 runs, reference" in out
    assert all(len(text) <= 80 for text in out.split("\n\n")[1].splitlines())
    runs = " ".join(str(path) for path in sorted(sweep.glob("linear-lr0.1*")))
    alone = json.loads(vcache(f"compare {runs} --json")[1])  # all of one setting: each by itself
    assert alone["pairs"][0]["measures"][0]["p_value"] is not None and "[" not in alone["contenders"][0]["name"]


def test_what_cannot_be_compared_is_refused_with_a_way_out(tmp_path: Path) -> None:
    a, b = predictions(tmp_path / "a.npz", 1), predictions(tmp_path / "b.npz", 2)
    with pytest.raises(CompareError, match="takes two runs at least"):
        compared(a)
    with pytest.raises(CompareError, match=r"There are: 'a\.npz', 'b\.npz'; or say best"):
        compared(a, b, reference="c")
    fewer = predictions(tmp_path / "fewer.npz", 3, num=50)
    with pytest.raises(EnsembleError, match="Add --common"):
        compared(a, fewer)
    assert compared(a, fewer, common=True).num_videos == 50
    with pytest.raises(EnsembleError, match="is not there"):
        compared(a, tmp_path / "nowhere")
    (tmp_path / "runs/evl-1").mkdir(parents=True)
    (tmp_path / "runs/evl-1/config.json").write_text("{}")
    with pytest.raises(RunError, match=r"holds 1 run. Name one of them, as in:  .*runs/evl-1"):
        compared(tmp_path / "runs")


def test_other_views_are_part_of_what_is_compared(tmp_path: Path) -> None:
    a, b = predictions(tmp_path / "a.npz", 1), predictions(tmp_path / "b.npz", 2)
    with np.load(b) as there:
        np.savez(tmp_path / "b.npz", **{**there, "views": "3x1", "average": "logits"})
    notes = " ".join(compared(a, b).notes)
    assert "evaluated on other views: a.npz 1x1, b.npz 3x1" in notes


def test_a_table_goes_into_a_csv(vcache: Vcache, tmp_path: Path) -> None:
    a, b = predictions(tmp_path / "a.npz", 1), predictions(tmp_path / "b.npz", 2)
    status, _, err = vcache(f"compare {a} {b} --out {tmp_path / 'table.txt'}")
    assert status == 2 and ".csv" in err
    assert vcache(f"compare {a} {b} --out {tmp_path / 'table.csv'}")[0] == 0
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + K and all(row["p_holm"] for row in rows[3:])
