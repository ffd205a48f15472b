"""`vcache predict --window`: a window is a segment of its video, and a timeline is what its windows say."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vcache.extract.datasets.base import Video
from vcache.extract.video import DecodedVideo, DecodeRequest, Segment, VideoError
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.decoding import decode_here
from vcache.pipelines.prediction import predict as prediction
from vcache.pipelines.prediction.predict import PredictConfig, PredictError, predict
from vcache.pipelines.prediction.timeline_sheets import (
    clock,
    draw_timeline,
    nearest_windows,
    shown_classes,
    write_timeline_csv,
)
from vcache.pipelines.prediction.windows import Timeline, WindowError, window_bounds
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head

Vcache = Callable[..., tuple[int, str, str]]
FPS = 12


@pytest.fixture(scope="module")
def run(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "linear"
    short = {"epochs": 1, "batch_size": 6, "lr": 0.1}
    train_head(TrainingConfig(head="linear", store=float32_store, out=out, device="cpu", settings=short))
    return out


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """5.5 seconds that can be entered by a seek."""
    return write_video(tmp_path_factory.mktemp("long") / "recording.mp4", seed=5, num_frames=66, codec="libx264")


@given(duration=st.floats(0.1, 500), window=st.floats(0.5, 30), share=st.floats(0.2, 1.5))
def test_windows_lie_within_the_video_and_reach_its_end(duration: float, window: float, share: float) -> None:
    stride = window * share
    bounds = window_bounds(duration, window, stride)
    starts, stops = np.array(bounds).T
    np.testing.assert_allclose(stops - starts, window, atol=1e-9)
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and (np.diff(starts) <= stride + 1e-5).all()
    np.testing.assert_allclose(np.diff(starts)[:-1], stride)  # all but the last, which ends with the video
    assert stops[-1] == pytest.approx(max(duration, window), abs=1e-5)


def test_a_timeline_is_there_before_the_next_video_is_looked_at(
    run: Path, recording: Path, tmp_path: Path, vcache: Vcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.mp4"
    other.hardlink_to(recording)
    cut, out = prediction.cut_windows, tmp_path / "timelines"

    def stop_at_the_second(model: object, decoder: object, video: Video, *rest: float) -> object:
        if Path(video.path).name == "other.mp4":
            raise KeyboardInterrupt
        return cut(model, decoder, video, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prediction, "cut_windows", stop_at_the_second)
    assert vcache(f"predict {run} {recording} {other} --window 2 --out {out} --device cpu")[0] == 130
    assert {file.name for file in out.iterdir()} == {"recording.csv", "recording.png"}


def test_windows_have_the_scores_of_the_frames_cut_out_by_hand(run: Path, recording: Path) -> None:
    found = predict(
        PredictConfig(run=run, videos=(str(recording),), window=2.0, stride=1.5, device="cpu", decode_workers=2)
    )
    (timeline,) = found.timelines
    assert timeline.starts.tolist() == [0.0, 1.5, 3.0, 3.5] and not any(timeline.failures) and found.whole == ()
    extractor: ClipExtractor = found.model.extractor
    (view,) = found.model.views()
    for start, probabilities in zip(timeline.starts, timeline.probabilities, strict=True):
        first = round(start * FPS)
        video = Video("v", str(recording), -1, "none", segment=Segment(first, first + 2 * FPS, "frames"))
        clip = extractor.prepare(video, view)
        middle = (2 * FPS - 13) // 2  # 5 frames, 3 apart, are a window of 13
        assert clip.record["frame_index"].tolist() == [first + middle + 3 * i for i in range(5)]
        expected = found.model.probabilities(found.model.scores([clip]).double())[0]
        np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-6)
    assert np.ptp(timeline.probabilities, axis=0).max() > 1e-4


def test_a_video_that_does_not_tell_its_frame_rate_costs_itself(
    run: Path, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Timeless:
        """A decoder of files without a frame rate."""

        def decode(self, request: DecodeRequest) -> DecodedVideo:
            return replace(decode_here(request), fps=None)

        def close(self) -> None:
            pass

    monkeypatch.setattr(prediction, "new_decoder", lambda *_: Timeless())
    found = predict(PredictConfig(run=run, videos=(str(recording),), window=2.0, device="cpu", decode_workers=1))
    (failed,) = found.failures
    assert (
        failed.failure is not None and failed.failure.kind == "no_windows" and "without --window" in str(failed.failure)
    )
    assert found.timelines == () and not found.is_complete


def test_windows_that_begin_more_often_than_frames_are_refused(run: Path, recording: Path) -> None:
    config = PredictConfig(run=run, videos=(str(recording),), window=2.0, stride=1e-9, device="cpu", decode_workers=1)
    with pytest.raises(WindowError, match=r"12 frames in a second, .* Say at least --stride 0\.084"):
        predict(config)


def made_timeline(**fields: object) -> Timeline:
    """Four windows of two seconds; the third could not be decoded."""
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [np.nan] * 3, [0.1, 0.15, 0.75]])
    failures = (None, None, VideoError("corrupt_frames", "2 of 9 frames are damaged"), None)
    timeline = Timeline(
        video=Video("a video", "/a/video.mp4", -1, "none"),
        class_names=("jump", "run, fast", "wave"),
        starts=np.arange(4) * 2.0,
        stops=np.arange(1, 5) * 2.0,
        probabilities=probabilities,
        failures=failures,
    )
    return replace(timeline, **fields)  # type: ignore[arg-type]


def test_the_csv_has_every_window_and_every_probability(tmp_path: Path) -> None:
    write_timeline_csv(made_timeline(), tmp_path / "t.csv", 2)
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["start_seconds"] for row in rows] == ["0.000", "2.000", "4.000", "6.000"]
    assert [row["class"] for row in rows] == ["jump", "jump", "", "wave"]
    assert rows[3]["top2"] == "wave; run, fast" and float(rows[3]["run, fast"]) == 0.15
    assert rows[2]["failure"].startswith("corrupt_frames: 2 of 9") and rows[2]["wave"] == ""


def test_the_picture_shows_each_window_where_it_is() -> None:
    timeline = made_timeline()
    assert timeline.stretches == [(0, 1, 0), (2, 2, None), (3, 3, 2)]
    assert shown_classes(timeline).tolist() == [0, 1, 2]  # by the middle of their time
    assert nearest_windows(timeline, np.array([0.0, 1.9, 2.1, 4.5, 7.9])).tolist() == [0, 0, 1, 2, 3]
    overlapping = made_timeline(stops=np.arange(4) * 2.0 + 4)
    assert nearest_windows(overlapping, np.array([0.0, 2.9, 3.1, 9.9])).tolist() == [0, 0, 1, 3]
    picture = np.asarray(draw_timeline(timeline, "runs/x"))
    certain = (picture.astype(int).sum(axis=-1) > 3 * 180) & (np.ptp(picture.astype(int), axis=-1) > 60)
    columns = np.flatnonzero(certain[:-60].any(axis=0))
    assert len(columns)  # 0.7 to 0.75 are orange, and nothing else on the sheet has a colour so bright
    grey = (picture == 205).all(axis=-1)
    assert (
        0.2 * 640 < grey.any(axis=0).sum() < 0.3 * 640
    )  # the window that could not be decoded is a fourth of the time


def test_clock() -> None:
    assert [clock(s) for s in (7.0, 750.0, 3723.0)] == ["0:07", "12:30", "1:02:03"]
    assert [clock(s, tenths=True) for s in (7.52, 59.96)] == ["0:07.5", "1:00.0"]


def test_the_command_writes_a_csv_and_a_picture_and_tells_where(
    vcache: Vcache, run: Path, recording: Path, tmp_path: Path
) -> None:
    status, out, err = vcache(
        f"predict {run} {recording} --window 2 --out {tmp_path / 'tl'} --json --device cpu --decode-workers 2"
    )
    assert status == 0, err
    (told,) = json.loads(out)["timelines"]
    assert [(one["start"], one["stop"]) for one in told["windows"]] == [(0.0, 2.0), (2.0, 4.0), (3.5, 5.5)]
    assert Path(told["csv"]).read_text().count("\n") == 4
    with Image.open(told["picture"]) as picture:
        assert picture.width > 640
    status, out, err = vcache(f"predict {run} {recording} --window 2 --out {tmp_path / 'tl'} --device cpu", columns=80)
    assert status == 0 and "0:00.0 - 0:0" in out and str(tmp_path / "tl" / "recording.png") in out


def test_a_long_video_in_one_clip_is_noted_with_the_window_to_ask_for(
    vcache: Vcache, run: Path, recording: Path, video_folder: Path
) -> None:
    status, _, err = vcache(f"predict {run} {recording} --device cpu")
    assert status == 0
    assert "5.5 s long, and the clips that the head was trained on are of about 1.2 s: the clip is of frames" in err
    assert "--window 1.25" in err
    assert "note" not in vcache(f"predict {run} {video_folder / 'val/jump/j1.mp4'} --device cpu")[2]


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"stride": 2.0}, "--stride is of windows"), ({"window": 0.0}, "--window 0: say seconds, more than 0")],
)
def test_windows_that_are_none_are_refused(fields: dict[str, float], words: str) -> None:
    with pytest.raises(PredictError, match=words):
        PredictConfig(run=Path("run"), videos=("v",), **fields)  # type: ignore[arg-type]
