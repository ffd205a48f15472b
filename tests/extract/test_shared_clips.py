"""Real clips, whole and broken, that lie beside the checkout on the machines where this was developed."""

import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from numbered_videos import kind_of

from vcache.extract.decode import decode_clip, decode_video
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import DecodeRequest, Segment, VideoError

CLIPS = Path(__file__).parents[2].parent / "shared" / "clips"
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are not beside the checkout")

REAL = {
    "an_v_GGSY1Qvo990.mp4": (355, 320, 240),
    "fw_bbb_180_10s.webm": (300, 320, 180),
    "iio_realshort.mp4": (36, 320, 240),
    "k_demo.mp4": (280, 340, 256),
    "k_flipping_a_pancake.mkv": (310, 426, 240),
    "mm_test.avi": (164, 320, 240),
    "mm_test.mp4": (300, 340, 256),
    "moz_rotation_90.mp4": (1, 60, 100),
    "moz_tiny_av1.mp4": (1, 64, 64),
    "mpy_failing_audio.mp4": (280, 640, 360),
    "mpy_no_duration.webm": (74, 1280, 720),
    "small_webm.webm": (1, 8, 8),
    "tc_h264_10bits.mp4": (30, 200, 200),
    "derived/d_1frame.mp4": (1, 340, 256),
    "derived/d_3frames.mp4": (3, 340, 256),
    "derived/d_copycut_editlist.mp4": (114, 340, 256),
    "derived/d_hevc_openGOP.mp4": (280, 340, 256),
    "derived/d_mpegts.ts": (112, 340, 256),
    "derived/d_odd341x257_444.mp4": (280, 341, 257),
    "derived/d_rot90_340x256.mp4": (58, 256, 340),
    "derived/d_vfr.mp4": (158, 340, 256),
    "derived/d_xvid_bf2.avi": (140, 340, 256),
}
BROKEN = {
    "audio_only.mp4": "no_video_stream",
    "decord_corrupted.mp4": "decode_error",
    "flip_0.01pct_payload.mp4": "corrupt_frames",
    "flip_moov.mp4": "decode_error",
    "header_only.mp4": "truncated",
    "text_file.mp4": "not_video",
    "trunc50.mkv": "truncated",
    "trunc50_faststart.mp4": "truncated",
    "trunc50_nomoov.mp4": "truncated",
    "zero_bytes.mp4": "empty",
    "zero_duration.mp4": "no_frames",
    "zero_frames.mp4": "no_video_stream",
}


@needs_clips
def test_lists_of_shared_clips_are_complete() -> None:
    videos = {p.relative_to(CLIPS).as_posix() for p in CLIPS.rglob("*.*") if p.suffix != ".md"}
    assert videos == set(REAL) | {f"broken/{name}" for name in BROKEN}


@needs_clips
@pytest.mark.parametrize("name", REAL)
def test_real_clip_has_the_frames_it_should(name: str) -> None:
    num_frames, width, height = REAL[name]
    clip = decode_clip(CLIPS / name, StridedSampling(num_frames=2, stride_frames=5))
    assert clip.num_video_frames == num_frames
    assert clip.frames.shape == (2, height, width, 3)


def all_frames(path: Path) -> list[np.ndarray]:
    """Everything in order, with nothing of ours but the rotation."""
    with av.open(str(path), metadata_errors="replace") as container:
        frames = container.decode(container.streams.best("video"))
        return [np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90)) for frame in frames]


@needs_clips
@pytest.mark.parametrize("name", REAL)
def test_whole_videos_and_segments_are_slices_of_what_is_decoded_in_order(name: str) -> None:
    truth, rng = all_frames(CLIPS / name), np.random.default_rng(3)
    assert len(truth) == REAL[name][0]
    for _ in range(4):
        start = int(rng.integers(len(truth)))
        stop = int(rng.integers(start, min(start + 40, len(truth)))) + 1
        segment = None if len(truth) < 4 else Segment(start, stop, "frames")
        rule = ClipRule(sampling=TSNSampling(num_frames=4))
        video = decode_video(DecodeRequest(path=CLIPS / name, clips=(rule,), segment=segment))
        np.testing.assert_array_equal(video.frames, [truth[i] for i in video.numbers])


# Where decord and PyAV agree to the last bit or two, that is on 8-bit 4:2:0; the others are refused, with this in the reason.
DECORD = {
    "mm_test.avi": "AVI",
    "moz_tiny_av1.mp4": "DECORDError",
    "mpy_no_duration.webm": "DECORDError",
    "small_webm.webm": "DECORDError",
    "derived/d_copycut_editlist.mp4": "edit lists",
    "derived/d_hevc_openGOP.mp4": "open groups of pictures",
    "derived/d_mpegts.ts": "MPEG-TS",
    "derived/d_xvid_bf2.avi": "AVI",
}


@needs_clips
@pytest.mark.parametrize("name", [name for name in REAL if "10bits" not in name])
def test_decord_gives_the_same_frames_or_is_refused(name: str) -> None:
    rule = ClipRule(sampling=TSNSampling(num_frames=8), seed=5)
    ours, theirs = (DecodeRequest(path=CLIPS / name, clips=(rule,), decoder=decoder) for decoder in ("pyav", "decord"))
    if reason := DECORD.get(name):
        with pytest.raises(VideoError, match=f"{reason}.*use --decoder pyav"):
            decode_video(theirs)
    else:
        assert np.abs(decode_video(ours).frames.astype(int) - decode_video(theirs).frames).max() <= 2


@needs_clips
@pytest.mark.parametrize("name", BROKEN)
def test_broken_clip_is_refused_with_its_kind(name: str) -> None:
    assert kind_of(CLIPS / "broken" / name) == BROKEN[name]
    assert kind_of(CLIPS / "broken" / name, num_frames=1) == BROKEN[name]


@needs_clips
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program, used as an oracle, is not installed")
@pytest.mark.parametrize(
    "name",
    ["iio_realshort.mp4", "mm_test.avi", *(f"derived/d_{n}" for n in ("copycut_editlist.mp4", "rot90_340x256.mp4"))],
)
def test_frames_equal_those_of_the_ffmpeg_program(name: str) -> None:
    num_frames, width, height = REAL[name]
    clip = decode_clip(CLIPS / name, TSNSampling(num_frames=9))
    command = ["ffmpeg", "-v", "error", "-i", str(CLIPS / name), "-fps_mode", "passthrough", "-f", "rawvideo"]
    raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE, check=True).stdout
    truth = np.frombuffer(raw, dtype=np.uint8).reshape(num_frames, height, width, 3)
    difference = np.abs(truth[list(clip.frame_index)].astype(int) - clip.frames)
    assert difference.max() <= 2
