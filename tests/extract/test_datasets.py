"""Miniature layouts on disk. No video is opened by a dataset, so that empty files do."""

import os
from pathlib import Path

import pytest

from vcache.extract.datasets.base import DatasetError, Video, VideoDataset, hashed_split
from vcache.extract.datasets.registry import list_datasets, load_dataset

HEADER = "label,youtube_id,time_start,time_end,split"


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def labels(dataset: VideoDataset) -> dict[str, str]:
    return {video.path: dataset.class_names[video.label] for video in dataset.videos}


# Kinetics


@pytest.fixture
def k400(tmp_path: Path) -> Path:
    text(tmp_path / "train.csv", HEADER, "zumba,a-b_c,10,20,train", '"air drumming",dEf,0,10,train')
    text(tmp_path / "val.csv", HEADER, "zumba,-gH,128,138,validate", "baby waking up,iJk,7,17,validate")
    touch(tmp_path, "train/a-b_c_000010_000020.mp4", "train/dEf_000000_000010.mkv", "val/-gH_000128_000138.webm")
    return tmp_path


def test_kinetics_csvs_and_files_are_joined(k400: Path) -> None:
    dataset = load_dataset("k400", root=k400)
    assert (dataset.name, dataset.class_names) == ("k400", ("air drumming", "baby waking up", "zumba"))
    assert dataset.splits == ("train", "val")
    assert dataset.split("train") == (
        Video("a-b_c_000010_000020", "train/a-b_c_000010_000020.mp4", 2, "train"),
        Video("dEf_000000_000010", "train/dEf_000000_000010.mkv", 0, "train"),
    )
    lost = Video("iJk_000007_000017", "val/iJk_000007_000017.mp4", 1, "val")
    assert dataset.missing == (lost,)
    assert lost in dataset.split("val")


@pytest.mark.parametrize(
    "place", ["val", "validate", "videos", "videos/val", "val/baby waking up", "val/baby_waking_up", "baby_waking_up"]
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".MP4"])
def test_kinetics_videos_are_found_in_every_usual_place(k400: Path, place: str, suffix: str) -> None:
    path = f"{place}/iJk_000007_000017{suffix}"
    touch(k400, path)
    dataset = load_dataset("k400", root=k400)
    assert dataset.missing == ()
    assert path in labels(dataset)


@pytest.mark.parametrize(
    "names", [("annotations/train.csv", "annotations/val.csv"), ("k400_train.csv", "k400-val.csv")]
)
def test_kinetics_csvs_may_be_elsewhere(k400: Path, names: tuple[str, str]) -> None:
    expected = load_dataset("k400", root=k400)
    (k400 / "annotations").mkdir()
    text(k400 / "classes.csv", "id,name")  # not an annotation of a split: left alone
    for old, new in zip(("train.csv", "val.csv"), names, strict=True):
        (k400 / old).rename(k400 / new)
    assert load_dataset("k400", root=k400) == expected


def test_kinetics_is_found_under_the_data_folder(k400: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (k400.parent / "data").mkdir()
    (k400.parent / "data" / "k400").symlink_to(k400)
    monkeypatch.setenv("VCACHE_DATA", str(k400.parent / "data"))
    assert load_dataset("k400").videos == load_dataset("k400", root=k400).videos


def test_only_the_asked_splits_are_kept_with_all_classes(k400: Path) -> None:
    dataset = load_dataset("k400", root=k400, splits=("val",))
    assert dataset.splits == ("val",)
    assert len(dataset.class_names) == 3
    with pytest.raises(DatasetError, match="k400 has no split 'test'; it has: train, val"):
        load_dataset("k400", root=k400, splits=("test",))


@pytest.mark.parametrize(
    "lines, line, words",
    [
        (["zumba,abc,1,11,train"], 1, f"expected a header with the columns {HEADER}"),
        (["label,youtube_id,split", "zumba,abc,train"], 1, "no column time_start, time_end"),
        ([HEADER, "zumba,abc,1,11,train", "zumba,def,1,train"], 3, "4 fields where the header has 5"),
        ([HEADER, "zumba,abc,1,eleven,train"], 2, "'eleven' must be whole seconds"),
        ([HEADER, ",abc,1,11,train"], 2, "label is empty"),
        ([HEADER, "zumba,abc,1,11,train", "zumba,abc,01,11,train"], 3, "listed twice in train"),
        ([], 1, "the file is empty"),
    ],
)
def test_malformed_kinetics_csv_is_refused_with_its_line(
    tmp_path: Path, lines: list[str], line: int, words: str
) -> None:
    file = tmp_path / "train.csv"
    file.write_text("\n".join(lines))
    with pytest.raises(DatasetError) as caught:
        load_dataset("k400", root=tmp_path)
    assert (caught.value.file, caught.value.line) == (file, line)
    assert f"{file}, line {line}: " in str(caught.value) and words in str(caught.value)


def test_kinetics_without_a_csv_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no Kinetics CSV in .*\n.*label,youtube_id"):
        load_dataset("k400", root=tmp_path)


# A folder


def test_class_folders_become_classes(tmp_path: Path) -> None:
    touch(
        tmp_path, "wave/b c.mp4", "wave/ä.MKV", "jump/z.avi", "jump/notes.txt", "jump/.hidden.mp4", ".git/x.mp4", "r.md"
    )
    dataset = load_dataset(str(tmp_path))
    assert (dataset.name, dataset.root, dataset.class_names) == (tmp_path.name, tmp_path, ("jump", "wave"))
    assert labels(dataset) == {"jump/z.avi": "jump", "wave/b c.mp4": "wave", "wave/ä.MKV": "wave"}
    assert all(video.video_id == video.path for video in dataset.videos)


def test_split_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "validation/jump/v.mp4", "train/wave/t.mp4", "train/jump/t.mp4", "test/run/u.webm", "docs/a.txt")
    dataset = load_dataset(str(tmp_path))
    assert dataset.splits == ("train", "val", "test")
    assert dataset.class_names == ("jump", "run", "wave")
    assert [video.path for video in dataset.split("val")] == ["validation/jump/v.mp4"]


def test_class_folder_named_like_a_split_is_a_class(tmp_path: Path) -> None:
    touch(tmp_path, "test/a.mp4", "exam/b.mp4")
    assert load_dataset(str(tmp_path)).class_names == ("exam", "test")


def test_hashed_split_depends_on_the_path_alone(tmp_path: Path) -> None:
    names = [f"{'ab'[i % 2]}/{i}.mp4" for i in range(400)]
    touch(tmp_path, *names)
    dataset = load_dataset(str(tmp_path))
    before = {video.path: video.split for video in dataset.videos}
    assert 50 < sum(split == "val" for split in before.values()) < 110
    for name in names[::3]:
        (tmp_path / name).unlink()
    after = {video.path: video.split for video in load_dataset(str(tmp_path)).videos}
    assert after == {path: before[path] for path in after}
    # Pinned: another rule would move videos of existing stores from one split to the other.
    assert [i for i in range(14) if hashed_split(f"a/{i}.mp4", 0.2) == "val"] == [2, 7, 9, 13]
    assert load_dataset(str(tmp_path), val_fraction=0.0).splits == ("train",)


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = ["b/2.mp4", "a/10.mp4", "a/9.mp4", "B/1.mp4"]
    first, second = tmp_path / "first", tmp_path / "second"
    touch(first, *names)
    touch(second, *reversed(names))
    assert load_dataset(str(first)).videos == load_dataset(str(second)).videos


@pytest.mark.parametrize(
    "paths, words",
    [
        ([], "no videos in .*looked in its class folders for .mp4 .mkv"),
        (["a/readme.txt"], "no videos in"),
        (["x.mp4"], "no videos in"),
        (["x.mp4", "a/y.mp4"], "1 videos lie in .* outside any class folder, the first is 'x.mp4'"),
        (["train/a/x.mp4", "jump/y.mp4"], r"has split folders \(train\) and the class folder 'jump' beside them"),
    ],
)
def test_folder_that_is_not_laid_out_says_so(tmp_path: Path, paths: list[str], words: str) -> None:
    touch(tmp_path, *paths)
    with pytest.raises(DatasetError, match=words):
        load_dataset(str(tmp_path))


# A CSV


def test_csv_with_names_and_splits(tmp_path: Path) -> None:
    touch(tmp_path, "sub dir/ü 1.mp4", "b.mp4")
    rows = ['"sub dir/ü 1.mp4",wave,train', "b.mp4,clap hands,validation", "", "./gone.mp4, wave ,test"]
    file = text(tmp_path / "my list.csv", "path,label,split", *rows)
    dataset = load_dataset(str(file))
    assert (dataset.name, dataset.root) == ("my list", tmp_path)
    assert dataset.class_names == ("clap hands", "wave")
    assert dataset.videos == (
        Video("sub dir/ü 1.mp4", "sub dir/ü 1.mp4", 1, "train"),
        Video("b.mp4", "b.mp4", 0, "val"),
        Video("gone.mp4", "gone.mp4", 1, "test"),
    )
    assert [video.path for video in dataset.missing] == ["gone.mp4"]


def test_csv_with_indices_keeps_them(tmp_path: Path) -> None:
    dataset = load_dataset(str(text(tmp_path / "a.csv", "label,path", "10,x.mp4", "2,y.mp4")))
    assert dataset.class_names == tuple(str(i) for i in range(11))
    assert {video.path: video.label for video in dataset.videos} == {"x.mp4": 10, "y.mp4": 2}
    mixed = load_dataset(str(text(tmp_path / "b.csv", "label,path", "10,x.mp4", "two,y.mp4")))
    assert mixed.class_names == ("10", "two")


def test_csv_written_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffpath,label\r\nx.mp4,wave\r\n".encode())
    assert labels(load_dataset(str(tmp_path / "a.csv"))) == {"x.mp4": "wave"}


def test_csv_paths_may_be_relative_to_another_root(tmp_path: Path) -> None:
    touch(tmp_path, "videos/a/x.mp4")
    file = text(tmp_path / "lists" / "a.csv", "path,label", "a/x.mp4,wave", f"{tmp_path}/videos/y.mp4,jump")
    dataset = load_dataset(str(file), root=tmp_path / "videos")
    assert dataset.root == tmp_path / "videos"
    assert {video.path for video in dataset.videos} == {"a/x.mp4", "y.mp4"}


@pytest.mark.parametrize(
    "lines, line, words",
    [
        (["path,class", "x.mp4,a"], 1, r"no column label in the first line \(path,class\)"),
        (["x.mp4,a"], 1, "expected a header with the columns path,label"),
        (["path,label", "x.mp4,a", "y.mp4,"], 3, "label is empty"),
        (["path,label", ",a"], 2, "path is empty"),
        (["path,label,split", "x.mp4,a,"], 2, "split is empty"),
        (["path,label", "x.mp4,a", "./x.mp4,b"], 3, r"'x.mp4' is listed twice in .*first in a.csv, line 2"),
        (["path,label", "x.mp4,a,b"], 2, "3 fields where the header has 2"),
        (["path,label", "a/../../x.mp4,a"], 2, "leaves .* say --root"),
        (["path,label", "/etc/x.mp4,a"], 2, "leaves .* say --root"),
        (["path,label", "x.mp4,-1"], 2, "label -1 is negative"),
        (["path,label", "x.mp4,7", "y.mp4,20261121"], 3, "label 20261121 is above 999999"),
        (["path,label", '"x.mp4,a'], 2, "not a CSV"),
    ],
)
def test_malformed_csv_is_refused_with_its_line(tmp_path: Path, lines: list[str], line: int, words: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=words) as caught:
        load_dataset(str(file))
    assert (caught.value.file, caught.value.line) == (file, line)


def test_csv_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path,label\nx\xff.mp4,a\n")
    with pytest.raises(DatasetError, match="not UTF-8"):
        load_dataset(str(tmp_path / "a.csv"))


def test_csv_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="lists no videos at all"):
        load_dataset(str(text(tmp_path / "a.csv", "path,label")))


# Names


def test_every_entry_says_what_it_is_and_where_files_go() -> None:
    infos = list_datasets()
    by_path = [name for name, info in infos.items() if info.chosen_by_path]
    assert {"csv", "folder", "rawframes", "txt"} <= set(by_path)
    assert list(infos)[-len(by_path) :] == sorted(by_path)
    assert all(info.name == name and info.summary and info.layout for name, info in infos.items())


@pytest.mark.parametrize(
    "asked, words",
    [
        ("k40", "Did you mean 'k400'"),
        ("./nowhere", "neither a registered dataset .there are: .*k400.* nor an existing folder or file"),
        ("csv", "'csv' is a kind of path, not a name"),
        ("k400", "Say --root FOLDER, or set VCACHE_DATA"),
    ],
)
def test_name_that_leads_nowhere_says_what_would(asked: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VCACHE_DATA", raising=False)
    with pytest.raises(DatasetError, match=words):
        load_dataset(asked)


def test_places_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/x.mp4", "list.md")
    with pytest.raises(DatasetError, match="is not a folder"):
        load_dataset("k400", root=tmp_path / "absent")
    with pytest.raises(DatasetError, match="--root .* has no meaning for"):
        load_dataset(str(tmp_path), root=tmp_path)
    with pytest.raises(DatasetError, match="ends neither in .csv nor in .txt"):
        load_dataset(str(tmp_path / "list.md"))
    with pytest.raises(DatasetError, match=r"\(1.5\) must be at least 0 and below 1"):
        load_dataset(str(tmp_path), val_fraction=1.5)
    monkeypatch.setenv("VCACHE_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match="k400 is not at .*from VCACHE_DATA"):
        load_dataset("k400")


def test_folder_in_the_current_directory_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "mine/a/x.mp4")
    monkeypatch.chdir(tmp_path)
    assert load_dataset("mine").root == tmp_path / "mine"


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / os.fsdecode(b"\xff.mp4")).touch()
    with pytest.raises(DatasetError, match=r"a/\\xff\.mp4.* is not UTF-8; rename the file"):
        load_dataset(str(tmp_path))
