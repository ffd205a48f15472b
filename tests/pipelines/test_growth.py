"""A real store grows with its dataset: only what is new is decoded, and no stored file is touched."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.extract.datasets.base import VideoDataset
from vcache.extract.datasets.registry import load_dataset
from vcache.heads.registry import get_head
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.growth import DatasetChanged
from vcache.pipelines.loading.loader import ClipLoader, IncompleteSplit
from vcache.pipelines.matching import HeadStoreMismatch, match
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.pipelines.writing import ShardWriting
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import add_videos

MakeConfig = Callable[..., ExtractionConfig]
DieAfter = Callable[[pytest.MonkeyPatch, int], None]
RunCommand = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def half(video_folder: Path, tmp_path: Path) -> Path:
    """A folder with half of the training videos of each class; `grow` adds the others."""
    folder = tmp_path / "videos"
    shutil.copytree(video_folder, folder)
    for path in sorted(folder.glob("train/*/*[23].mp4")):
        path.unlink()
    return folder


def grow(folder: Path, video_folder: Path, pattern: str) -> None:
    """Copy more of the videos; "train/*/*0.mp4" sorts before what is there, so that rows cannot be positions in the list."""
    for path in sorted(video_folder.glob(pattern)):
        (folder / path.relative_to(video_folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(video_folder))


def state(store: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content, inode and time of every file but the manifest, which alone may change."""
    files = (file for file in store.rglob("*") if file.is_file() and file != store / "zarr.json")
    return {str(file): (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def assert_untouched(before: dict[str, tuple[bytes, int, int]], store: Path) -> None:
    after = state(store)
    assert {name: after[name] for name in before} == before


def features(store: Path, split: str, name: str) -> dict[str, np.ndarray]:
    with FeatureStore.open(store) as opened:
        ids = opened.videos(split).ids
        return dict(zip(ids, opened.read(split, name, np.arange(len(ids))), strict=True))


def test_new_videos_are_added_and_only_they_are_extracted(
    config: MakeConfig, half: Path, video_folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    made = config(dataset=str(half))
    run_extraction(made)
    before = state(made.store)
    decoded.clear()
    grow(half, video_folder, "train/*/*2.mp4")
    summary = run_extraction(made)
    assert (summary.added, summary.splits) == ({"train": 3}, {"train": 9, "val": 6})
    assert (summary.progress.videos_done, summary.progress.videos_skipped) == (3, 12)
    assert sorted(decoded) == ["c2.mp4", "j2.mp4", "w2.mp4"]
    assert_untouched(before, made.store)
    grow(half, video_folder, "train/*/*3.mp4")
    assert run_extraction(made).added == {"train": 3}
    assert_untouched(before, made.store)
    with FeatureStore.open(made.store) as store:
        assert store.parts("train") == ("train", "train+1", "train+2")
        assert store.parts("val") == ("val",)
        assert verify_store(store).ok
    run_extraction(config(dataset=str(video_folder), store=tmp_path / "once.zarr"))
    for name in ("tokens/2", "q/1", "embed", "frame_index"):
        grown, once = (features(path, "train", name) for path in (made.store, tmp_path / "once.zarr"))
        assert grown.keys() == once.keys()
        for video in once:  # other neighbours in the batch change the last bits of a matrix product
            np.testing.assert_allclose(grown[video], once[video], rtol=1e-4, atol=1e-5)


def test_nothing_new_is_no_part_and_the_order_of_the_list_does_not_matter(
    config: MakeConfig, video_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extraction(config(layers="-1"))
    before = features(config().store, "train", "tokens/2")
    once = run_extraction(config())
    assert (once.added, once.progress.videos_done) == ({}, 18)
    expected = features(config().store, "train", "tokens/1")
    shutil.rmtree(config().store)
    run_extraction(config(layers="-1"))

    def reversed_list(*args: object, **options: object) -> VideoDataset:
        dataset = load_dataset(*args, **options)  # type: ignore[arg-type]
        return replace(dataset, videos=dataset.videos[::-1])

    monkeypatch.setattr("vcache.pipelines.setup.load_dataset", reversed_list)
    again = run_extraction(config())
    assert (again.added, again.progress.videos_done) == ({}, 18)
    assert features(config().store, "train", "tokens/2").keys() == before.keys()
    for video, value in features(config().store, "train", "tokens/1").items():
        np.testing.assert_array_equal(value, expected[video])


def test_a_killed_growth_resumes(
    config: MakeConfig, half: Path, video_folder: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    """Killed before the part is in the manifest, before its arrays are declared, and before its shard is committed."""
    made = config(dataset=str(half))
    run_extraction(made)
    before = state(made.store)
    grow(half, video_folder, "train/*/*2.mp4")
    for victim in ("vcache.store.writer.write_manifest", "vcache.pipelines.extending.declare_arrays"):
        with monkeypatch.context() as kill:
            kill.setattr(victim, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_extraction(made)
        with FeatureStore.open(made.store) as store:
            assert store.read("train", "tokens/2", [0]).shape == (1, 5, 17, 48)
    with monkeypatch.context() as kill:
        kill.setattr(ShardWriting, "submit", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_extraction(made)
    with FeatureStore.open(made.store) as store:
        assert np.flatnonzero(~store.committed_rows("train", ["tokens/2"])).tolist() == [6, 7, 8]
        plan = match("linear", get_head("linear").requires(get_head("linear").Config(num_classes=3)), store, ["train"])
        with pytest.raises(IncompleteSplit, match="3 of 9 videos of split 'train'"):
            ClipLoader(store, "train", plan, batch_size=2, device=torch.device("cpu"))
    decoded.clear()
    resumed = run_extraction(made)
    assert (resumed.added, resumed.progress.videos_done) == ({}, 3)
    assert sorted(decoded) == ["c2.mp4", "j2.mp4", "w2.mp4"]
    assert_untouched(before, made.store)
    with FeatureStore.open(made.store) as store:
        assert store.parts("train") == ("train", "train+1")
        assert verify_store(store).ok
        assert store.committed_rows("train", ["tokens/2"]).all()


def test_videos_may_be_added_while_a_split_is_unfinished(
    config: MakeConfig, half: Path, video_folder: Path, monkeypatch: pytest.MonkeyPatch, die_after: DieAfter
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    made = config(dataset=str(half), batch_size=4)
    with monkeypatch.context() as patch:
        die_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run_extraction(made)
    before = state(made.store)
    grow(half, video_folder, "train/*/*2.mp4")
    summary = run_extraction(made)
    assert (summary.added, summary.progress.videos_skipped) == ({"train": 3}, 4)
    assert_untouched(before, made.store)
    with FeatureStore.open(made.store) as store:
        assert all(store.committed_rows(split, ["tokens/2", "q/1"]).all() for split in store.splits)


def test_a_head_trains_and_is_evaluated_on_all_parts(
    config: MakeConfig, half: Path, video_folder: Path, tmp_path: Path
) -> None:
    made = config(dataset=str(half), split=("train", "val"))
    run_extraction(made)
    grow(half, video_folder, "train/*/*2.mp4")
    shutil.copy(half / "val" / "wave" / "w1.mp4", half / "val" / "wave" / "w9.mp4")
    (half / "val" / "wave" / "w8.mp4").write_bytes(b"")
    grown = run_extraction(made)
    assert grown.added == {"train": 3, "val": 2}
    with FeatureStore.open(made.store) as store:
        rows = [failure.row for failure in grown.failures]
        assert [store.videos("val").ids[row] for row in rows] == ["val/wave/w8.mp4"]
    summary = train_head(
        TrainingConfig(head="linear", store=made.store, settings={"epochs": 1, "batch_size": 4}, out=tmp_path / "run")
    )
    assert (summary.num_train, summary.num_val, summary.num_failed) == (9, 7, 1)
    assert evaluate_run(tmp_path / "run").num_videos == 7


def test_a_command_that_completes_a_grown_store_names_its_splits(
    config: MakeConfig, half: Path, video_folder: Path
) -> None:
    """The new part has fewer layers: the head is refused with the command that adds them to all parts."""
    made = config(dataset=str(half), split=("train", "val"))
    run_extraction(made)
    grow(half, video_folder, "train/*/*2.mp4")
    run_extraction(replace(made, layers="-1"))
    evl = get_head("evl")
    wanted = evl.requires(evl.Config(num_classes=3, num_frames=5, layers=(-2, -1)))
    with FeatureStore.open(made.store) as store, pytest.raises(HeadStoreMismatch) as caught:
        match("evl", wanted, store, store.splits)
    assert "--layers 1:" in str(caught.value)
    assert "--split train,val --store" in str(caught.value)
    summary = run_extraction(made)
    assert (summary.added, summary.progress.videos_done) == ({}, 3)
    with FeatureStore.open(made.store) as store:
        match("evl", wanted, store, store.splits)


def test_another_label_is_refused(config: MakeConfig, video_folder: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.csv"
    rows = ["train/jump/j1.mp4,jump,train", "train/wave/w1.mp4,wave,train", "val/wave/w1.mp4,wave,val"]
    listing.write_text("\n".join(["path,label,split", *rows]))
    made = config(dataset=str(listing), root=video_folder)
    run_extraction(made)
    before = state(made.store)
    listing.write_text(
        "\n".join(["path,label,split", *rows, "val/jump/j1.mp4,jump,val"]).replace("w1.mp4,wave,t", "w1.mp4,jump,t")
    )
    with pytest.raises(DatasetChanged, match=r"list/train gives 1 videos .* 'train/wave/w1.mp4' was wave, is jump"):
        run_extraction(made)
    assert state(made.store) == before


def test_a_list_that_is_ahead_of_the_disk_is_refused(config: MakeConfig, video_folder: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.csv"
    rows = ["train/jump/j1.mp4,jump,train", "train/wave/w1.mp4,wave,train"]
    listing.write_text("\n".join(["path,label,split", *rows]))
    made = config(dataset=str(listing), root=video_folder)
    run_extraction(made)
    before = state(made.store)
    listing.write_text("\n".join(["path,label,split", *rows, "train/wave/new.mp4,wave,train"]))
    with pytest.raises(
        DatasetChanged, match="none of the 1 new videos that list/train lists is in .*new.mp4. Put them"
    ):
        run_extraction(made)
    assert state(made.store) == before


def test_a_store_without_its_own_splits_keeps_every_video_in_its_split(
    config: MakeConfig, video_folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    """Held out by a hash of the path: more videos move none, and both splits grow."""
    folder = tmp_path / "flat"
    for path in sorted(video_folder.rglob("*.mp4")):
        place = folder / path.parent.name / f"{path.parent.parent.name}-{path.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    made = config(dataset=str(folder), layers="-1", cross_frame="none", val_fraction=0.4)
    first = run_extraction(made)
    for path in sorted(folder.rglob("*.mp4")):
        shutil.copy(path, path.with_name(f"again-{path.name}"))
    decoded.clear()
    second = run_extraction(made)
    assert sum(second.added.values()) == 18
    assert set(second.added) == {"train", "val"}
    assert {split: rows - first.splits[split] for split, rows in second.splits.items()} == second.added
    assert len(decoded) == 18
    assert all(name.startswith("again-") for name in decoded)


def test_the_command_line_grows_a_store_in_every_way(
    vcache: RunCommand, half: Path, video_folder: Path, tiny_clip: Path, tmp_path: Path, decoded: list[str]
) -> None:
    """Layers, maps beside Q/K, videos, a split: each decodes what it must, and rewrites nothing."""
    store = tmp_path / "s.zarr"
    shutil.move(half / "val", tmp_path / "val")
    made = f"extract {half} --frames 4 --stride 2 --model local-dir:{tiny_clip} --store {store} --json"
    before: dict[str, tuple[bytes, int, int]] = {}

    def step(options: str) -> dict[str, object]:
        nonlocal before
        decoded.clear()
        status, out, err = vcache(f"{made} {options}")
        assert status == 0, err
        assert_untouched(before, store)
        before = state(store)
        return json.loads(out)

    assert step("--layers -1 --split train")["splits"] == {"train": 6}
    sample = 4  # decoded besides, for the precision of arrays that are new to the store
    step("--layers -2:")
    assert len(decoded) == 6 + sample
    step("--layers -2: --cross-frame maps")
    assert len(decoded) == 6 + sample
    grow(half, video_folder, "train/*/*[23].mp4")
    assert step("--layers -2:")["added"] == {"train": 6}
    assert len(decoded) == 6
    assert set(decoded) == {f"{label}{i}.mp4" for label in "cjw" for i in (2, 3)}
    step("--layers -2: --cross-frame maps")
    assert len(decoded) == 6
    shutil.move(tmp_path / "val", half / "val")
    last = step("--layers -2:")
    assert (last["splits"], last["added"]) == ({"train": 12, "val": 6}, {})
    assert len(decoded) == 6
    step("--layers -2:")
    assert decoded == []
    assert vcache(f"verify {store}")[0] == 0
    info = json.loads(vcache(f"info {store} --json")[1])["splits"]
    assert info["train"]["parts"] == {"train": 6, "train+1": 6}
    assert info["train"]["arrays"]["maps/2"]["stored"] == info["train"]["arrays"]["tokens/1"]["stored"] == 12


def test_growth_is_said_and_shown(
    vcache: RunCommand, half: Path, video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    store = tmp_path / "home" / "s.zarr"
    line = f"extract {half} --layers -1 --cross-frame none --model local-dir:{tiny_clip} --store {store}"
    assert "added to" not in vcache(line)[1]
    assert "train (6)" in vcache(f"info {store}")[1]
    grow(half, video_folder, "train/*/*[23].mp4")
    out = vcache(line)[1]
    assert "train 12, val 6 videos; 6 extracted now, 12 already there" in out
    assert "6 new videos added to train" in out
    shown = vcache(f"info {store}")[1]
    assert "train (12, 2 parts)" in shown
    assert "val (6)" in shown
    assert " of 12" not in shown
    assert "train 12 in 2 parts, val 6" in vcache(f"ls {store.parent}")[1]
    (row,) = json.loads(vcache(f"ls {store.parent} --json")[1])
    assert (row["splits"], row["parts"]) == ({"train": 12, "val": 6}, {"train": 2, "val": 1})


def test_a_part_on_its_way_hides_nothing_of_the_others(vcache: RunCommand, config: MakeConfig, half: Path) -> None:
    made = config(dataset=str(half), layers="-1")
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        table = store.videos("val")
        add_videos(store, "train", table)
    shown = json.loads(vcache(f"info {made.store} --json")[1])["splits"]["train"]
    assert (shown["videos"], shown["arrays"]["tokens/2"]["stored"]) == (12, 6)
    assert "6 of 12" in vcache(f"info {made.store}")[1]
    assert json.loads(vcache(f"ls {made.store.parent} --json")[1])[0]["layers"] == [2]


def test_a_failure_has_the_path_of_the_table_although_the_file_was_moved(
    config: MakeConfig, video_folder: Path, tmp_path: Path
) -> None:
    k400 = tmp_path / "k400"
    for name in ("abc_000001_000002.mp4", "def_000001_000002.mp4"):
        (k400 / "val").mkdir(parents=True, exist_ok=True)
        shutil.copy(video_folder / "val" / "jump" / "j1.mp4", k400 / "val" / name)
    (k400 / "val.csv").write_text("label,youtube_id,time_start,time_end,split\njump,abc,1,2,val\nwave,def,1,2,val\n")
    run_extraction(config(dataset="k400", root=k400, layers="-1"))
    (k400 / "val" / "abc_000001_000002.mp4").unlink()
    (k400 / "videos").mkdir()
    (k400 / "videos" / "abc_000001_000002.mp4").write_bytes(b"")
    (failure,) = run_extraction(config(dataset="k400", root=k400)).failures
    assert (failure.kind, failure.path) == ("empty", "val/abc_000001_000002.mp4")
    with FeatureStore.open(config().store) as store:
        assert verify_store(store).ok
