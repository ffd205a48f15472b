"""EPIC-KITCHENS-100 in miniature: the real files and columns, two kitchens, three videos, seven actions."""

from pathlib import Path

import pytest

from vcache.extract.datasets.base import DatasetError, Video
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.video import Segment

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
VERBS = (
    "id,key,instances,category",
    "0,take,\"['collect-from', 'fetch']\",retrieve",
    "1,put,['lay'],leave",
    "2,open,[],access",
)
NOUNS = ("id,key,instances,category", "0,tap,['tap'],fixtures", "1,board:chopping,['board'],appliances")  # fmt: skip
TRAIN = (
    "P01_01_0,P01,P01_01,00:00:01.1,00:00:00.14,00:00:03.37,8,202,open door,open,2,door,1,['door'],[1]",
    'P01_01_10,P01,P01_01,00:00:06.2,00:00:06.98,00:00:09.49,418,569,"tap, board",take,0,tap,0,"[\'tap\', \'board\']","[0, 1]"',
    "P01_01_2,P01,P01_01,00:00:06.2,00:00:04.37,00:00:06.17,262,418,close tap,put,1,tap,0,['tap'],[0]",
    "P02_101_0,P02,P02_101,00:00:00.5,00:00:00.00,00:00:00.02,0,1,fetch board,fetch,0,board,1,['board'],[1]",
)
VALIDATION = (
    "P02_03_0,P02,P02_03,00:00:01.0,00:00:00.50,00:00:02.00,25,100,open tap,open,2,tap,0,['tap'],[0]",
    "P02_03_1,P02,P02_03,00:00:02.0,00:00:01.50,00:00:02.50,75,125,take tap,take,0,tap,0,['tap'],[0]",
)
FILES = {
    "EPIC_100_train.csv": (HEADER, *TRAIN),
    "EPIC_100_validation.csv": (HEADER, *VALIDATION),
    "EPIC_100_verb_classes.csv": VERBS,
    "EPIC_100_noun_classes.csv": NOUNS,
    "EPIC_100_test_timestamps.csv": (HEADER[: HEADER.index(",narration,")], "P02_04_0,P02,P02_04,0,0,0,1,9"),
}


def write(folder: Path, name: str, *lines: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With a space and an umlaut in its path."""
    root = tmp_path / "my küche"
    for name, lines in FILES.items():
        write(root, name, *lines)
    for person, video in (("P01", "P01_01"), ("P02", "P02_101"), ("P02", "P02_03")):
        touch(root / person / "videos" / f"{video}.MP4")
    return root


def test_every_narration_is_a_segment_with_an_action_a_verb_and_a_noun(root: Path) -> None:
    dataset = load_dataset("epic-kitchens-100", root=root)
    assert dataset.class_names == ("take tap", "take board:chopping", "put tap", "open tap", "open board:chopping")
    assert dataset.label_names == {"verb": ("take", "put", "open"), "noun": ("tap", "board:chopping")}
    assert (dataset.splits, dataset.multi_label, dataset.missing) == (("train", "val"), False, ())
    path = "P01/videos/P01_01.MP4"
    assert dataset.split("train") == (
        Video("P01_01_0", path, 4, "train", Segment(7.0, 202.0, "frames"), (("noun", 1), ("verb", 2))),
        Video("P01_01_2", path, 2, "train", Segment(261.0, 418.0, "frames"), (("noun", 0), ("verb", 1))),
        Video("P01_01_10", path, 0, "train", Segment(417.0, 569.0, "frames"), (("noun", 0), ("verb", 0))),
        Video(
            "P02_101_0", "P02/videos/P02_101.MP4", 1, "train", Segment(0.0, 1.0, "frames"), (("noun", 1), ("verb", 0))
        ),
    )
    assert [(video.video_id, video.label) for video in dataset.split("val")] == [("P02_03_0", 3), ("P02_03_1", 0)]


def test_an_action_names_its_verb_and_its_noun(root: Path) -> None:
    dataset = load_dataset("epic-kitchens-100", root=root)
    for video in dataset.videos:
        labels = dict(video.labels)
        words = (dataset.label_names["verb"][labels["verb"]], dataset.label_names["noun"][labels["noun"]])
        assert " ".join(words) == dataset.class_names[video.label]


def test_actions_that_only_validation_has_are_classes_of_train_too(root: Path) -> None:
    train = load_dataset("epic-kitchens-100", root=root, splits=("train",))
    assert "open tap" in train.class_names
    assert train.class_names == load_dataset("epic-kitchens-100", root=root, splits=("val",)).class_names
    assert train.label_names["verb"] == ("take", "put", "open")


def test_the_order_of_the_rows_changes_nothing(root: Path) -> None:
    expected = load_dataset("epic-kitchens-100", root=root)
    write(root, "EPIC_100_train.csv", HEADER, *reversed(TRAIN))
    assert load_dataset("epic-kitchens-100", root=root) == expected


@pytest.mark.parametrize("folder", ["annotations", "epic-kitchens-100-annotations"])
def test_the_csvs_may_be_in_a_folder(root: Path, folder: str) -> None:
    expected = load_dataset("epic-kitchens-100", root=root)
    (root / folder).mkdir()
    for name in FILES:
        (root / name).rename(root / folder / name)
    assert load_dataset("epic-kitchens-100", root=root) == expected


@pytest.mark.parametrize("place", ["P01", "videos", "videos/P01", "EPIC-KITCHENS/P01/videos"])
@pytest.mark.parametrize("suffix", [".MP4", ".mp4", ".webm"])
def test_videos_are_found_in_every_usual_place(root: Path, place: str, suffix: str) -> None:
    (root / "P01/videos/P01_01.MP4").unlink()
    lost = load_dataset("epic-kitchens-100", root=root)
    assert {video.path for video in lost.missing} == {"P01/videos/P01_01.MP4"}
    touch(root / place / f"P01_01{suffix}")
    dataset = load_dataset("epic-kitchens-100", root=root)
    assert dataset.missing == ()
    assert f"{place}/P01_01{suffix}" in {video.path for video in dataset.videos}


@pytest.mark.parametrize("name", list(FILES)[:4])
def test_an_absent_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(DatasetError, match=f"no {name} in .*; expected:\nEPIC_100_train.csv"):
        load_dataset("epic-kitchens-100", root=root)


def row(**fields: str) -> str:
    columns = dict(zip(HEADER.split(","), TRAIN[0].split(","), strict=True))
    return ",".join((columns | {"narration_id": "P01_01_9"} | fields).values())


@pytest.mark.parametrize(
    ("name", "lines", "line", "words"),
    [
        ("EPIC_100_train.csv", (HEADER.replace("noun_class,", "class,", 1), TRAIN[0]), 1, "no column noun_class"),
        ("EPIC_100_train.csv", (HEADER, TRAIN[0], TRAIN[0]), 3, "'P01_01_0' is listed twice in train"),
        (
            "EPIC_100_train.csv",
            (HEADER, TRAIN[0], row(verb_class="3")),
            3,
            "verb_class is 3; .*verb_classes.csv has 0 to 2",
        ),
        ("EPIC_100_validation.csv", (HEADER, row(noun_class="-1")), 2, "noun_class is '-1'; expected a whole number"),
        ("EPIC_100_train.csv", (HEADER, row(start_frame="8.5")), 2, "start_frame is '8.5'; expected a whole number"),
        ("EPIC_100_train.csv", (HEADER, row(start_frame="203")), 2, "frames 203 to 202 are none"),
        ("EPIC_100_train.csv", (HEADER, row(video_id="")), 2, "video_id is empty"),
        ("EPIC_100_train.csv", (HEADER, TRAIN[0] + ",x"), 2, "16 fields where the header has 15"),
        ("EPIC_100_train.csv", (HEADER, row(participant_id="../../P01")), 2, "leaves .* say --root"),
        ("EPIC_100_train.csv", (HEADER, row(participant_id="/etc")), 2, "leaves .* say --root"),
        (
            "EPIC_100_verb_classes.csv",
            ("id,key", "0,take", "2,open"),
            3,
            "id '2' with key 'open'; expected 1 and a name",
        ),
        ("EPIC_100_noun_classes.csv", ("id,noun", "0,tap"), 1, "no column key"),
    ],
)
def test_a_malformed_row_is_refused_with_its_file_and_line(
    root: Path, name: str, lines: tuple[str, ...], line: int, words: str
) -> None:
    file = write(root, name, *lines)
    with pytest.raises(DatasetError, match=words) as caught:
        load_dataset("epic-kitchens-100", root=root)
    assert (caught.value.file, caught.value.line) == (file, line)
