"""Diving48 V2 in miniature."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.base import Video
from vcache.extract.datasets.registry import load_dataset


def dive(name: object, label: object) -> dict[str, object]:
    return {"vid_name": name, "label": label, "start_frame": 0, "end_frame": 137}


FILES: dict[str, object] = {
    "Diving48_vocab.json": [["Back", "15som", "05Twis", "FREE"], ["Reverse", "Dive", "NoTwis", "PIKE"]],
    "Diving48_V2_train.json": [dive("_8Vy3dlHg2w_00001", 1), dive("-1_00000", 0)],
    "Diving48_V2_test.json": [dive("x_00012", 1)],
}


@pytest.mark.parametrize("folder", ["", "annotations/"])
@pytest.mark.parametrize("place", ["rgb/", "videos/", ""])
def test_vocabulary_and_lists_are_read(folder: str, place: str, lay_out: Callable[..., Path]) -> None:
    files = {f"{folder}{name}": content for name, content in FILES.items()}
    names = ("_8Vy3dlHg2w_00001", "-1_00000", "x_00012")
    dataset = load_dataset("diving48", root=lay_out(files | {f"{place}{name}.mp4": None for name in names}))
    assert dataset.class_names == ("Back 15som 05Twis FREE", "Reverse Dive NoTwis PIKE")
    assert dataset.videos == (
        Video("-1_00000", f"{place}-1_00000.mp4", 0, "train"),
        Video("_8Vy3dlHg2w_00001", f"{place}_8Vy3dlHg2w_00001.mp4", 1, "train"),
        Video("x_00012", f"{place}x_00012.mp4", 1, "test"),
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("Diving48_vocab.json", {}, "expected a list of lists of words"),
        ("Diving48_vocab.json", [["Back"], "Reverse"], "entry 2: 'Reverse'; expected a list of words"),
        ("Diving48_vocab.json", [["Back"], ["Back"]], "two entries are the same"),
        (
            "Diving48_V2_train.json",
            [dive("a", 0), dive("a", 1)],
            "entry 2: 'a' is listed twice in train (first as entry 1)",
        ),
        ("Diving48_V2_train.json", [dive("a", 2)], "entry 1: label is 2; expected an index from 0 to 1"),
        ("Diving48_V2_train.json", [dive("a", -1)], "entry 1: label is -1; expected an index"),
        ("Diving48_V2_train.json", [dive("a", 0.5)], "entry 1: label is 0.5; expected text or a whole number"),
        ("Diving48_V2_test.json", [{"label": 0}], "entry 1: vid_name is absent; expected text or a whole number"),
        ("Diving48_V2_test.json", [dive("../a", 0)], "entry 1: vid_name '../a' is not the name of a file"),
        ("Diving48_V2_test.json", [[]], "entry 1: []; expected an object"),
    ],
)
def test_malformed_files_are_refused_with_their_entry(
    name: str, content: object, words: str, lay_out: Callable[..., Path], refused: Callable[..., None]
) -> None:
    root = lay_out(FILES | {name: content})
    refused("diving48", root, root / name, None, words)


def test_files_that_are_not_there_are_named(lay_out: Callable[..., Path], refused: Callable[..., None]) -> None:
    refused("diving48", lay_out({}), None, None, "no Diving48_vocab.json in")
    root = lay_out({"Diving48_vocab.json": FILES["Diving48_vocab.json"]})
    refused("diving48", root, None, None, "no Diving48_V2_train.json or _test.json")
