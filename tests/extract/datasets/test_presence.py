"""Missing and extra videos, against a plain walk of the disk."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.datasets.base import VIDEO_SUFFIXES, Video, VideoDataset
from vcache.extract.datasets.presence import presence
from vcache.extract.datasets.registry import load_dataset


def dataset_of(root: Path, paths: list[str], unused: tuple[str, ...] = ()) -> VideoDataset:
    videos = tuple(Video(path, path, 0, "val" if i % 3 else "train") for i, path in enumerate(paths))
    return VideoDataset("mine", root, ("a",), videos, unused=unused)


names = st.sampled_from(["x.mp4", "ü 1.MKV", "x.webm", "notes.txt", "mp4", ".x.mp4"])
folders = st.sampled_from(["", "a/", "a/b c/", "train/", ".git/"])
paths = st.sets(st.tuples(folders, names).map("".join), max_size=12)


@settings(deadline=None, max_examples=60)
@given(listed=paths, unused=paths, there=paths)
def test_presence_is_what_a_walk_of_the_disk_says(listed: set[str], unused: set[str], there: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path in there:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        dataset = dataset_of(root, sorted(listed), tuple(sorted(unused)))
        found = presence(dataset)
        assert found.missing == dataset.missing
        on_disk = {file.relative_to(root) for file in root.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES}
        visible = {str(file) for file in on_disk if not any(part.startswith(".") for part in file.parts)}
        assert found.extra == tuple(sorted(visible - listed - unused))


def test_no_video_is_asked_for_by_itself(lay_out: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = lay_out({f"{split}/{i}.mp4": None for split in ("train", "val") for i in range(40)})
    dataset = dataset_of(root, [f"{split}/{i}.mp4" for split in ("train", "val", "gone") for i in range(30)])
    asked: list[object] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (asked.append(path), stat(path, **options))[1])
    found = presence(dataset)
    monkeypatch.undo()
    assert sorted(map(str, asked)) == sorted(str(root / name) for name in ("", "train", "val", "gone"))
    assert (len(found.missing), len(found.extra)) == (30, 20)


def test_links_count_as_what_they_lead_to(lay_out: Callable[..., Path], tmp_path: Path) -> None:
    root = lay_out({"data/a/x.mp4": None, "data/a/y.mp4": None, "root/b/z.mp4": None}) / "root"
    (root / "train").symlink_to(tmp_path / "data" / "a")  # the same folder under two names
    (root / "again").symlink_to(tmp_path / "data" / "a")
    (root / "b" / "loop").symlink_to(root)
    (root / "b" / "broken.mp4").symlink_to(root / "nowhere")
    (root / "b" / "linked.mp4").symlink_to(tmp_path / "data" / "a" / "x.mp4")
    found = presence(dataset_of(root, ["train/x.mp4", "b/broken.mp4", "b/linked.mp4"]))
    assert [video.path for video in found.missing] == ["b/broken.mp4"]
    assert found.extra == ("again/y.mp4", "b/z.mp4")


def test_listed_folders_of_frames_are_there_and_not_searched(lay_out: Callable[..., Path]) -> None:
    root = lay_out({"frames/v1/img_00001.jpg": None, "frames/v1/made_of_them.mp4": None, "x.mp4/img.jpg": None})
    found = presence(dataset_of(root, ["frames/v1", "frames/v2", "x.mp4"]))
    assert [video.path for video in found.missing] == ["frames/v2", "x.mp4"]  # a file is what the last should be
    assert found.extra == ()


def test_names_that_are_not_utf8_can_be_printed(lay_out: Callable[..., Path]) -> None:
    root = lay_out({"a.mp4": None})
    (root / os.fsdecode(b"\xff.mp4")).touch()
    assert presence(dataset_of(root, ["a.mp4"])).extra == ("\\xff.mp4",)


def test_counts_go_by_split(lay_out: Callable[..., Path]) -> None:
    found = presence(dataset_of(lay_out({"b.mp4": None}), ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]))
    assert (found.num_missing("train"), found.num_missing("val"), found.num_missing("test")) == (2, 1, 0)


def test_loaders_and_presence_agree_on_a_folder(lay_out: Callable[..., Path]) -> None:
    root = lay_out({"wave/a.mp4": None, "wave/deep/b.mp4": None, "jump/c.mp4": None, ".d.mp4": None})
    found = presence(load_dataset(str(root)))
    assert (found.missing, found.extra) == ((), ("wave/deep/b.mp4",))


def test_a_link_that_leads_nowhere_in_a_folder_of_classes_is_a_video_that_is_missing(
    lay_out: Callable[..., Path],
) -> None:
    root = lay_out({"root/a/x.mp4": None, "root/b/z.mp4": None}) / "root"
    (root / "b" / "not-fetched.mp4").symlink_to(root / "nowhere")
    dataset = load_dataset(str(root), val_fraction=0.0)
    assert [video.path for video in dataset.videos] == ["a/x.mp4", "b/not-fetched.mp4", "b/z.mp4"]
    assert [video.path for video in presence(dataset).missing] == ["b/not-fetched.mp4"]
