"""Training on stores with several views: each video once an epoch, in a view drawn for it, and nothing read that is not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from viewed import CLS, DEFINITIONS, HELD, TOKENS, D, T, fill_view, training, value, video_ids, viewed_store

from vcache.pipelines.fitting_store import NoFittingStore
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import ClipLoader, IncompleteSplit
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.runs import Run
from vcache.pipelines.stored_views import ViewsError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.reports import TrainingPlan
from vcache.pipelines.training.train_head import train_head
from vcache.store.manifest import VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import add_videos

HELD_TRAIN = {"train": HELD["train"]}
PLAN = ReadPlan(tokens={-1: 2}, cls={-1: 2}, maps={}, embed=False)
SHORT = {"epochs": 2, "batch_size": 5}


@pytest.fixture(scope="session")
def views_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 videos to train on in 3 views, 7 to validate with in 3x1; read only."""
    path = tmp_path_factory.mktemp("views") / "views.zarr"
    viewed_store(path).close()
    return path


def loader(
    store: FeatureStore, *, batch_size: int = 5, views: tuple[int, ...] = (0, 1, 2), seed: int = 0, **options: Any
) -> ClipLoader:
    made = {
        "order": EpochOrder(seed),
        "batch_size": batch_size,
        "device": torch.device("cpu"),
        "views": views,
        **options,
    }
    return ClipLoader(store, "train", PLAN, **made)


def draws(loader: ClipLoader, epoch: int) -> dict[str, int]:
    """Video -> the view it was given in."""
    ids = loader.store.videos(loader.split).ids
    pairs = [
        (ids[row], int(view))
        for batch in loader.epoch(epoch)
        for row, view in zip(batch.rows, batch.views, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def train(store: Path | None, out: Path, plans: list[TrainingPlan] | None = None, **options: Any) -> Run:
    config = TrainingConfig(head="linear", store=store, out=out, device="cpu", settings=SHORT, **options)
    train_head(config, on_plan=(plans if plans is not None else []).append)
    return Run.open(out)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_an_epoch_has_each_video_once_with_the_features_of_its_view(views_store: Path, batch_size: int) -> None:
    with FeatureStore.open(views_store) as store:
        batches = list(loader(store, batch_size=batch_size).epoch(3))
        assert sorted(row for batch in batches for row in batch.rows) == list(range(12))
        assert {int(view) for batch in batches for view in batch.views} == {0, 1, 2}
        for batch in batches:
            np.testing.assert_array_equal(batch.targets.numpy(), store.videos("train").labels[batch.rows])
            for position, (row, view) in enumerate(zip(batch.rows, batch.views, strict=True)):
                for spec, features in ((CLS, batch.features().cls), (TOKENS, batch.features().tokens)):
                    read = store.read("train", spec.name, [row], view=int(view))[0]
                    np.testing.assert_array_equal(features[-1][position].numpy(), read)
                    np.testing.assert_array_equal(read, value(spec, "train", int(view), f"v{row}"))


def test_the_draw_is_a_function_of_seed_and_epoch_and_not_of_the_batches(views_store: Path) -> None:
    with FeatureStore.open(views_store) as store:
        of_epochs = [draws(loader(store), epoch) for epoch in range(4)]
        assert len({tuple(sorted(drawn.items())) for drawn in of_epochs}) == 4
        assert draws(loader(store, seed=1), 0) != of_epochs[0]
        for batch_size in (1, 4, 12):
            again = loader(store, batch_size=batch_size)
            assert [draws(again, epoch) for epoch in range(4)] == of_epochs


def test_the_draw_of_a_video_is_the_same_among_other_videos(views_store: Path, tmp_path: Path) -> None:
    ids = {"train": ("v7", "new", *video_ids(5)[::-1])}
    with (
        FeatureStore.open(views_store) as store,
        viewed_store(tmp_path / "other.zarr", ids=ids, held=HELD_TRAIN) as other,
    ):
        for epoch in range(5):
            here, there = draws(loader(store), epoch), draws(loader(other), epoch)
            assert there.keys() == {*ids["train"]}
            assert {video: there[video] for video in there if video != "new"} == {
                video: here[video] for video in ids["train"] if video != "new"
            }


def test_the_same_rows_come_in_the_same_batches_whatever_their_views(views_store: Path) -> None:
    """So that runs with different numbers of views differ in the views alone; and of one view the order is a permutation."""
    with FeatureStore.open(views_store) as store:
        order = np.random.default_rng([4, 1]).permutation(12)
        one = [batch.rows.tolist() for batch in loader(store, views=(0,), seed=4).epoch(1)]
        assert one == [order[:5].tolist(), order[5:10].tolist(), order[10:].tolist()]
        three = list(loader(store, seed=4).epoch(1))
        assert [sorted(batch.rows) for batch in three] == [sorted(rows) for rows in one]
        for batch, rows in zip(three, one, strict=True):
            assert (np.diff(batch.views) >= 0).all()
            for view in set(batch.views):
                assert [row for row in rows if row in batch.rows[batch.views == view]] == [
                    *batch.rows[batch.views == view]
                ]


def test_a_batch_is_one_read_for_each_view_into_memory_that_is_used_again(
    views_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    original = FeatureStore.read_many

    def count(self: FeatureStore, *args: Any, view: int, **options: Any) -> dict[str, np.ndarray]:
        reads.append(view)
        return original(self, *args, view=view, **options)

    with FeatureStore.open(views_store) as store:
        monkeypatch.setattr(FeatureStore, "read_many", count)
        made = loader(store, batch_size=6)
        places, expected = set(), []
        for epoch in range(4):
            for batch in made.epoch(epoch):
                places.add(batch.features().tokens[-1].data_ptr())
                expected += sorted({*batch.views.tolist()})
    assert reads == expected
    assert len(places) <= 3


def test_a_video_that_failed_in_a_view_is_drawn_in_the_others(tmp_path: Path) -> None:
    failed = {("train", 1, 4), *(("train", view, 9) for view in (0, 1, 2))}
    with viewed_store(tmp_path / "store.zarr", failed=failed) as store:
        made = loader(store)
        assert made.num_failed == 1
        seen = [draws(made, epoch) for epoch in range(40)]
    assert all(drawn.keys() == {*video_ids(12)} - {"v9"} for drawn in seen)
    assert {drawn["v4"] for drawn in seen} == {0, 2}
    assert {drawn["v3"] for drawn in seen} == {0, 1, 2}


def test_a_view_that_is_not_finished_is_refused_with_the_command_or_left_out_of_the_draw(tmp_path: Path) -> None:
    missing = {("train", 2, 1), ("train", 1, 2)}  # rows 5-9 of view 2, rows 10 and 11 of view 1
    with viewed_store(tmp_path / "store.zarr", missing=missing) as store:
        with pytest.raises(IncompleteSplit) as caught:
            loader(store)
        assert str(caught.value).startswith(
            "7 of 12 videos of split 'train' in store.zarr are not extracted yet in views 1, 2. Finish with:  vcache extract"
        )
        assert " --views 3 " in str(caught.value)
        with pytest.raises(IncompleteSplit, match="2 of 12 videos .* not extracted yet in view 1. .* --views 2 "):
            loader(store, views=(0, 1))
        seen = [draws(loader(store, allow_incomplete=True), epoch) for epoch in range(40)]
        assert {drawn["v6"] for drawn in seen} == {0, 1}
        assert {drawn["v11"] for drawn in seen} == {0, 2}
        assert len(draws(loader(store, views=(0,)), 0)) == 12


def test_a_view_without_the_arrays_is_refused_with_the_command_that_adds_them(tmp_path: Path) -> None:
    viewed_store(tmp_path / "a.zarr", arrays={2: (TOKENS,)}, definitions=(*DEFINITIONS, training(3))).close()
    with pytest.raises(HeadStoreMismatch) as caught:
        train(tmp_path / "a.zarr", tmp_path / "run")
    message = str(caught.value)
    assert "reads cls of layers 2 in 4 views; view 2 of split 'train' of a.zarr holds tokens of layers 2." in message
    assert (
        "vcache extract toy --layers 2: --model tiny --frames 4 --dtype float32 --views 4 --cross-frame none --store "
        in message
    )
    plans: list[TrainingPlan] = []
    run = train(tmp_path / "a.zarr", tmp_path / "run", plans, allow_incomplete=True, views=9)
    assert run.config["views"].keys() == {"0", "1"}
    assert plans[0].num_views == 2


def test_a_view_that_was_defined_and_not_begun_is_not_passed_over(tmp_path: Path) -> None:
    """An extraction killed between the two must not make an ablation of fewer views than it says."""
    viewed_store(tmp_path / "a.zarr", definitions=(*DEFINITIONS, training(3))).close()
    for views, asked, behind in ((None, 4, 6), (4, 4, 6), (5, 5, 6)):
        with pytest.raises(
            HeadStoreMismatch, match=f"view {behind} of split 'train' .* no features.\n.* --views {asked} "
        ):
            train(tmp_path / "a.zarr", tmp_path / "run", views=views)
    assert train(tmp_path / "a.zarr", tmp_path / "run", views=3).config["views"].keys() == {"0", "1", "2"}


def test_a_view_that_nobody_has_defined_is_not_trained_on(tmp_path: Path) -> None:
    """It is in the store, by another program, but may be of anything."""
    viewed_store(tmp_path / "a.zarr", definitions=()).close()
    assert train(tmp_path / "a.zarr", tmp_path / "all").config["views"].keys() == {"0"}
    with pytest.raises(HeadStoreMismatch, match="view 1 of split 'train' .* no features.\n.* --views 2 "):
        train(tmp_path / "a.zarr", tmp_path / "run", views=2)
    assert train(tmp_path / "a.zarr", tmp_path / "run", views=2, allow_incomplete=True).config["views"].keys() == {"0"}


def test_a_split_to_evaluate_on_is_trained_on_in_view_0(views_store: Path, tmp_path: Path) -> None:
    """Extraction makes no training views of it, so none are missed."""
    plans: list[TrainingPlan] = []
    assert train(views_store, tmp_path / "run", plans, train_split="val").config["views"].keys() == {"0"}
    assert plans[0].num_views == 1
    with pytest.raises(ViewsError, match="--views 3: 'val' is a split to evaluate on, .* Leave --views out"):
        train(views_store, tmp_path / "other", train_split="val", views=3)


def test_a_split_that_was_grown_in_view_0_alone_is_to_be_completed(tmp_path: Path) -> None:
    with viewed_store(tmp_path / "store.zarr") as store:
        table = VideoTable(("n0", "n1", "n2"), ("n0", "n1", "n2"), np.array([0, 1, 2]))
        part = add_videos(store, "train", table)
        fill_view(store, part, 0)
    with pytest.raises(
        HeadStoreMismatch, match="view 1 of split 'train' of store.zarr holds no features.\n.*--views 3 "
    ):
        train(tmp_path / "store.zarr", tmp_path / "run")
    train(tmp_path / "store.zarr", tmp_path / "run", allow_incomplete=True)
    with FeatureStore.open(tmp_path / "store.zarr") as store:
        seen = [draws(loader(store, allow_incomplete=True), epoch) for epoch in range(9)]
        assert {drawn["n1"] for drawn in seen} == {0}
        fill_view(store, part, 1)
        fill_view(store, part, 2)
    train(tmp_path / "store.zarr", tmp_path / "all")


def test_a_run_says_which_views_it_was_trained_on(views_store: Path, tmp_path: Path) -> None:
    plans: list[TrainingPlan] = []
    run = train(views_store, tmp_path / "all", plans)
    assert run.config["views"] == {str(view): DEFINITIONS[view] for view in (0, 1, 2)}
    assert json.loads((run.path / "config.json").read_text())["views"]["1"] == training(1)
    assert train(views_store, tmp_path / "two", plans, views=2).config["views"].keys() == {"0", "1"}
    assert [plan.num_views for plan in plans] == [3, 2]


def test_one_view_of_several_trains_to_the_weights_of_a_store_with_one(views_store: Path, tmp_path: Path) -> None:
    viewed_store(tmp_path / "one.zarr", definitions=(), held={"train": (0,), "val": (0,)}).close()
    runs = [
        train(views_store, tmp_path / "first", views=1),
        train(tmp_path / "one.zarr", tmp_path / "only"),
        train(views_store, tmp_path / "all"),
    ]
    weights = [load_file(run.path / "head.safetensors") for run in runs]
    of_the_run = {"head", "seconds", "waiting_seconds", "read_bytes"}
    metrics = [[{k: v for k, v in line.items() if k not in of_the_run} for line in run.metrics()] for run in runs]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert metrics[0] == metrics[1] != metrics[2]
    assert not torch.equal(weights[0]["classify.weight"], weights[2]["classify.weight"])


def test_the_store_that_is_found_has_the_views_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_HOME", str(tmp_path / "home"))
    viewed_store(tmp_path / "home" / "three.zarr").close()
    viewed_store(tmp_path / "home" / "one.zarr", definitions=(), held={"train": (0,), "val": (0,)}).close()
    assert train(None, tmp_path / "run", views=3).config["store"].endswith("three.zarr")
    with pytest.raises(NoFittingStore, match="2 stores under"):
        train(None, tmp_path / "other", views=1)
    with pytest.raises(NoFittingStore, match="--views 4 .* --store .*three.zarr"):
        train(None, tmp_path / "other", views=4)


def test_the_command_line_takes_views_and_says_how_many(
    vcache: Callable[[str], tuple[int, str, str]], views_store: Path, tmp_path: Path
) -> None:
    words = f"train-head linear --store {views_store} --epochs 1 --out {tmp_path / 'run'}"
    status, _, err = vcache(f"{words}-3")
    assert (status, "12 videos in 3 views to train on" in err) == (0, True), err
    status, _, err = vcache(f"{words}-1 --views 1")
    assert (status, "12 videos to train on" in err) == (0, True), err
    assert vcache(f"{words}-0 --views 0")[0] == 2


def test_the_shapes_of_a_batch_are_those_of_its_rows(views_store: Path) -> None:
    with FeatureStore.open(views_store) as store:
        shapes = [tuple(batch.features().cls[-1].shape) for batch in loader(store).epoch(0)]
    assert shapes == [(5, T, D), (5, T, D), (2, T, D)]


def test_the_printed_commands_add_the_views_that_were_missing(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """From a store of one view: more to train on, then more to evaluate with, each by the command in the error."""
    store, run = tmp_path / "store.zarr", tmp_path / "run"
    made = f"--layers -1 --frames 3 --stride 2 --cross-frame none --model local-dir:{tiny_clip} --augment text4vis"
    assert vcache(f"extract {video_folder} {made} --view-seed 5 --store {store}")[0] == 0
    train_line, eval_line = (
        f"train-head linear --epochs 1 --views 3 --store {store} --out {run}",
        f"eval {run} --views 3x1",
    )
    for line, said in ((train_line, "12 videos in 3 views"), (eval_line, "mean of 3x1 views")):
        status, _, err = vcache(line)
        assert status == 1
        command = next(line for line in err.splitlines() if "with:  vcache" in line).split("with:  vcache ")[1]
        status, _, err = vcache(command)
        assert status == 0, err
        status, out, err = vcache(line)
        assert (status, said in out + err) == (0, True), err
    with FeatureStore.open(store) as opened:
        definitions = opened.manifest.facts["views"]
        assert [definition["kind"] for definition in definitions] == [
            "evaluation",
            *["training"] * 2,
            *["evaluation"] * 3,
        ]
        assert opened.views("train") == (0, 1, 2)
