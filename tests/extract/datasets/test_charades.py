"""Charades in miniature: the real files and columns, three classes, five videos."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.datasets.base import DatasetError, Video
from vcache.extract.datasets.registry import load_dataset

HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
CLASSES = ("c000 Holding some clothes", "c001 Putting clothes somewhere", "c002 Taking some clothes from somewhere")


def line(video_id: str, actions: str) -> str:
    return f'{video_id},HR43,Kitchen,6,7,Yes,"A person, cooking; ""well"".",food;stove,cooks.,{actions},24.83'


TRAIN = (
    line("YSKX3", "c002 11.90 21.20;c000 0.00 12.60;c002 25.5 30"),
    line("46GP8", ""),
    line("0A8CF", "c001 0.00 3.5"),
)
TEST = (line("9PAZR", "c000 1.20 2.00"), line("OYMDN", "c001 0.00 7.25"))


def write(root: Path, name: str, *lines: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With a space and an umlaut in its path."""
    root = tmp_path / "mein häus"
    write(root, "Charades_v1_classes.txt", *CLASSES)
    write(root, "Charades_v1_train.csv", HEADER, *TRAIN)
    write(root, "Charades_v1_test.csv", HEADER, *TEST)
    (root / "Charades_v1_480").mkdir()
    for video in ("YSKX3", "46GP8", "0A8CF", "9PAZR"):
        (root / "Charades_v1_480" / f"{video}.mp4").touch()
    return root


def test_a_video_has_all_its_classes_and_when_they_are_seen(root: Path) -> None:
    dataset = load_dataset("charades", root=root)
    assert dataset.class_names == tuple(text.split(" ", 1)[1] for text in CLASSES)
    assert (dataset.splits, dataset.multi_label) == (("train", "test"), True)
    assert dataset.split("train") == (
        Video("0A8CF", "Charades_v1_480/0A8CF.mp4", 1, "train", classes=(1,), actions=((1, 0.0, 3.5),)),
        Video("46GP8", "Charades_v1_480/46GP8.mp4", -1, "train"),
        Video(
            "YSKX3",
            "Charades_v1_480/YSKX3.mp4",
            2,
            "train",
            classes=(0, 2),
            actions=((2, 11.9, 21.2), (0, 0.0, 12.6), (2, 25.5, 30.0)),
        ),
    )
    assert [video.video_id for video in dataset.split("test")] == ["9PAZR", "OYMDN"]
    assert [video.path for video in dataset.missing] == ["Charades_v1_480/OYMDN.mp4"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9999), st.integers(0, 9999)), max_size=6))
def test_whatever_the_actions_are_they_are_read_as_written(tmp_path_factory, actions):
    root = tmp_path_factory.mktemp("charades")
    text = ";".join(f"c{label:03d} {start / 100:.2f} {stop / 100:.2f}" for label, start, stop in actions)
    write(root, "Charades_v1_classes.txt", *CLASSES)
    write(root, "Charades_v1_train.csv", HEADER, line("ABCDE", text))
    (video,) = load_dataset("charades", root=root).videos
    assert video.actions == tuple((label, start / 100, stop / 100) for label, start, stop in actions)
    assert video.classes == tuple(label for label in range(3) if label in [action[0] for action in actions])
    assert video.label == (actions[0][0] if actions else -1)


@pytest.mark.parametrize("place", ["Charades_v1", "videos", "."])
@pytest.mark.parametrize("suffix", [".mp4", ".MKV"])
def test_videos_are_found_in_every_usual_place(root: Path, place: str, suffix: str) -> None:
    (root / place).mkdir(exist_ok=True)
    (root / "Charades_v1_480" / "YSKX3.mp4").rename(root / place / f"YSKX3{suffix}")
    dataset = load_dataset("charades", root=root, splits=("train",))
    assert dataset.missing == ()
    assert (Path(place) / f"YSKX3{suffix}").as_posix() in {video.path for video in dataset.videos}


@pytest.mark.parametrize("folder", ["Charades", "annotations"])
def test_the_annotation_may_be_in_a_folder_and_of_one_split(root: Path, folder: str) -> None:
    (root / folder).mkdir()
    for file in list(root.glob("Charades_v1_*.*")):
        file.rename(root / folder / file.name)
    (root / folder / "Charades_v1_test.csv").unlink()
    dataset = load_dataset("charades", root=root)
    assert (dataset.splits, len(dataset.videos)) == (("train",), 3)


@pytest.mark.parametrize(
    ("name", "lines", "number", "words"),
    [
        ("train.csv", (HEADER.replace("actions", "action"), TRAIN[0]), 1, "no column actions"),
        ("train.csv", (HEADER, TRAIN[0], line("", "c000 1 2")), 3, "id is empty"),
        ("train.csv", (HEADER, TRAIN[0], TRAIN[0]), 3, "'YSKX3' is listed twice in train"),
        (
            "train.csv",
            (HEADER, line("A", "c003 1 2")),
            2,
            "'c003' is not in Charades_v1_classes.txt, which ends at c002",
        ),
        ("train.csv", (HEADER, line("A", "c1 1 2")), 2, "'c1' is not in"),
        ("train.csv", (HEADER, line("A", "c-01 1 2")), 2, "'c-01' is not in"),
        ("train.csv", (HEADER, line("A", "c000 1")), 2, "'c000 1' is no action; expected `c092 11.90 21.20`"),
        ("train.csv", (HEADER, line("A", "c000 1 2;c001 1 x")), 2, "'c001 1 x' is no action"),
        ("test.csv", (HEADER, line("A", "c000 1 nan")), 2, "has a time that is not a number of seconds"),
        ("test.csv", (HEADER, line("A", "c000 -1 2")), 2, "has a time that is not a number of seconds"),
        ("test.csv", (HEADER, line("../A", "c000 1 2")), 2, "leaves .* say --root"),
        ("test.csv", (HEADER, line("x/../../../A", "c000 1 2")), 2, "leaves .* say --root"),
        ("classes.txt", (CLASSES[0], CLASSES[2]), 2, "expected c001 and a class"),
        ("classes.txt", (CLASSES[0], "", "c001"), 3, "'c001'; expected c001 and a class"),
    ],
)
def test_a_malformed_row_is_refused_with_its_file_and_line(
    root: Path, name: str, lines: tuple[str, ...], number: int, words: str
) -> None:
    file = write(root, f"Charades_v1_{name}", *lines)
    with pytest.raises(DatasetError, match=words) as caught:
        load_dataset("charades", root=root)
    assert (caught.value.file, caught.value.line) == (file, number)


def test_what_is_absent_is_named(root: Path) -> None:
    for file in root.glob("*.csv"):
        file.unlink()
    with pytest.raises(DatasetError, match=r"no Charades_v1_train.csv or Charades_v1_test.csv in .*; expected:\n"):
        load_dataset("charades", root=root)
    (root / "Charades_v1_classes.txt").write_bytes(b"c000 \xff\n")
    with pytest.raises(DatasetError, match="not UTF-8 text"):
        load_dataset("charades", root=root)
    (root / "Charades_v1_classes.txt").unlink()
    with pytest.raises(DatasetError, match="no Charades_v1_classes.txt"):
        load_dataset("charades", root=root)
