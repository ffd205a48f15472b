"""`vcache predict`: which videos are meant, what a broken one costs, what is printed and written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.finding import UnknownVideo
from vcache.pipelines.prediction import predict as prediction
from vcache.pipelines.prediction.predict import PredictConfig, predict
from vcache.pipelines.prediction.screen import bar, common_folder
from vcache.pipelines.prediction.sources import collect_videos
from vcache.pipelines.prediction.video_model import open_video_model
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.errors import CannotRecompute

Vcache = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "linear"
    short = {"epochs": 1, "batch_size": 6, "lr": 0.1}
    train_head(TrainingConfig(head="linear", store=float32_store, out=out, device="cpu", settings=short))
    return out


@pytest.fixture
def mixed(video_folder: Path, tmp_path: Path) -> Path:
    """Two videos, one of them cut off, in folders with other files."""
    folder = tmp_path / "mixed"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    shutil.copy(video_folder / "val/jump/j1.mp4", folder / "b" / "sound.MP4")
    shutil.copy(video_folder / "val/wave/w0.mp4", folder / ".hidden" / "w0.mp4")
    (folder / "a.mp4").write_bytes((video_folder / "val/wave/w1.mp4").read_bytes()[:-900])
    (folder / "notes.txt").write_text("not a video")
    return folder


def test_folders_are_searched_in_order_and_nothing_is_taken_twice(mixed: Path, float32_store: Path) -> None:
    found = collect_videos([str(mixed / "b" / "sound.MP4"), str(mixed), "val/jump/j0.mp4"], float32_store)
    names = [str(mixed / "b" / "sound.MP4"), str(mixed / "a.mp4"), "val/jump/j0.mp4"]
    assert [video.video_id for video in found.videos] == names
    assert found.num_others == 1 and all(Path(video.path).is_file() for video in found.videos)
    assert all(video.label == -1 for video in found.videos[:2])


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("val/jump/j9.mp4", r"neither a video of tiny.zarr nor a file. The nearest id is 'val/jump/j"),
        ("holiday.mp4", r"neither a video of tiny.zarr nor a file. Ids look like this: '.*/.*/.*mp4'\."),
        ("empty", r"has no video in it or below: it is empty. .* \.mp4, \.mkv"),
        ("texts", r"has no video in it or below, but 1 file. "),
    ],
)
def test_what_is_no_video_is_named_with_what_is_there(
    word: str, words: str, float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "texts"):
        Path(folder).mkdir()
    Path("texts/a.txt").write_text("a")
    with pytest.raises(UnknownVideo, match=words):
        collect_videos([word], float32_store)


def test_without_a_store_there_are_no_ids(tmp_path: Path) -> None:
    with pytest.raises(UnknownVideo, match="is neither a file nor a folder"):
        collect_videos([str(tmp_path / "x.mp4")], None)


def test_a_broken_video_costs_itself_and_the_exit_status(
    vcache: Vcache, run: Path, mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.npz"
    status, printed, err = vcache(f"predict {run} {mixed} --json --top 2 --out {out} --device cpu --decode-workers 2")
    assert status == 1 and err == ""
    told = json.loads(printed)
    broken, sound = told["videos"]
    assert broken["video"] == str(mixed / "a.mp4") and broken["failure"]["kind"] == "truncated"
    assert [len(sound["top"]), sound["frames"], sound["fps"]] == [2, 19, 12.0]
    saved = Predictions.load(out)
    assert saved.video_ids == (str(mixed / "b" / "sound.MP4"),) and saved.class_names == ("clap hands", "jump", "wave")
    best = saved.probabilities()[0].max().item()
    assert sound["top"][0]["probability"] == pytest.approx(best) and sound["top"][0]["class"] in told["class_names"]


@pytest.mark.parametrize("columns", [60, 110])
def test_the_screen_has_bars_of_one_video_and_lines_of_several(
    vcache: Vcache, run: Path, mixed: Path, video_folder: Path, columns: int
) -> None:
    video = video_folder / "val/jump/j1.mp4"
    status, one, _ = vcache(f"predict {run} {video} --device cpu --top 2", columns=columns)
    assert status == 0 and one.count("%") == 2 and "█" in one
    status, several, err = vcache(f"predict {run} {video} {mixed} --device cpu", columns=columns)
    assert status == 1 and "1 other file in the folders left out" in several and "truncated" in err
    assert max(len(line) for line in several.splitlines()) <= columns


def test_a_csv_is_written_and_other_names_are_refused_before_anything_is_loaded(
    vcache: Vcache, run: Path, video_folder: Path, tmp_path: Path
) -> None:
    csv = tmp_path / "new" / "p.csv"
    assert vcache(f"predict {run} {video_folder / 'val'} --out {csv} --device cpu")[0] == 0
    assert csv.read_text().count("\n") == 7
    status, _, err = vcache(f"predict nothing {video_folder} --out p.txt")
    assert status == 2 and "name a FILE.npz or a FILE.csv" in err
    status, _, err = vcache(f"predict nothing {video_folder} --window 2 --out p.csv")
    assert status == 2 and "name a folder" in err
    status, _, err = vcache(f"predict {tmp_path / 'none'} {video_folder}")
    assert status == 1 and "is not a run folder" in err


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    vcache: Vcache, video_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    for words, reason in [
        (f"--out {tmp_path / 'file' / 'p.csv'}", "is a file"),
        (f"--out {tmp_path / 'folder.npz'}", "is a folder"),
        (f"--window 2 --out {tmp_path / 'file' / 'below'}", "is a file"),
    ]:
        status, out, err = vcache(f"predict nothing {video_folder} {words}", columns=200)
        assert status == 2 and reason in err and out == ""


def test_where_no_video_can_be_read_the_reasons_are_told_all_the_same(
    vcache: Vcache, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "none.mp4").write_bytes(b"")
    out = tmp_path / "p.csv"
    status, printed, err = vcache(f"predict {run} {tmp_path / 'none.mp4'} --json --out {out} --device cpu")
    told = json.loads(printed)
    assert status == 1 and told["videos"][0]["failure"]["kind"] == "empty" and told["saved"] is None
    assert "no video could be read" in err and not out.exists()


def test_broken_links_are_named_and_loops_of_links_end(video_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    shutil.copy(video_folder / "val/wave/w1.mp4", folder / "two\nlines [x].mp4")
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "loop").symlink_to(".")
    found = collect_videos([str(folder)], None)
    assert [Path(video.path).name for video in found.videos] == ["gone.mp4", "self.mp4", "two\nlines [x].mp4"]


def test_many_long_videos_are_counted_after_a_few_notes(run: Path, video_folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        shutil.copy(video_folder / "val/jump/j1.mp4", tmp_path / f"{number}.mp4")
    model = open_video_model(run, device="cpu")
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "open_video_model", lambda *_, **__: replace(model, usual_frames=2))
        predict(PredictConfig(run=run, videos=(str(tmp_path),), device="cpu"), on_note=notes.append)
    assert len(notes) == 4 and notes[-1] == "The same holds for 2 more videos."


def test_videos_of_the_store_need_not_be_there_but_its_backbone_does(
    run: Path, video_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vcache.pipelines.reextraction import Reextraction

    config = PredictConfig(run=run, videos=(str(video_folder / "val/jump/j1.mp4"),), device="cpu")
    notes: list[str] = []
    monkeypatch.setattr(Reextraction, "differences", [("versions.torch", "1.0", "2.0")])
    assert predict(config, on_note=notes.append).is_complete
    assert notes == ["versions.torch was '1.0' when tiny.zarr was made, and is '2.0' here."]
    monkeypatch.setattr(Reextraction, "differences", [("weights_sha256", "aa", "bb")])
    with pytest.raises(CannotRecompute, match="weights_sha256 was 'aa' when tiny.zarr was made, and is 'bb' here"):
        predict(config)


def test_a_batch_size_changes_no_prediction(run: Path, video_folder: Path) -> None:
    whole = [
        predict(PredictConfig(run=run, videos=(str(video_folder / "val"),), batch_size=size, device="cpu")).whole
        for size in (1, 4, 64)
    ]
    assert [len(one) for one in whole] == [6, 6, 6]
    first, *others = [np.stack([one.scores.numpy() for one in found if one.scores is not None]) for found in whole]
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


def test_bar() -> None:
    assert [bar(share, 2) for share in (0.0, 0.03, 0.5, 0.75, 1.0)] == ["", "", "█", "█▌", "██"]


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["x/a.mp4", "x/y/b.mp4"], "x"),
        ([".data/x/a.mp4", ".data/y/b.mp4"], ".data"),
        (["../x/a.mp4", "../y/b.mp4"], ".."),
        (["a.mp4", "b.mp4"], ""),
        (["a.mp4", "x/b.mp4"], ""),
        (["/x/a.mp4", "x/b.mp4"], ""),
        (["/a.mp4", "/x/b.mp4"], ""),
    ],
)
def test_the_folder_that_names_have_in_common(names: list[str], folder: str) -> None:
    assert common_folder(names) == folder
    assert all(Path(name).is_relative_to(folder) for name in names if folder)
