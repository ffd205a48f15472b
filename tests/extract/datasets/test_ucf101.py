"""UCF101 in miniature: three official splits under three names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.base import Video
from vcache.extract.datasets.presence import presence
from vcache.extract.datasets.registry import load_dataset

# In the order of classInd.txt, which is not that of the alphabet; the official files end their lines with CR LF.
LISTS: dict[str, object] = {
    "classInd.txt": b"1 YoYo\r\n2 ApplyEyeMakeup\r\n3 HandstandPushups\r\n",
    "trainlist01.txt": b"YoYo/v_YoYo_g08_c01.avi 1\r\nApplyEyeMakeup/v_A_g08_c01.avi 2\r\n",
    "testlist01.txt": b"HandstandPushups/v_HandStandPushups_g01_c01.avi\r\nYoYo/v_YoYo_g01_c02.avi\r\n",
    "trainlist02.txt": ["YoYo/v_YoYo_g01_c02.avi 1", "HandstandPushups/v_HandStandPushups_g01_c01.avi 3"],
    "testlist02.txt": ["YoYo/v_YoYo_g08_c01.avi", "ApplyEyeMakeup/v_A_g08_c01.avi 2"],
    "trainlist03.txt": ["YoYo/v_YoYo_g08_c01.avi 1"],
    "testlist03.txt": ["YoYo/v_YoYo_g01_c02.avi"],
}
VIDEOS = (
    "YoYo/v_YoYo_g08_c01",
    "YoYo/v_YoYo_g01_c02",
    "ApplyEyeMakeup/v_A_g08_c01",
    "HandstandPushups/v_HandStandPushups_g01_c01",
)


@pytest.mark.parametrize("folder", ["", "ucfTrainTestlist/", "annotations/"])
@pytest.mark.parametrize("place, suffix", [("", "avi"), ("UCF-101/", "avi"), ("UCF101/", "mp4"), ("videos/", "AVI")])
def test_first_split_is_read(folder: str, place: str, suffix: str, lay_out: Callable[..., Path]) -> None:
    files = {f"{folder}{name}": content for name, content in LISTS.items()}
    dataset = load_dataset("ucf101", root=lay_out(files | {f"{place}{video}.{suffix}": None for video in VIDEOS}))
    assert (dataset.name, dataset.class_names) == ("ucf101", ("YoYo", "ApplyEyeMakeup", "HandstandPushups"))
    assert [(video.video_id, video.path, video.label, video.split) for video in dataset.videos] == [
        (name, f"{place}{name}.{suffix}", label, split)
        for name, label, split in (
            ("ApplyEyeMakeup/v_A_g08_c01", 1, "train"),
            ("YoYo/v_YoYo_g08_c01", 0, "train"),
            ("HandstandPushups/v_HandStandPushups_g01_c01", 2, "test"),
            ("YoYo/v_YoYo_g01_c02", 0, "test"),
        )
    ]


def test_other_splits_have_names_of_their_own_and_one_folder(
    lay_out: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = lay_out({f"ucf101/{name}": content for name, content in LISTS.items()})
    monkeypatch.setenv("VCACHE_DATA", str(root))
    dataset = load_dataset("ucf101-2")
    assert (dataset.name, dataset.root) == ("ucf101-2", root / "ucf101")
    assert [video.video_id.split("/")[0] for video in dataset.split("test")] == ["ApplyEyeMakeup", "YoYo"]
    assert len(load_dataset("ucf101-3").videos) == 2


def test_folder_of_a_class_may_be_written_in_another_case(lay_out: Callable[..., Path]) -> None:
    name = "HandStandPushups/v_HandStandPushups_g02_c01"
    files = LISTS | {"testlist01.txt": [f"{name}.avi"], f"UCF-101/{name}.avi": None}
    assert load_dataset("ucf101", root=lay_out(files)).split("test") == (Video(name, f"UCF-101/{name}.avi", 2, "test"),)


def test_missing_and_extra_files_are_found(lay_out: Callable[..., Path]) -> None:
    root = lay_out(LISTS | {f"UCF-101/{video}.avi": None for video in VIDEOS[1:]} | {"UCF-101/YoYo/v_new.avi": None})
    found = presence(load_dataset("ucf101", root=root))
    assert [video.path for video in found.missing] == ["UCF-101/YoYo/v_YoYo_g08_c01.avi"]
    assert found.extra == ("UCF-101/YoYo/v_new.avi",)


@pytest.mark.parametrize(
    "name, lines, line, words",
    [
        ("classInd.txt", ["1 YoYo", "3 Archery"], 2, "'3 Archery'; expected 2 and a class"),
        ("classInd.txt", ["1 YoYo", "2"], 2, "'2'; expected 2 and a class"),
        ("classInd.txt", ["1 YoYo", "2 yoyo"], 2, "the class 'yoyo' is listed twice"),
        ("trainlist01.txt", ["YoYo/a.avi 1", "Archery/b.avi 2"], 2, "'Archery/b.avi' is not in the folder of a class"),
        ("trainlist01.txt", ["YoYo/a.avi 2"], 1, "index 2 for 'YoYo/a.avi'; its folder has 1 in classInd.txt"),
        ("trainlist01.txt", ["a.avi 1"], 1, "'a.avi' is not in the folder of a class"),
        ("trainlist01.txt", ["YoYo/a.avi 1", "", "./YoYo/a.avi 1"], 3, "listed twice in train (first in trainlist01.txt"),
        ("testlist01.txt", ["../YoYo/a.avi"], 1, "leaves"),
        ("testlist01.txt", ["YoYo/../../YoYo/a.avi"], 1, "leaves"),
        ("testlist01.txt", b"YoYo/\xff.avi", None, "not UTF-8 text"),
    ],
)  # fmt: skip
def test_malformed_lists_are_refused_with_their_line(
    name: str, lines: object, line: int | None, words: str, lay_out: Callable[..., Path], refused: Callable[..., None]
) -> None:
    root = lay_out(LISTS | {name: lines})
    refused("ucf101", root, root / name, line, words)


def test_a_list_that_is_not_there_is_named(lay_out: Callable[..., Path], refused: Callable[..., None]) -> None:
    refused("ucf101-3", lay_out({"classInd.txt": ["1 YoYo"]}), None, None, "no trainlist03.txt in")
