"""What every decoder has to do, and what those that cannot do it refuse."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numbered_videos import (
    FPS,
    HEIGHT,
    WIDTH,
    WRITERS,
    cut_by_edit_list,
    decode_all,
    kind_of_request,
    number_of,
    turn,
    write,
    write_as,
    write_with_empty_frames,
)

from vcache.extract.decode import decode_clip, decode_video
from vcache.extract.decoders import DecoderError, get_decoder, list_decoders
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import DecodeRequest, Segment, VideoError

DECODERS = tuple(name for name in list_decoders() if name != "images")
EVERY = ClipRule(sampling=StridedSampling(num_frames=48, stride_frames=1))
REFUSED = {
    ("decord", "h264_open_gop.mkv"): "open groups of pictures",
    ("decord", "hevc.mp4"): "open groups of pictures",
    ("decord", "h264_b_frames.ts"): "MPEG-TS",
    ("decord", "xvid_b_frames.avi"): "AVI",
    ("decord", "mjpeg.avi"): "AVI",
    ("decord", "edit_list.mp4"): "edit lists",
    ("torchcodec", "h264_b_frames.ts"): "some videos in mpegts",
    ("torchcodec", "xvid_b_frames.avi"): "some videos in avi",
    ("torchcodec", "mjpeg.avi"): "some videos in avi",
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    """Each decoder that is installed."""
    try:
        get_decoder(request.param)
    except DecoderError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = {name: write_as(folder / name, name) for name in WRITERS}
    return {**paths, "edit_list.mp4": cut_by_edit_list(folder / "edit_list.mp4", first=17)}


@pytest.mark.parametrize("name", [*WRITERS, "edit_list.mp4"])
def test_every_frame_comes_back_in_its_place_or_the_video_is_refused(
    videos: dict[str, Path], decoder: str, name: str
) -> None:
    expected = list(range(17, 48)) if name == "edit_list.mp4" else list(range(48))
    if reason := REFUSED.get((decoder, name)):
        with pytest.raises(VideoError) as caught:
            decode_all(videos[name], len(expected), decoder=decoder)
        assert caught.value.kind == "decode_error"
        assert caught.value.reason == f"{decoder} gives wrong frames for {reason}; use --decoder pyav"
    else:
        assert decode_all(videos[name], len(expected), decoder=decoder) == expected


@pytest.mark.parametrize("name", ["h264_b_frames.mp4", "vp9.webm"])
def test_frames_far_apart_and_close_together_are_the_right_ones(
    videos: dict[str, Path], decoder: str, name: str
) -> None:
    """A reader that seeks goes wrong after a jump, and not in a row."""
    rules = tuple(
        ClipRule(sampling=sampling, seed=seed)
        for sampling in (TSNSampling(num_frames=5), StridedSampling(num_frames=3, stride_frames=2))
        for seed in range(4)
    )
    video = decode_video(DecodeRequest(path=videos[name], clips=rules, decoder=decoder))
    for i, rule in enumerate(rules):
        assert [number_of(frame) for frame in video.clip(i)] == list(rule.indices(48))


def test_segment_is_numbered_as_the_whole_video_is(videos: dict[str, Path], decoder: str) -> None:
    request = DecodeRequest(
        path=videos["h264_b_frames.mp4"], clips=(EVERY,), segment=Segment(29, 36, "frames"), decoder=decoder
    )
    video = decode_video(request)
    assert (video.first_frame, video.num_video_frames, video.fps) == (29, 48, FPS)
    assert [number_of(frame) for frame in video.frames] == list(video.numbers) == list(range(29, 36))


@pytest.mark.parametrize("quarter_turns_left", [1, 2, 3])
def test_rotation_is_applied_once(tmp_path: Path, decoder: str, quarter_turns_left: int) -> None:
    size = (WIDTH, 160)
    path = turn(write(tmp_path / "turned.mp4", "libx264", numbers=[181] * 5, size=size), quarter_turns_left)
    frames = decode_clip(path, TSNSampling(num_frames=2), decoder=decoder).frames
    assert frames.flags.c_contiguous
    upright = np.rot90(frames[1], k=-quarter_turns_left)
    assert upright.shape == (160, WIDTH, 3)
    assert number_of(upright[:HEIGHT]) == 181
    assert upright[8, 60, 0] > 200 > upright[-8, 60, 0]


def test_variable_frame_rate_odd_sizes_and_colours(tmp_path: Path, decoder: str) -> None:
    ticks = [i * 3 - i % 3 for i in range(30)]
    path = write(
        tmp_path / "a.mp4", "libx264", numbers=range(30), ticks=ticks, size=(WIDTH + 13, HEIGHT + 9), pix_fmt="yuv444p"
    )
    frames = decode_clip(path, TSNSampling(num_frames=30), decoder=decoder).frames
    assert frames.shape == (30, HEIGHT + 9, WIDTH + 13, 3)
    assert [number_of(frame[:HEIGHT]) for frame in frames] == list(range(30))
    for row, colour in ((8, (255, 0, 0)), (-8, (0, 0, 255))):
        np.testing.assert_allclose(frames[0, row, 60].astype(int), colour, atol=12)


def test_pixels_of_decoders_agree(videos: dict[str, Path], decoder: str) -> None:
    """8-bit 4:2:0 is the same to rounding across FFmpeg's versions."""
    sampling = TSNSampling(num_frames=7)
    for name in ("h264_b_frames.mp4", "vp9.webm"):
        ours, theirs = (decode_clip(videos[name], sampling, decoder=which).frames for which in ("pyav", decoder))
        assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_damage_is_refused_whoever_decodes(tmp_path: Path, videos: dict[str, Path], decoder: str) -> None:
    """No library but PyAV tells of flipped bits and of a cut Matroska file."""
    whole = videos["h264_b_frames.mp4"].read_bytes()
    flipped = bytearray(whole)
    for at in range(whole.index(b"mdat") + 600, whole.index(b"moov"), 97):
        flipped[at] ^= 4
    cut = videos["vp9.webm"].read_bytes()
    kinds = {
        "flipped.mp4": (bytes(flipped), ("corrupt_frames", "decode_error")),
        "cut.webm": (cut[: len(cut) * 2 // 3], ("truncated",)),
        "text.mp4": (b"<html>404</html>\n" * 99, ("not_video",)),
    }
    for name, (data, expected) in kinds.items():
        (tmp_path / name).write_bytes(data)
        assert kind_of_request(DecodeRequest(path=tmp_path / name, clips=(EVERY,), decoder=decoder)) in expected


def test_versions_name_decoder_and_library(decoder: str) -> None:
    versions = get_decoder(decoder).versions()
    assert versions["decoder"] == decoder
    assert {"pyav": "av"}.get(decoder, decoder) in versions and "av" in versions


def test_count_that_differs_is_refused(tmp_path: Path) -> None:
    """decord takes every packet for a frame."""
    with pytest.raises(VideoError) as caught:
        decode_all(write_with_empty_frames(tmp_path / "a.mp4"), 48, decoder="decord")
    assert caught.value.kind == "frame_count"
    assert caught.value.reason == "decord counts 56 frames, and the video shows 48; use --decoder pyav"


def test_picture_that_decord_cannot_turn_is_an_error_in_words(tmp_path: Path) -> None:
    """decord stumbles over the padding of a turned picture whose rows are no multiple of 32 bytes."""
    path = turn(write(tmp_path / "turned.mp4", "libx264", numbers=range(5)), 1)
    with pytest.raises(VideoError, match=r"decode_error: decord says DECORDError: .*; use --decoder pyav"):
        decode_all(path, 5, decoder="decord")


@pytest.mark.parametrize("name", ["decord", "torchcodec"])
def test_decoder_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DecoderError, match=f"decoder '{name}' cannot be loaded .*: *pip install {name}"):
        get_decoder(name)


@pytest.mark.parametrize(
    "version, ffmpeg, told", [("0.10.0", 8, "0.10.0 does not apply the rotation"), ("0.17.0", None, "finds no FFmpeg")]
)
def test_torchcodec_that_would_fail_later_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, version: str, ffmpeg: int | None, told: str
) -> None:
    module, inner = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    module.__version__, module.ffmpeg_major_version, inner.VideoDecoder = version, ffmpeg, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", module)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", inner)
    with pytest.raises(DecoderError, match=told):
        get_decoder("torchcodec")
