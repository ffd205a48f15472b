"""Something-Something V2 in miniature: the official files, and the lists with indices that DiST reads."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.base import Video
from vcache.extract.datasets.registry import load_dataset

A, B, C = "Approaching something with your camera", "Putting something, something and Something on it", "Zipping"
LABELS = {B: "1", C: "2", A: "0"}  # not in the order of the indices


def entry(video_id: object, template: str) -> dict[str, object]:
    return {"id": video_id, "label": "putting a cup on it", "template": template, "placeholders": ["a cup"]}


TRAIN = [
    entry("78687", "Putting [something], [something] and [Something] on it"),
    entry("9", "Approaching [something] with your camera"),
]
VALIDATION = [entry("74", "Zipping")]
OFFICIAL: dict[str, object] = {"labels.json": LABELS, "train.json": TRAIN, "validation.json": VALIDATION}


def moved(files: dict[str, object], folder: str, prefix: str = "") -> dict[str, object]:
    return {f"{folder}{prefix}{name}": content for name, content in files.items()}


@pytest.mark.parametrize("folder", ["", "labels/", "annotations/"])
@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
@pytest.mark.parametrize(
    "videos, suffix",
    [
        ("20bn-something-something-v2/", "webm"),
        ("videos/20bn-something-something-v2/", "webm"),
        ("videos/", "mp4"),
        ("", "webm"),
    ],
)
def test_official_files_are_read(
    folder: str, prefix: str, videos: str, suffix: str, lay_out: Callable[..., Path]
) -> None:
    files = moved(OFFICIAL, folder, prefix) | {f"{videos}{name}.{suffix}": None for name in ("78687", "9", "74")}
    dataset = load_dataset("ssv2", root=lay_out(files))
    assert dataset.class_names == (A, B, C)
    assert dataset.videos == (
        Video("78687", f"{videos}78687.{suffix}", 1, "train"),
        Video("9", f"{videos}9.{suffix}", 0, "train"),
        Video("74", f"{videos}74.{suffix}", 2, "val"),
    )
    assert dataset.unused == ()


def test_a_missing_video_keeps_its_row_beside_the_others(lay_out: Callable[..., Path]) -> None:
    dataset = load_dataset("ssv2", root=lay_out(OFFICIAL | {"videos/9.webm": None}))
    assert [video.path for video in dataset.missing] == ["videos/78687.webm", "videos/74.webm"]


@pytest.mark.parametrize("header", [[], ["id;label"]])
def test_test_has_the_labels_of_its_answers(header: list[str], lay_out: Callable[..., Path]) -> None:
    files = {"test.json": [{"id": "5"}, {"id": 6}], "test-answers.csv": [*header, f"6;{B}", f"5; {A} ", f"7;{C}"]}
    dataset = load_dataset("ssv2", root=lay_out(OFFICIAL | files))
    assert [(video.video_id, video.label) for video in dataset.split("test")] == [("5", 0), ("6", 1)]


def test_test_without_answers_is_in_no_split(lay_out: Callable[..., Path]) -> None:
    dataset = load_dataset("ssv2", root=lay_out(OFFICIAL | {"test.json": [{"id": "6"}, {"id": "5"}]}))
    assert dataset.splits == ("train", "val")
    assert dataset.unused == tuple(f"20bn-something-something-v2/{name}.webm" for name in "56")


def test_lists_with_indices_are_read(lay_out: Callable[..., Path]) -> None:
    files = {
        "labels.json": {A: 0, B: 1, C: 2},
        "train-with-label.json": [{"id": "1", "label_idx": 2}, {**entry("2", "Zipping"), "label_idx": "2"}],
    }
    root = lay_out(moved(files, "", "something-something-v2-"))
    assert [(video.video_id, video.label) for video in load_dataset("ssv2", root=root).videos] == [("1", 2), ("2", 2)]


@pytest.mark.parametrize(
    "files, name, line, words",
    [
        ({"labels.json": {A: "0", B: "2"}}, "labels.json", None, "the indices of its 2 templates are not 0 to 1"),
        ({"labels.json": {A: "0", B: "0"}}, "labels.json", None, "the indices of its 2 templates are not 0 to 1"),
        ({"labels.json": [A]}, "labels.json", None, 'expected an object of {template: "index"}'),
        ({"labels.json": b'{\n"a": "0",\n'}, "labels.json", 3, "not JSON: "),
        ({"labels.json": b'{"\xff": "0"}'}, "labels.json", None, "not UTF-8 text"),
        ({"train.json": {}}, "train.json", None, "{}; expected a list of objects"),
        ({"train.json": [TRAIN[0], "9"]}, "train.json", None, "entry 2: '9'; expected an object"),
        ({"train.json": [TRAIN[0], TRAIN[0]]}, "train.json", None, "entry 2: '78687' is listed twice in train (first as"),
        ({"train.json": [entry("1", "Eating [something]")]}, "train.json", None, "entry 1: template 'Eating something' is not"),
        ({"train.json": [entry("1", "zipping")]}, "train.json", None, "entry 1: template 'zipping' is not in labels.json"),
        ({"train.json": [entry("../1", "Zipping")]}, "train.json", None, "entry 1: id '../1' is not the name of a file"),
        ({"train.json": [entry("\ud800", "Zipping")]}, "train.json", None, "holds a character that no file name can"),
        ({"train.json": [entry(None, "Zipping")]}, "train.json", None, "entry 1: id is absent; expected text or a whole number"),
        ({"train.json": [entry(True, "Zipping")]}, "train.json", None, "entry 1: id is True; expected text or a whole number"),
        ({"train.json": [{"id": "1"}]}, "train.json", None, "entry 1: video 1 has neither a template nor a label_idx"),
        ({"train.json": [{"id": "1", "label_idx": 3}]}, "train.json", None, "entry 1: label_idx is 3; expected an index from 0"),
        ({"train.json": [{**entry("1", "Zipping"), "label_idx": 0}]}, "train.json", None, "entry 1: label_idx is 0, and"),
        ({"test.json": [{"id": "5"}], "test-answers.csv": [f"6;{A}"]}, "test.json", None, "entry 1: video 5 has neither"),
        ({"test.json": [], "test-answers.csv": [f"6;{A}", "5,Zipping"]}, "test-answers.csv", 2, "'5,Zipping' is not id;label"),
        ({"test.json": [], "test-answers.csv": ["5;Eating"]}, "test-answers.csv", 1, "'Eating' is not in labels.json"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_with_their_place(
    files: dict[str, object], name: str, line: int | None, words: str,
    lay_out: Callable[..., Path], refused: Callable[..., None],
) -> None:  # fmt: skip
    root = lay_out(OFFICIAL | files)
    refused("ssv2", root, root / name, line, words)


def test_without_lists_the_layout_is_said(lay_out: Callable[..., Path], refused: Callable[..., None]) -> None:
    refused("ssv2", lay_out({}), None, None, "no labels.json in")
    refused("ssv2", lay_out({"labels.json": LABELS}), None, None, "no train.json, validation.json or test.json in")
