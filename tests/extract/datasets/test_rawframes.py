"""Lists of folders of frames in miniature."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.datasets.base import DatasetError, Video
from vcache.extract.datasets.rawframes import looks_like_rawframes
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.video import Segment


def frames(root: Path, folder: str, count: int, name: str = "img_{:05d}.jpg") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        (root / folder / name.format(number)).touch()


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def video(folder: str, num_frames: int, label: int, split: str) -> Video:
    return Video(folder, folder, label, split, segment=Segment(0.0, float(num_frames), "frames"))


def test_each_line_is_a_folder_and_the_segment_of_its_frames(tmp_path: Path) -> None:
    root = tmp_path / "my küche"
    frames(root, "wave/ä 7", 3)
    frames(root, "jump/v.b", 5)
    listing = text(root / "val.txt", "wave/ä 7 3 1", "", "./jump/v.b 5 0", "gone/x 9 3")
    dataset = load_dataset(str(listing))
    assert (dataset.name, dataset.root, dataset.class_names) == ("my küche", root, ("0", "1", "2", "3"))
    assert dataset.videos == (
        video("gone/x", 9, 3, "val"),
        video("jump/v.b", 5, 0, "val"),
        video("wave/ä 7", 3, 1, "val"),
    )
    assert dataset.missing == (video("gone/x", 9, 3, "val"),)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.from_regex(r"[a-zé0-9 _-]*[a-zé0-9_-]", fullmatch=True), st.integers(1, 999), st.integers(0, 9)),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[0].strip(),
    )
)
def test_any_folder_name_is_read_back_with_its_numbers(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rawframes")
    listing = text(folder / "val.txt", *(f"{name} {count} {label}" for name, count, label in rows))
    dataset = load_dataset(str(listing))
    expected = sorted((name.strip(), float(count), label) for name, count, label in rows)
    assert [(video.path, video.segment.stop, video.label) for video in dataset.videos] == expected


@pytest.mark.parametrize("names", [("train.txt", "val.txt"), ("k400_training_rawframes.txt", "k400_val_rawframes.txt")])
def test_the_lists_of_the_other_splits_come_along(tmp_path: Path, names: tuple[str, str]) -> None:
    frames(tmp_path, "a", 1)
    text(tmp_path / names[0], "a 1 0", "b 2 2")
    text(tmp_path / names[1], "c 3 1")
    text(tmp_path / "notes_val.txt", "not a list")
    datasets = [load_dataset(str(tmp_path / name)) for name in names]
    assert datasets[0] == datasets[1]
    assert datasets[0].videos == (video("a", 1, 0, "train"), video("b", 2, 2, "train"), video("c", 3, 1, "val"))
    assert datasets[0].class_names == ("0", "1", "2")


def test_a_list_of_no_split_or_of_train_alone_is_divided(tmp_path: Path) -> None:
    lines = [f"v{number} 4 0" for number in range(60)]
    for name in ("list.txt", "train.txt"):
        dataset = load_dataset(str(text(tmp_path / name, *lines)))
        assert {split: bool(dataset.split(split)) for split in dataset.splits} == {"train": True, "val": True}
    assert load_dataset(str(tmp_path / "list.txt"), val_fraction=0.0).splits == ("train",)


def test_a_label_map_names_the_classes(tmp_path: Path) -> None:
    listing = text(tmp_path / "val.txt", "a 1 0", "b 1 2")
    text(tmp_path / "label_map_k3.txt", "clap", "jump rope", "wave", "zumba")
    assert load_dataset(str(listing)).class_names == ("clap", "jump rope", "wave", "zumba")
    text(tmp_path / "label_map_k3.txt", "clap", "jump rope")
    with pytest.raises(DatasetError, match="val.txt, line 2: label 2, and label_map_k3.txt names 2 classes"):
        load_dataset(str(listing))
    text(tmp_path / "label_map.txt", "clap")
    with pytest.raises(DatasetError, match="has 2 files label_map"):
        load_dataset(str(listing))


@pytest.mark.parametrize(
    "name", ["img_{:05d}.jpg", "image_{:04d}.jpg", "frame_{:06d}.jpg", "img_{:05d}.JPEG", "{:d}.png"]
)
def test_frames_may_have_the_usual_names(tmp_path: Path, name: str) -> None:
    frames(tmp_path, "b", 2, name)
    assert len(load_dataset(str(text(tmp_path / "val.txt", "a 2 0", "b 2 0"))).videos) == 2


@pytest.mark.parametrize("name", ["{:05d}.txt", "img_{:05d}.jpg.part", "{:d}_img.jpg"])
def test_a_folder_without_frames_is_refused_at_once(tmp_path: Path, name: str) -> None:
    frames(tmp_path, "b", 2, name)
    with pytest.raises(DatasetError, match="line 2: .*/b holds no numbered images, as img_00001.jpg"):
        load_dataset(str(text(tmp_path / "val.txt", "a 2 0", "b 2 0")))


def test_folders_may_be_below_another_root(tmp_path: Path) -> None:
    frames(tmp_path / "frames", "a.mp4", 2)
    listing = text(tmp_path / "lists" / "val.txt", "a.mp4 2 0", f"{tmp_path}/frames/b 3 1")
    dataset = load_dataset(str(listing), root=tmp_path / "frames")
    assert dataset.root == tmp_path / "frames"
    assert [video.path for video in dataset.videos] == ["a.mp4", "b"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a/b 12 3", True),
        ("folder.mp4 12 3", True),
        ("a b/c 12 3", True),
        ("gone.v2 12 3", True),
        ("gone.mp4 12 3", False),
        ("a/b 3", False),
        ("a b 3", False),
        ("a.mp4 3", False),
        ("12 3", False),
        ("path,label", False),
        ("", False),
    ],
)
def test_a_list_of_folders_is_told_from_a_list_of_videos(tmp_path: Path, line: str, expected: bool) -> None:
    (tmp_path / "folder.mp4").mkdir()
    assert looks_like_rawframes(text(tmp_path / "list.txt", "", line)) is expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("b 2", "'b 2'; expected `dir num_frames label`"),
        ("b 2 x", "expected `dir num_frames label`"),
        ("b -2 1", "expected `dir num_frames label`"),
        ("b 00 1", "'b' is listed with 0 frames"),
        ("a 2 1", "'a' is listed twice in val"),
        ("./a 2 1", "'a' is listed twice in val"),
        ("../b 2 1", "leaves .* say --root"),
        ("/etc 2 1", "leaves .* say --root"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    listing = text(tmp_path / "val.txt", "a 3 0", "", line)
    with pytest.raises(DatasetError, match=words) as caught:
        load_dataset(str(listing))
    assert (caught.value.file, caught.value.line) == (listing, 3)


def test_a_list_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_bytes(b"a\xff 2 0\n")
    with pytest.raises(DatasetError, match="not UTF-8 text"):
        load_dataset(str(tmp_path / "val.txt"))
