"""Published layouts through the whole extraction: odd paths, the split in the name, a list that gains videos."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]


def test_webm_below_a_root_with_spaces_and_unicode(
    config: MakeConfig, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "données ü" / "ssv2 [v2]"
    for i in range(3):
        write_video(root / "20bn-something-something-v2" / f"{i}.webm", seed=i, num_frames=14 + i, codec="libvpx")
    (root / "labels.json").write_text(json.dumps({"Lifting something": "1", "Dropping something": "0"}))
    rows = [{"id": str(i), "template": f"{('Dropping', 'Lifting')[i % 2]} [something]"} for i in range(3)]
    (root / "train.json").write_text(json.dumps(rows[:2]))
    (root / "validation.json").write_text(json.dumps(rows[2:]))
    made = config(dataset="ssv2", root=root)
    assert run_extraction(made).failures == ()
    with FeatureStore.open(made.store) as store:
        assert store.manifest.class_names == ("Dropping something", "Lifting something")
        assert store.splits == {"train": 2, "val": 1}
        assert store.videos("train").labels.tolist() == [0, 1]
        assert store.videos("val").paths == ("20bn-something-something-v2/2.webm",)


@pytest.fixture
def ucf101(write_video: Callable[..., Path], tmp_path: Path) -> Path:
    root = tmp_path / "ucf101"
    for i, name in enumerate(("v_Archery_g01_c01", "v_Archery_g08_c01", "v_Archery_g09_c01")):
        write_video(root / "UCF-101" / "Archery" / f"{name}.avi", seed=i, num_frames=14 + i)
    (root / "classInd.txt").write_text("1 Archery\n")
    (root / "trainlist02.txt").write_text("Archery/v_Archery_g08_c01.avi 1\n")
    (root / "testlist02.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    return root


def test_the_split_is_in_the_recorded_name(config: MakeConfig, ucf101: Path) -> None:
    made = config(dataset="ucf101-2", root=ucf101)
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        assert (store.manifest.dataset, store.splits) == ("ucf101-2", {"train": 1, "test": 1})
        assert store.manifest.facts["request"]["dataset"] == "ucf101-2"


def test_a_list_that_gains_a_video_grows_its_store(config: MakeConfig, ucf101: Path) -> None:
    lists = {name: ucf101 / f"my_{name}_list.txt" for name in ("train", "val")}
    lists["train"].write_text("UCF-101/Archery/v_Archery_g08_c01.avi 0\n")
    lists["val"].write_text("UCF-101/Archery/v_Archery_g01_c01.avi 0\n")
    made = config(dataset=str(lists["train"]))
    assert run_extraction(made).progress.videos_done == 2
    lists["train"].write_text(lists["train"].read_text() + "UCF-101/Archery/v_Archery_g09_c01.avi 0\n")
    summary = run_extraction(config(dataset=str(lists["val"])))
    assert (summary.progress.videos_done, summary.progress.videos_skipped, summary.added) == (1, 2, {"train": 1})
