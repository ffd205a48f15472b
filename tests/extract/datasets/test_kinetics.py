"""What k600 and k700 share with k400, test lists without labels, and names that lead elsewhere; test_datasets.py has the rest."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.base import Video
from vcache.extract.datasets.presence import presence
from vcache.extract.datasets.registry import load_dataset

HEADER = "label,youtube_id,time_start,time_end,split"


@pytest.mark.parametrize("name", ["k400", "k600", "k700"])
def test_each_kinetics_is_read_under_its_own_name(name: str, lay_out: Callable[..., Path]) -> None:
    root = lay_out(
        {
            "kinetics_600_train.csv": [
                HEADER,
                "zumba,a-b_c,10,20,train",
                '"bœuf, cooking (not on a bbq)",dEf,0,10,train',
            ],
            "kinetics_600_val.csv": [HEADER, "zumba,-gH,128,138,validate"],
            "train/a-b_c_000010_000020.mp4": None,
            "train/dEf_000000_000010.mp4": None,
            "val/-gH_000128_000138.mp4": None,
        }
    )
    dataset = load_dataset(name, root=root)
    assert (dataset.name, dataset.class_names) == (name, ("bœuf, cooking (not on a bbq)", "zumba"))
    assert [(video.path, video.label) for video in dataset.videos] == [
        ("train/a-b_c_000010_000020.mp4", 1),
        ("train/dEf_000000_000010.mp4", 0),
        ("val/-gH_000128_000138.mp4", 1),
    ]


@pytest.mark.parametrize(
    "test_list",
    [
        ["youtube_id,time_start,time_end,split", "u1,1,11,test", "u2,2,12,test"],
        [HEADER, ",u1,1,11,test", ",u2,2,12,test"],
    ],
)
def test_videos_of_test_without_a_label_are_in_no_split(test_list: list[str], lay_out: Callable[..., Path]) -> None:
    root = lay_out(
        {
            "train.csv": [HEADER, "zumba,abc,0,10,train"],
            "test.csv": test_list,
            "train/abc_000000_000010.mp4": None,
            "test/u1_000001_000011.mp4": None,
            "test/u3_000001_000011.mp4": None,
        }
    )
    dataset = load_dataset("k700", root=root)
    assert (dataset.splits, dataset.class_names) == (("train",), ("zumba",))
    assert dataset.unused == ("test/u1_000001_000011.mp4", "test/u2_000002_000012.mp4")
    assert presence(dataset).extra == ("test/u3_000001_000011.mp4",)


def test_labelled_test_lists_are_a_split(lay_out: Callable[..., Path]) -> None:
    root = lay_out({"train.csv": [HEADER, "zumba,abc,0,10,train"], "test.csv": [HEADER, "yoga,abc,5,15,test"]})
    dataset = load_dataset("k400", root=root)
    assert dataset.split("test") == (Video("abc_000005_000015", "test/abc_000005_000015.mp4", 0, "test"),)


@pytest.mark.parametrize("place", ["videos_val", "videos_val/baking_cookies"])
def test_mmaction2_folders_are_found(place: str, lay_out: Callable[..., Path]) -> None:
    path = f"{place}/abc_000000_000010.mp4"
    root = lay_out({"val.csv": [HEADER, "baking cookies,abc,0,10,val"], path: None})
    assert [video.path for video in load_dataset("k400", root=root).videos] == [path]


@pytest.mark.parametrize(
    "row, words",
    [
        ("zumba,../../etc/x,1,11,train", "youtube_id '../../etc/x' is not the name of a file"),
        ("zumba,abc,1,11,../up", "split '../up' is not the name of a file"),
        ("zumba,abc,-1,11,train", "time_start '-1' and time_end '11' must be whole seconds"),
        ("zumba,a\0c,1,11,train", "holds a character that no file name can"),
        (",abc,1,11,train", "label is empty"),
    ],
)
def test_rows_that_no_video_has_are_refused(
    row: str, words: str, lay_out: Callable[..., Path], refused: Callable[..., None]
) -> None:
    root = lay_out({"train.csv": [HEADER, "zumba,ok,1,11,train", row]})
    refused("k600", root, root / "train.csv", 3, words)


def test_a_label_does_not_lead_out_of_the_root(lay_out: Callable[..., Path]) -> None:
    lay_out({"up/abc_000001_000011.mp4": None, "root/train.csv": [HEADER, "../../up,abc,1,11,train"]})
    root = lay_out({}) / "root"
    assert [video.path for video in load_dataset("k400", root=root).videos] == ["train/abc_000001_000011.mp4"]


def test_missing_and_extra_files_are_reported_together(
    lay_out: Callable[..., Path],
) -> None:
    root = lay_out(
        {
            "train.csv": [HEADER, "zumba,abc,1,11,train", "zumba,def,1,11,train"],
            "train/abc_000001_000011.mp4": None,
            "train/abc_000001_000012.mp4": None,  # the same video, cut elsewhere
        }
    )
    found = presence(load_dataset("k400", root=root))
    assert [video.path for video in found.missing] == ["train/def_000001_000011.mp4"]
    assert found.extra == ("train/abc_000001_000012.mp4",)
