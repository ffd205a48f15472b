"""HMDB-51 in miniature: a list per class and split, with videos that belong to neither side."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.base import Video
from vcache.extract.datasets.presence import presence
from vcache.extract.datasets.registry import load_dataset

WAVE, HAIR = "50_FIRST_DATES_wave_f_cm_np1_fr_med_0.avi", "#20_Rhythm & (HQ)_[brush]_hair;_u_nm_0.avi"
LISTS: dict[str, object] = {
    "wave_test_split1.txt": [f"{WAVE} 1 ", "b.avi 2 ", "c.avi 0 "],  # the official files have a space at the end
    "wave_test_split2.txt": [f"{WAVE} 2", "b.avi 0", "c.avi 1"],
    "brush_hair_test_split1.txt": [f"{HAIR} 2", "b.avi 1"],
    "brush_hair_test_split2.txt": [f"{HAIR} 1", "b.avi 2"],
}


@pytest.mark.parametrize("folder", ["", "testTrainMulti_7030_splits/", "test_train_splits/", "annotations/"])
@pytest.mark.parametrize("place, suffix", [("", "avi"), ("hmdb51_org/", "avi"), ("videos/", "mp4")])
def test_first_split_is_read(folder: str, place: str, suffix: str, lay_out: Callable[..., Path]) -> None:
    names = (f"wave/{WAVE}", "wave/b.avi", "wave/c.avi", f"brush_hair/{HAIR}", "brush_hair/b.avi")
    videos = {f"{place}{name.removesuffix('avi')}{suffix}": None for name in names}
    dataset = load_dataset("hmdb51", root=lay_out({f"{folder}{name}": rows for name, rows in LISTS.items()} | videos))
    assert (dataset.name, dataset.class_names) == ("hmdb51", ("brush_hair", "wave"))
    wave, hair = WAVE.removesuffix(".avi"), HAIR.removesuffix(".avi")
    assert dataset.videos == (
        Video("brush_hair/b", f"{place}brush_hair/b.{suffix}", 0, "train"),
        Video(f"wave/{wave}", f"{place}wave/{wave}.{suffix}", 1, "train"),
        Video(f"brush_hair/{hair}", f"{place}brush_hair/{hair}.{suffix}", 0, "test"),
        Video("wave/b", f"{place}wave/b.{suffix}", 1, "test"),
    )
    assert dataset.unused == (f"{place}wave/c.{suffix}",)
    found = presence(dataset)
    assert (found.missing, found.extra) == ((), ())


def test_other_splits_have_names_of_their_own_and_one_folder(
    lay_out: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_DATA", str(lay_out({f"hmdb51/{name}": rows for name, rows in LISTS.items()})))
    dataset = load_dataset("hmdb51-2")
    assert dataset.name == "hmdb51-2"
    assert [video.video_id for video in dataset.split("test")] == ["brush_hair/b", f"wave/{WAVE.removesuffix('.avi')}"]


@pytest.mark.parametrize(
    "rows, line, words",
    [
        (["a.avi 1", "b.avi 3"], 2, "'b.avi 3' is not a video and 0, 1 or 2"),
        (["a.avi"], 1, "'a.avi' is not a video and 0, 1 or 2"),
        (["1"], 1, "'1' is not a video and 0, 1 or 2"),
        (["../a.avi 1"], 1, "video '../a.avi' is not the name of a file"),
        (["a.avi 1", "a.avi 1"], 2, "'wave/a' is listed twice in train"),
    ],
)
def test_malformed_lists_are_refused_with_their_line(
    rows: list[str], line: int, words: str, lay_out: Callable[..., Path], refused: Callable[..., None]
) -> None:
    root = lay_out(LISTS | {"wave_test_split1.txt": rows})
    refused("hmdb51", root, root / "wave_test_split1.txt", line, words)


def test_a_class_without_its_list_is_named(lay_out: Callable[..., Path], refused: Callable[..., None]) -> None:
    root = lay_out(LISTS)
    (root / "wave_test_split1.txt").unlink()
    refused("hmdb51", root, None, None, "1 of the lists of split 1 are not in")
    refused("hmdb51-3", root, None, None, "2 of the lists of split 3 are not in")


def test_without_lists_the_layout_is_said(lay_out: Callable[..., Path], refused: Callable[..., None]) -> None:
    refused("hmdb51", lay_out({"notes.txt": ["x"]}), None, None, "no <class>_test_split1.txt in")
