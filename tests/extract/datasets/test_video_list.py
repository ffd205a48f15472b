"""Lists of `path label`, named as mmaction2 and the papers' repositories name them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.base import Video, hashed_split
from vcache.extract.datasets.registry import load_dataset


@pytest.mark.parametrize(
    "train, val, name",
    [
        ("train.txt", "val.txt", ""),
        ("train_video_list.txt", "val_video_list.txt", "video_list"),
        ("kinetics400_train_list_videos.txt", "kinetics400_val_list_videos.txt", "kinetics400_list_videos"),
        ("training-2.txt", "validation-2.txt", "2"),
    ],
)
def test_either_list_brings_the_other_along(train: str, val: str, name: str, lay_out: Callable[..., Path]) -> None:
    root = lay_out({train: ["b/2.mp4 1", "a b/ü 1.mp4 10"], val: ["b/3.webm\t0", "", "./b/2.mp4 1"], "b/2.mp4": None})
    datasets = [load_dataset(str(root / list)) for list in (train, val)]
    assert datasets[0] == datasets[1]
    assert datasets[0].name == (name or root.name)
    assert datasets[0].class_names == tuple(str(index) for index in range(11))
    assert datasets[0].videos == (
        Video("a b/ü 1.mp4", "a b/ü 1.mp4", 10, "train"),
        Video("b/2.mp4", "b/2.mp4", 1, "train"),
        Video("b/2.mp4", "b/2.mp4", 1, "val"),
        Video("b/3.webm", "b/3.webm", 0, "val"),
    )


def test_all_three_splits_are_loaded_in_their_order(lay_out: Callable[..., Path]) -> None:
    names = ("test", "val", "train")
    root = lay_out({f"ucf101_{name}_split_1_videos.txt": [f"A/{name}.avi 0"] for name in names})
    dataset = load_dataset(str(root / "ucf101_test_split_1_videos.txt"))
    assert (dataset.name, dataset.splits) == ("ucf101_split_1_videos", ("train", "val", "test"))


@pytest.mark.parametrize("name", ["mine.txt", "train.txt", "trainlist01.txt", "train_val.txt", "latest.txt"])
def test_a_list_alone_is_split_by_a_hash(name: str, lay_out: Callable[..., Path]) -> None:
    videos = [f"{'ab'[i % 2]}/{i}.mp4" for i in range(40)]
    root = lay_out({name: [f"{video} 0" for video in videos], "testing_notes.txt": ["x"], "other_val.txt": ["y"]})
    dataset = load_dataset(str(root / name))
    assert {video.path: video.split for video in dataset.videos} == {v: hashed_split(v, 0.2) for v in videos}
    assert dataset.splits == ("train", "val")


@pytest.mark.parametrize("name, split", [("val.txt", "val"), ("my_testing_list.txt", "test")])
def test_a_list_of_val_or_test_alone_stays_what_it_is(name: str, split: str, lay_out: Callable[..., Path]) -> None:
    assert load_dataset(str(lay_out({name: [f"{i}.mp4 0" for i in range(20)]}) / name)).splits == (split,)


@pytest.mark.parametrize(
    "train, val",
    [("", ""), ("train", "val"), ("videos", "videos"), ("videos/train", "videos/val"), ("videos_train", "videos_val")],
)
def test_videos_are_found_below_the_usual_folders(train: str, val: str, lay_out: Callable[..., Path]) -> None:
    root = lay_out(
        {
            "lists/train.txt": ["gone.mp4 0", "a/1.mp4 0"],
            "lists/val.txt": ["a/1.mp4 1"],
            f"data/{train}/a/1.mp4": None,
            f"data/{val}/a/1.mp4": None,
        }
    )
    dataset = load_dataset(str(root / "lists/train.txt"), root=root / "data")
    assert [video.path for video in dataset.missing] == [f"{train}/gone.mp4".lstrip("/")]
    assert [video.video_id for video in dataset.videos] == ["a/1.mp4", "gone.mp4", "a/1.mp4"]


def test_label_map_names_the_classes(lay_out: Callable[..., Path], refused: Callable[..., None]) -> None:
    root = lay_out(
        {"train.txt": ["1.mp4 2"], "val.txt": ["1.mp4 0"], "label_map_k3.txt": ["ab seiling", "bowling", "ä"]}
    )
    assert load_dataset(str(root / "val.txt")).class_names == ("ab seiling", "bowling", "ä")
    lay_out({"val.txt": ["2.mp4 1", "1.mp4 3"]})
    words = "label 3, and label_map_k3.txt names 3 classes"
    refused(str(root / "train.txt"), None, root / "val.txt", 2, words)
    lay_out({"label_map_k3.txt": ["a", "b", "c", "a"]})
    refused(str(root / "train.txt"), None, root / "label_map_k3.txt", None, "the class 'a' is listed twice")
    lay_out({"label_map.txt": ["a"]})
    refused(str(root / "train.txt"), None, None, None, "has 2 files label_map*.txt")


@pytest.mark.parametrize(
    "lines, line, words",
    [
        (["a.mp4 0", "b.mp4"], 2, "'b.mp4' does not end in the index of a class"),
        (["a.mp4 wave"], 1, "'a.mp4 wave' does not end in the index of a class; a CSV of path,label takes names"),
        (["a.mp4 -1"], 1, "does not end in the index of a class"),
        (["a.mp4 0", "b.mp4 1000000"], 2, "label 1000000 is not the index of a class"),
        (["7"], 1, "'7' does not end in the index of a class"),
        (["a.mp4 0", "", "b c/d.mp4 4 5 4"], 3, "'b c/d.mp4' has the same label twice"),
        (["abseiling/x 300 0"], 1, "'abseiling/x' does not end in the suffix of a video; a list takes"),
        (["a.mp4 0", "./a.mp4 1"], 2, "'a.mp4' is listed twice in train (first in train.txt, line 1)"),
        (["../a.mp4 0"], 1, "leaves"),
        (["/etc/a.mp4 0"], 1, "leaves"),
        (b"\xff.mp4 0", None, "not UTF-8 text"),
    ],
)
def test_malformed_lists_are_refused_with_their_line(
    lines: object, line: int | None, words: str, lay_out: Callable[..., Path], refused: Callable[..., None]
) -> None:
    root = lay_out({"train.txt": lines, "val.txt": ["z.mp4 0"]})
    refused(str(root / "val.txt"), None, root / "train.txt", line, words)


def test_several_labels_on_a_line_make_it_multi_label(lay_out: Callable[..., Path]) -> None:
    root = lay_out({"train.txt": ["a 1 2.mp4 3", "b.mp4 7\t2 5"], "val.txt": ["c.mp4 0"]})
    dataset = load_dataset(str(root / "train.txt"))
    assert (dataset.multi_label, len(dataset.class_names)) == (True, 8)
    assert [(video.path, video.label, video.classes) for video in dataset.videos] == [
        ("a 1 2.mp4", 3, (3,)),
        ("b.mp4", 7, (2, 5, 7)),
        ("c.mp4", 0, (0,)),
    ]
    single = load_dataset(str(lay_out({"train.txt": ["a.mp4 3"]}) / "val.txt"))
    assert not single.multi_label
    assert all(video.classes == () for video in single.videos)


def test_an_empty_list_is_refused(lay_out: Callable[..., Path], refused: Callable[..., None]) -> None:
    refused(str(lay_out({"all.txt": []}) / "all.txt"), None, None, None, "lists no videos at all")
