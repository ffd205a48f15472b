"""`vcache datasets` as a user meets it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Vcache = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def k600(tmp_path: Path) -> Path:
    rows = [f"class {i % 3} [x],v{i},10,20,{'train' if i % 4 else 'val'}" for i in range(30)]
    (tmp_path / "all_train.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]))
    for i in range(30):
        path = tmp_path / ("train" if i % 4 else "val") / f"v{i}_000010_000020.mp4"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_a_whole_dataset_is_status_0(vcache: Vcache, k600: Path) -> None:
    status, out, _ = vcache(f"datasets k600 --root {k600}")
    assert status == 0
    assert "3 classes: class 0 [x], class 1 [x], class 2 [x]\n" in out
    assert [line.split() for line in out.splitlines() if line.split()[0] in ("train", "val")] == [
        ["train", "22", "0"],
        ["val", "8", "0"],
    ]
    assert "all 30 are on the disk, and no other video is" in out


def test_extra_videos_alone_do_no_harm(vcache: Vcache, k600: Path) -> None:
    (k600 / "train" / "[b]more.mp4").touch()
    status, out, _ = vcache(f"datasets k600 --root {k600}")
    assert status == 0
    assert "extra: 1 video that no list names, left alone\n    train/[b]more.mp4" in out


def test_missing_and_extra_videos_are_said_together_with_status_1(vcache: Vcache, k600: Path) -> None:
    for i in range(1, 13):
        (k600 / ("train" if i % 4 else "val") / f"v{i}_000010_000020.mp4").rename(k600 / f"v{i}.mp4")
    status, out, _ = vcache(f"datasets k600 --root {k600}")
    assert status == 1
    assert "missing: 12 of 30 listed videos" in out
    assert "extra: 12 videos that no list names" in out
    assert out.count("... and 7 others (--json has all)") == 2
    status, out, _ = vcache(f"datasets k600 --root {k600} --json")
    found = json.loads(out)
    assert (status, found["ok"], found["dataset"], found["root"]) == (1, False, "k600", str(k600))
    assert found["splits"] == {"train": {"videos": 22, "missing": 9}, "val": {"videos": 8, "missing": 3}}
    assert len(found["missing"]) == 12 and len(found["extra"]) == 12
    assert found["missing"][-1] == {"split": "val", "video_id": "v8_000010_000020", "path": "val/v8_000010_000020.mp4"}


def test_listed_videos_of_no_split_are_counted(vcache: Vcache, k600: Path) -> None:
    (k600 / "test.csv").write_text("youtube_id,time_start,time_end,split\nu,1,2,test\n")
    assert "1 more are listed and belong to no split" in vcache(f"datasets k600 --root {k600}")[1]
    assert json.loads(vcache(f"datasets k600 --root {k600} --json")[1])["unused"] == 1


@pytest.mark.parametrize(
    "line, status, words",
    [
        ("datasets k60 --root .", 1, "Did you mean 'k600'"),
        ("datasets k600", 1, "Say --root FOLDER"),
        ("datasets --root .", 2, "--root goes with a DATASET"),
    ],
)
def test_what_cannot_be_looked_at_is_said(line: str, status: int, words: str, vcache: Vcache) -> None:
    found, _, err = vcache(line)
    assert found == status
    assert words in " ".join(err.replace("│", " ").split())


def test_every_name_is_listed_and_one_layout_is_shown_once(vcache: Vcache) -> None:
    names = [row["dataset"] for row in json.loads(vcache("datasets --json")[1])]
    assert {"k400", "k600", "k700", "ssv2", "ucf101", "ucf101-3", "hmdb51-2", "diving48"} <= set(names)
    out = vcache("datasets")[1]
    assert out.count("youtube_id,time_start") == out.count("testlist0k.txt") == 1
    assert all(f"\n{name}  " in f"\n{out}" for name in names)
